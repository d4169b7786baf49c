"""`qgraph build`: what it prints and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qgraph import cli


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]
DATA = 'model = "model.onnx"\ncalib = "calib.npz"\n'


@pytest.fixture
def qgraph(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command in the folder, in this process."""
    monkeypatch.chdir(work)

    def run(*arguments: str) -> Done:
        return Done(cli.main(arguments), *capsys.readouterr())

    return run


def recipe(work: Path, text: str) -> str:
    (work / "r.toml").write_text(text, encoding="utf-8")
    return "r.toml"


@pytest.mark.parametrize(
    ("text", "status", "states"),
    [
        (DATA + 'targets = ["cpu-fp32", "cpu-int4"]', 0, ["built", "built"]),
        (DATA + 'targets = ["cpu-fp32", "cpu-int8"]\npass = [{ name = "qdq" }]\ntolerance = { sqnr = 300 }', 3, None),
        (DATA + '[targets.cpu-fp32]\n[targets.cpu-int4]\npasses = "gptq{bits=3},gptq"\nset = ["gptq.bits=9"]', 2, None),
    ],
    ids=["built", "outside", "refused"],
)
def test_the_exit_status_tells_the_worst(
    qgraph: Run, work: Path, text: str, status: int, states: list[str] | None
) -> None:
    done = qgraph("build", recipe(work, text), "--json", "-j", "1")
    assert done.returncode == status, done.stderr
    document = json.loads(done.stdout)
    if states is not None:
        assert [one["status"] for one in document["targets"]] == states
    assert document == {"path": "r.build", **json.loads((work / "r.build" / "index.json").read_text())}
    assert (work / "r.build" / "index.html").is_file()
    assert "Traceback" not in done.stderr


def test_quiet_still_tells_what_went_wrong(qgraph: Run, work: Path) -> None:
    bad = '[targets.bad]\ntarget = "cpu-int4"\npasses = "gptq{bits=3},gptq"\nset = ["gptq.bits=9"]'
    text = f"{DATA}[targets.cpu-fp32]\n{bad}"
    done = qgraph("build", recipe(work, text), "-q", "-j", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: bad was refused: ")
    assert done.stderr.count("\n") == 1
    assert qgraph("build", recipe(work, DATA + 'targets = ["cpu-fp32"]'), "-q", "-j", "1", "--force").stderr == ""


def test_a_cache_is_made_and_used(qgraph: Run, work: Path) -> None:
    text = recipe(work, DATA + 'targets = ["cpu-int4"]')
    done = qgraph("build", text, "--cache", "cache", "--workers", "2", "-j", "1")
    assert done.returncode == 0, done.stderr
    assert (work / "cache" / "CACHE").is_file()
    done = qgraph("compile", "model.onnx", "-t", "cpu-int4", "--calib", "calib.npz", "--cache", "cache", "-j", "1")
    assert done.returncode == 0, done.stderr
    same = [(folder / "manifest.json").read_bytes() for folder in (work / "r.build/cpu-int4", work / "model.cpu-int4")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no.toml",), "the recipe no.toml cannot be read"),
        (("r.toml", "--cache", "calib.npz"), "the cache calib.npz is a file"),
        (("r.toml", "--cache", "."), "so it is no cache of qgraph's"),
        (("r.toml", "--workers", "0"), "--workers"),
        (("r.toml", "--model", "no.onnx"), "no.onnx does not exist"),
    ],
)
def test_bad_input_is_one_line(qgraph: Run, work: Path, arguments: tuple[str, ...], words: str) -> None:
    recipe(work, DATA + 'targets = ["cpu-fp32"]')
    before = sorted(work.iterdir())
    done = qgraph("build", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(work.iterdir()) == before
