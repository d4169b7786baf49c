"""A compilation that is stopped goes on with --resume, and writes the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.compiler import compile as compile_model
from qgraph.pipeline import Context

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 64] x, float[64, 64] a, float[64, 64] b, float[64, 64] c) => (float[n, 64] y)
{
    one = MatMul (x, a)
    two = MatMul (one, b)
    y = MatMul (two, c)
}"""


def write_model(path: Path) -> None:
    model = ir.from_onnx_text(TEXT)
    for number, value in enumerate(list(model.graph.inputs)[1:]):
        array = np.random.default_rng(number).normal(size=(64, 64)).astype(np.float32) / 8
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    qgraph.ir.save(model, path)


def test_a_stopped_compilation_goes_on(tmp_path: Path) -> None:
    write_model(tmp_path / "m.onnx")
    feeds = [{"x": np.random.default_rng(seed).normal(size=(80, 64)).astype(np.float32)} for seed in range(5)]

    def compiled(name: str, *, resume: bool = False, stop_at: float = 2.0) -> Path:
        def progress(step: str, done: int, total: int) -> None:
            if step == "gptq" and done > stop_at * total:
                raise KeyboardInterrupt

        artifact = compile_model(
            tmp_path / "m.onnx",
            "cpu-int4",
            output=tmp_path / name,
            calibration=feeds,
            passes="gptq{bits=4}",
            context=Context(threads=1, progress=progress),
            resume=resume,
        )
        return artifact.path

    whole = compiled("whole")
    assert not (tmp_path / "whole.work").exists()
    with pytest.raises(KeyboardInterrupt):
        compiled("other", stop_at=0.7)
    kept = list((tmp_path / "other.work").iterdir())
    assert 0 < len(kept) < 3
    assert {path.suffix for path in kept} == {".npz"}
    assert not (tmp_path / "other").exists()
    other = compiled("other", resume=True)
    assert not (tmp_path / "other.work").exists()
    for name in ("model.onnx", "manifest.json"):
        assert (other / name).read_bytes() == (whole / name).read_bytes()
