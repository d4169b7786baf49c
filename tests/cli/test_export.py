"""The verbs `export` and `eval` as a user types them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qgraph import cli
from qgraph.artifact import open_artifact

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from hugging_face import DEFAULTS, folder, random_weights

Run = Callable[..., subprocess.CompletedProcess[str]]
LLAMA = DEFAULTS | {"model_type": "llama", "vocab_size": 256}


@pytest.fixture
def checkpoint(work: Path) -> Path:
    return folder(work / "small", LLAMA, random_weights(LLAMA))


@pytest.mark.parametrize("verb", [["export"], ["eval"], ["eval", "perplexity"]])
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: list[str]):
    assert cli.main([*verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: qgraph {' '.join(verb)} ")


def test_export_compile_and_score(qgraph: Run, work: Path, checkpoint: Path):
    done = qgraph("export", "small", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("export           llama   ")
    told = json.loads(done.stdout)
    assert (Path(told["path"]).name, told["cache"]) == ("small.onnx", True)
    (work / "text.txt").write_text("Something to read, again and again. " * 30)
    text = ("--tokenizer", "bytes", "--window", "32")
    done = qgraph("compile", "small.onnx", "-t", "cpu-fp32", "--calib", "text.txt", *text, "-o", "a", "--quiet")
    assert done.returncode == 0, done.stderr
    scores = []
    for model in ("small.onnx", "a"):
        done = qgraph("eval", "perplexity", model, "--text", "text.txt", *text, "--stride", "16", "--json")
        assert done.returncode == 0, done.stderr
        assert "nats per token" in done.stderr
        scores.append(json.loads(done.stdout)["nats"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_an_artifact_of_few_bits_continues_a_text(work: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(work)
    assert cli.main(["export", "small", "-o", "m.onnx", "-q"]) == 0
    assert cli.main(["compile", "m.onnx", "-t", "cpu-int4", "-o", "a", "-q"]) == 0
    run = open_artifact(work / "a").session(threads=1)
    ids = np.random.default_rng(0).integers(0, 256, (1, 9))
    cache = {
        f"past_key_values.{i}.{kind}": np.zeros((1, 2, 0, 8), np.float32) for i in (0, 1) for kind in ("key", "value")
    }
    (whole,) = run.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache})
    pieces = []
    for step in range(9):
        feeds = {"input_ids": ids[:, step : step + 1], "attention_mask": np.ones((1, step + 1), np.int64), **cache}
        logits, *present = run.run(None, feeds)
        pieces.append(logits)
        cache = dict(zip(cache, present, strict=True))
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=0.02 * np.abs(whole).max())


def test_what_is_refused(
    work: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(work)
    assert cli.main(["export", "small", "-o", "m.onnx"]) == 0
    assert cli.main(["export", "small", "-o", "m.onnx", "--force", "--no-cache", "--dtype", "float16", "-q"]) == 0
    capsys.readouterr()
    (work / "text.txt").write_text("x")
    for arguments, message in (
        (("export", "small", "-o", "m.onnx"), "m.onnx exists. Pass --force to replace it"),
        (("export", "nowhere"), "nowhere is no folder"),
        (("export", "model.onnx", "-o", "n.onnx"), "model.onnx is no folder"),
        (("eval", "perplexity", "m.onnx", "--text", "no.txt", "--tokenizer", "bytes"), "no.txt cannot be read"),
        (("eval", "perplexity", "m.onnx", "--text", "text.txt", "--tokenizer", "bytes"), "fewer than two tokens"),
        (("eval", "perplexity", "m.onnx", "--text", "text.txt", "--tokenizer", "text.txt"), "is no tokenizer.json"),
        (("eval", "perplexity", "model.onnx", "--text", "text.txt", "--tokenizer", "bytes"), "text cannot fill input"),
        (("eval", "perplexities"), "Did you mean 'perplexity'?"),
    ):
        assert cli.main(list(arguments)) == 2, arguments
        told = capsys.readouterr().err
        assert message in told
        assert len(told.splitlines()) == 1


def test_a_full_disk_and_a_kill_leave_nothing(work: Path):
    config = LLAMA | {"hidden_size": 1024, "head_dim": 256, "intermediate_size": 4096, "num_hidden_layers": 3}
    tensors = random_weights(config | {"num_hidden_layers": 0}) | {
        f"model.layers.{index}.{name}.weight": np.zeros(shape, np.float32)
        for index in range(3)
        for name, shape in (
            ("self_attn.q_proj", (1024, 1024)),
            ("self_attn.k_proj", (512, 1024)),
            ("self_attn.v_proj", (512, 1024)),
            ("self_attn.o_proj", (1024, 1024)),
            ("mlp.gate_proj", (4096, 1024)),
            ("mlp.up_proj", (4096, 1024)),
            ("mlp.down_proj", (1024, 4096)),
            ("input_layernorm", (1024,)),
            ("post_attention_layernorm", (1024,)),
        )
    }
    folder(work / "hf", config, tensors)
    command = [sys.executable, "-P", "-m", "qgraph", "export", "hf", "-o", "m.onnx"]

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))

    done = subprocess.run(command, cwd=work, preexec_fn=full, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: m.onnx cannot be written: File too large")
    assert not [path.name for path in work.iterdir() if "m.onnx" in path.name]
    child = subprocess.Popen(command, cwd=work, stderr=subprocess.DEVNULL)
    while child.poll() is None and not [path for path in work.glob(".m.onnx*") if path.stat().st_size > 1_000_000]:
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 143
    assert not [path.name for path in work.iterdir() if "m.onnx" in path.name]


def test_what_a_killed_run_left_is_removed_by_the_next(work: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(work)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    old = time.time() - 3600
    kept = [f".m.onnx.{os.getpid()}.other", f".m.onnx.{os.getppid()}.tmp", ".n.onnx.1.tmp", ".m.onnx.mine.tmp"]
    for name in (f".m.onnx.{gone.pid}.tmp", *kept):
        (work / name).write_bytes(b"half")
        os.utime(work / name, (old, old))
    assert cli.main(["export", "small", "-o", "m.onnx", "-q"]) == 0
    assert sorted(path.name for path in work.glob(".*")) == sorted(kept)
    (work / f".m.onnx.{gone.pid}.tmp").write_bytes(b"somebody writes, on another machine")
    assert cli.main(["export", "small", "-o", "m.onnx", "-q", "--force"]) == 0
    assert (work / f".m.onnx.{gone.pid}.tmp").exists()
