"""Whatever is wrong with the input: one line that says what and how to mend it, the right status, nothing left over."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qgraph import cli

Run = Callable[..., subprocess.CompletedProcess[str]]


def on_path(folder: Path) -> str:
    """Return PYTHONPATH with `folder` in front."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def contents(folder: Path) -> dict[str, str]:
    """Return every file and link below a folder, hidden ones too, with what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def told(status: int, out: str, err: str) -> str:
    """Check what all refusals share, and return the one line without its `error: `."""
    assert (status, out) == (2, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "a fault of qgraph" not in err
    return last.removeprefix("error: ")


@pytest.fixture
def refused(work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Return a function that runs the command in this process and returns the one line that it ends with.

    The folder is the same afterwards, to the byte: nothing is left behind and the input is unchanged.
    """
    monkeypatch.chdir(work)

    def run(*arguments: str | Path) -> str:
        before = contents(work)
        status = cli.main(list(map(str, arguments)))
        assert contents(work) == before
        return told(status, *capfd.readouterr())

    return run


@pytest.fixture
def refused_process(work: Path, qgraph: Run):
    """Return the same for the command as a process of its own."""

    def run(*arguments: str | Path, **settings) -> str:
        before = contents(work)
        done = qgraph(*arguments, **settings)
        assert contents(work) == before
        return told(done.returncode, done.stdout, done.stderr)

    return run


COMPILE = ("compile", "model.onnx", "-t", "cpu-int8", "--calib", "calib.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("compile", "model.onnx", "-t", "cpu-int9"),
            "there is no target 'cpu-int9'. Did you mean 'cpu-int8'? `qgraph targets` lists them.",
        ),
        ((*COMPILE, "--passes", "qdqq"), "there is no pass 'qdqq'. Did you mean 'qdq'? `qgraph passes` lists them."),
        (
            (*COMPILE, "--passes", "qdq{per_chanel=true}"),
            "'qdq' has no option 'per_chanel'. Did you mean 'per_channel'?",
        ),
        ((*COMPILE, "--passes", "qdq{per_channel=yes}"), "option 'per_channel' of 'qdq' is 'yes', but must be true or"),
        ((*COMPILE, "--passes", "qdq{"), "'qdq{': expected an option at the end"),
        ((*COMPILE, "--set", "qdq.per_chanel=true"), "'qdq' has no option 'per_chanel'. Did you mean 'per_channel'?"),
        ((*COMPILE, "--set", "qdqq.x=1"), "there is no pass 'qdqq'. Did you mean 'qdq'?"),
        ((*COMPILE, "--set", "qdq"), "a setting is written PASS.OPTION=VALUE, not 'qdq'"),
        ((*COMPILE, "--tolerance", "sqrn=30"), "there is no tolerance 'sqrn'. Did you mean 'sqnr'?"),
        ((*COMPILE, "--tolerance", "sqnr=much"), "tolerance sqnr: 'much' is no number"),
        ((*COMPILE, "--recipe", "none.toml"), "the recipe none.toml cannot be read: "),
        ((*COMPILE, "--recipe", "calib.npz"), "the recipe calib.npz cannot be read: "),
        ((*COMPILE, "--recipe", "x", "--passes", "qdq"), "pass either passes or a recipe, not both"),
        ((*COMPILE, "--shape", "y=1,2"), "'y'"),
        ((*COMPILE, "--shape", "x=1,2"), "'x'"),
        ((*COMPILE, "--shape", "x"), "Invalid value for '--shape': 'x' is not written INPUT=1,3,224,224. See "),
        ((*COMPILE, "--calib-memory", "lots"), "Invalid value for '--calib-memory': 'lots' is no size such as 512M or"),
        ((*COMPILE, "--seed", "-1"), "Invalid value for '--seed': -1 is not in the range x>=0. See `qgraph compile"),
        (("compile", "model.onnx"), "Missing option '--target' / '-t'. See `qgraph compile --help`."),
        (("compil",), "there is no command 'compil'. Did you mean 'compile'? See `qgraph --help`."),
        (("compile", "none.onnx", "-t", "cpu-int8"), "none.onnx does not exist"),
        (("compile", ".", "-t", "cpu-int8"), ". is a folder: name the .onnx file in it"),
        (("compile", "calib.npz", "-t", "cpu-int8"), "calib.npz is not a"),
        (("inspect", "none.onnx"), "none.onnx does not exist"),
        (("verify", "model.onnx"), "model.onnx"),
        (("run", "none", "-i", "calib.npz"), "none does not exist"),
        (("bench", "."), ". is no qgraph artifact: it has no manifest.json"),
        (("targets", "cpu-int"), "there is no target 'cpu-int'. Did you mean 'cpu-int8'? `qgraph targets` lists them."),
        (("passes", "qd"), "there is no pass 'qd'. Did you mean 'qdq'? `qgraph passes` lists them."),
    ],
)
def test_usage(refused, arguments: tuple[str, ...], message: str):
    assert message in refused(*arguments)


def test_processes_end_as_told(refused_process, work: Path, artifact: Path):
    assert "there is no target 'cpu-int9'" in refused_process("compile", "model.onnx", "-t", "cpu-int9")
    assert "there is no pass 'qdqq'" in refused_process(*COMPILE, "--passes", "qdqq")
    assert "'qdq' has no option 'x'" in refused_process(*COMPILE, "--set", "qdq.x=1")
    assert "/proc/a cannot be written: " in refused_process(*COMPILE, "-o", "/proc/a")
    assert "exists. Pass --force" in refused_process(*COMPILE, "-o", artifact)
    np.savez(work / "calib.npz", X=np.zeros((8, 64), np.float32))
    assert "has no array for input 'x' (it has: 'X')" in refused_process(*COMPILE)
    (work / "model.onnx").write_bytes((work / "model.onnx").read_bytes()[:5000])
    assert "model.onnx is not a valid ONNX model" in refused_process(*COMPILE)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": (8, 64)}, "has no array for input 'x' (it has: 'X')"),
        ({"x": (8, 65)}, "'x'"),
        ({"x": (8, 64, 2)}, "'x'"),
        ({"x": (0, 64)}, "calib"),
        ({}, "'x'"),
    ],
)
def test_calibration_arrays_that_do_not_fit(refused, work: Path, arrays: dict, message: str):
    np.savez(work / "calib.npz", **{name: np.zeros(shape, np.float32) for name, shape in arrays.items()})
    line = refused(*COMPILE)
    assert "calib.npz" in line
    assert message in line


@pytest.mark.parametrize("dtype", [np.int64, "U3", object])
def test_calibration_of_another_type(refused, work: Path, dtype):
    np.savez(work / "calib.npz", x=np.zeros((8, 64)).astype(dtype))
    assert "calib.npz" in refused(*COMPILE)


@pytest.mark.parametrize(
    "source", ["none.npz", "model.onnx", "no.such.module:feeds", "json:feeds", "json:loads", "empty", "text.txt"]
)
def test_calibration_that_is_none(refused, work: Path, source: str):
    (work / "empty").mkdir()
    (work / "text.txt").write_text("a line\n")
    line = refused("compile", "model.onnx", "-t", "cpu-int8", "--calib", source)
    assert source.partition(":")[0] in line


def test_calibration_code_that_fails(refused, work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    late = "def late():\n    yield {'x': np.zeros((1, 64), np.float32)}\n    1 / 0\n"
    (work / "failing_feeds.py").write_text(f"import numpy as np\n{late}def once():\n    1 / 0\n")
    for name in ("late", "once"):
        line = refused("compile", "model.onnx", "-t", "cpu-int8", "--calib", f"failing_feeds:{name}")
        assert line == f"failing_feeds:{name} failed: ZeroDivisionError: division by zero"


def test_folders_made_for_the_output_go_again(refused, work: Path):
    np.savez(work / "calib.npz", X=np.zeros((8, 64), np.float32))
    assert "calib.npz" in refused(*COMPILE, "-o", "new/folder/artifact")


def test_a_renamed_array_needs_the_right_names(refused, work: Path):
    np.savez(work / "calib.npz", data=np.zeros((8, 64), np.float32))
    assert "data" in refused(*COMPILE, "--map", "dada=x")
    assert "'--map': 'x' is not written NAME=INPUT" in refused(*COMPILE, "--map", "x")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100, b"PK\x03\x04", b"{}"])
def test_a_file_that_is_no_model(refused, work: Path, content: bytes):
    (work / "model.onnx").write_bytes(content)
    assert refused(*COMPILE).startswith("model.onnx is ")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_model(refused, work: Path, share: float):
    whole = (work / "model.onnx").read_bytes()
    (work / "model.onnx").write_bytes(whole[: int(len(whole) * share)])
    assert "model.onnx" in refused(*COMPILE)


@pytest.mark.parametrize("location", ["gone.data", "../escaped.data", "{absolute}", "sub/../../escaped.data"])
def test_external_data_that_are_missing_or_leave_the_folder(refused, work: Path, location: str):
    (work.parent / "escaped.data").write_bytes(b"\x00" * (64 * 256 * 4))
    model = onnx.load(work / "model.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location.format(absolute=work.parent / "escaped.data"))
    (work / "model.onnx").write_bytes(model.SerializeToString())
    line = refused(*COMPILE)
    assert "'w1'" in line
    assert ("missing" in line) == (location == "gone.data")


def test_an_output_that_cannot_be_written(refused):
    assert "calib.npz/a" in refused(*COMPILE, "-o", "calib.npz/a")
    assert "/proc/a cannot be written: " in refused(*COMPILE, "-o", "/proc/a")
    assert "calib.npz" in refused("run", "none", "-i", "calib.npz", "-o", "calib.npz")


def test_an_output_that_exists(refused, work: Path, artifact: Path):
    (work / "a").mkdir()
    (work / "a" / "diary.txt").write_text("mine")
    assert refused(*COMPILE, "-o", "a") == "a exists. Pass --force to replace it, or another folder with -o."
    assert "a exists and is no qgraph artifact" in refused(*COMPILE, "-o", "a", "--force")
    line = refused("run", artifact, "-i", "calib.npz", "-o", "calib.npz")
    assert line == "calib.npz exists. Pass --force to replace it, or another file with -o."


def test_a_disk_that_fills_up(refused_process):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    line = refused_process("compile", "model.onnx", "-t", "cpu-fp32", preexec_fn=small_files)
    assert line == "model.cpu-fp32/model.onnx cannot be written: File too large. Nothing was left behind."


def test_a_full_standard_output(work: Path):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-P", "-m", "qgraph", "targets", "--json", "--quiet"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_an_artifact_that_was_changed(refused, work: Path, artifact: Path):
    for path in artifact.iterdir():
        (work / path.name).write_bytes(path.read_bytes())
    with (work / "model.onnx").open("ab") as file:
        file.write(b"\x00")
    for verb in (("verify", "."), ("bench", "."), ("inspect", "."), ("run", ".", "-i", "calib.npz")):
        assert "model.onnx was changed after it was compiled (its hash differs)" in refused(*verb)


def test_run_refuses_samples_that_do_not_fit(refused, work: Path, artifact: Path):
    np.savez(work / "x.npz", x=np.zeros((8, 65), np.float32))
    line = refused("run", artifact, "-i", "x.npz", "-o", "y.npz")
    assert "x.npz" in line
    assert "65" in line


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_signals_leave_nothing_behind(work: Path, number: signal.Signals, status: int, said: str):
    (work / "slow.py").write_text(
        "import pathlib, time, numpy as np\n"
        "def feeds():\n"
        "    while True:\n"
        "        yield {'x': np.zeros((1, 64), np.float32)}\n"
        "        pathlib.Path('reading').touch()\n"
        "        time.sleep(0.05)\n"
    )
    before = contents(work)
    child = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "qgraph",
            "compile",
            "model.onnx",
            "-t",
            "cpu-int8",
            "--calib",
            "slow:feeds",
            "-q",
        ],
        cwd=work,
        env={**os.environ, "PYTHONPATH": on_path(work), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background of a shell has SIGINT ignored, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (work / "reading").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out, err) == (status, "", said)
    (work / "reading").unlink()
    assert contents(work) == before
