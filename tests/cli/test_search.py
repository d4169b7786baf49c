"""The search from the command line: what it shows, how it ends, and what of it is wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
SEARCH = ("compile", "model.onnx", "-t", "cpu-int8", "--calib", "calib.npz", "--passes", "qdq", "--jobs", "1")


def test_the_ladder_is_printed_as_it_is_climbed(qgraph: Run, work: Path):
    done = qgraph(*SEARCH, "--tolerance", "sqnr=60", "--json")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("search ")]
    assert "as the target does it" in lines[0]
    assert any("activation ranges" in line for line in lines)
    document = json.loads(done.stdout)
    assert document["verified"]
    chosen = [one for one in document["bench"]["search"] if one["chosen"]]
    assert len(chosen) == 1
    assert len(document["bench"]["search"]) == len(lines)
    again = qgraph(*SEARCH[:6], "--recipe", "model.cpu-int8/recipe.toml", "--tolerance", "sqnr=60", "-o", "again")
    assert again.returncode == 0, again.stderr
    assert "search " not in again.stderr
    for name in ("model.onnx", "manifest.json", "recipe.toml"):
        assert (work / "again" / name).read_bytes() == (work / "model.cpu-int8" / name).read_bytes()


def test_a_tolerance_that_cannot_be_met_is_status_3(qgraph: Run, work: Path):
    done = qgraph(*SEARCH[:6], "--passes", "to-fp16", "--tolerance", "sqnr=150", "--jobs", "1")
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: model.cpu-int8 is outside the tolerance: SQNR is ")
    assert last.endswith("It is kept, marked unverified.")
    assert (work / "model.cpu-int8" / "manifest.json").is_file()


def test_what_a_measure_prints_is_no_part_of_the_document(qgraph: Run, work: Path):
    (work / "loud.py").write_text("print('loaded')\ndef loud(session):\n    print('measured')\n    return 1.0\n")
    done = qgraph(*SEARCH, "--eval", "loud:loud", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"]
    assert {"loaded", "measured"} <= set(done.stderr.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tolerance", "eval=0.1"), "name it with --eval MODULE:FUNCTION"),
        (("--tolerance", "eval=0.1", "--eval", "mine:missing"), "mine:missing cannot be loaded: module 'mine' has no"),
        (("--tolerance", "eval=0.1", "--eval", "mine:raises"), "--eval mine:raises failed: KeyError: 'scores'"),
        (("--tolerance", "eval=0.1", "--eval", "mine:nan"), "--eval mine:nan returned nan"),
        (("--tolerance", "eval=0.1", "--eval", "mine:two"), "--eval mine:two must take one argument, a session"),
        (("--budget", "sise=1MB"), "there is no budget 'sise'. Did you mean 'size'?"),
        (
            ("--budget", "size=1MB", "--executor", "rey://local"),
            "there is no executor 'rey://local'. Did you mean 'ray",
        ),
    ],
)
def test_wrong_input_is_one_line(qgraph: Run, work: Path, arguments: tuple[str, ...], message: str):
    (work / "mine.py").write_text(
        "def raises(session):\n    return {}['scores']\n"
        "def nan(session):\n    return float('nan')\n"
        "def two(session, other):\n    return 1.0\n"
    )
    before = sorted(path.name for path in work.iterdir() if path.name != "__pycache__")
    done = qgraph(*SEARCH, *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert sorted(path.name for path in work.iterdir() if path.name != "__pycache__") == before


def test_ctrl_c_keeps_the_best_so_far(work: Path):
    (work / "slow.py").write_text(
        "import pathlib, time\n"
        "def measure(session):\n"
        "    seen = pathlib.Path('seen')\n"
        "    count = int(seen.read_text()) if seen.exists() else 0\n"
        "    seen.write_text(str(count + 1))\n"
        "    time.sleep(60 if count > 1 else 0)\n"  # the source and the first candidate are quick
        "    return -float(count)\n"
    )
    command = [sys.executable, "-P", "-m", "qgraph", *SEARCH, "--tolerance", "eval=0.1", "--eval", "slow:measure"]
    process = subprocess.Popen(
        command,
        cwd=work,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        # A process that is started in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen, deadline = work / "seen", time.monotonic() + 120
    while not (seen.exists() and seen.read_text() == "3") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"
    manifest = json.loads((work / "model.cpu-int8" / "manifest.json").read_text())
    assert manifest["pipeline"]["compress"] == "qdq"
    assert not manifest["verified"]
    assert not list(work.glob(".*")) + list(work.glob("*.work"))
