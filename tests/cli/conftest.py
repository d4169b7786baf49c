"""A small model with data, and the command as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def _layers() -> ir.Model:
    """x [N, 64] -> MatMul, Relu, MatMul -> scores [N, 10]."""
    random = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 64]))
    weights = [
        ir.Value(name=name, const_value=ir.tensor(random.normal(0, 0.1, shape).astype(np.float32), name=name))
        for name, shape in (("w1", (64, 256)), ("w2", (256, 10)))
    ]
    hidden = ir.node("MatMul", [x, weights[0]], name="first")
    active = ir.node("Relu", [hidden.outputs[0]], name="relu")
    scores = ir.node("MatMul", [active.outputs[0], weights[1]], name="second")
    out = scores.outputs[0]
    out.name, out.type, out.shape = "scores", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", 10])
    graph = ir.Graph(
        [x], [out], nodes=[hidden, active, scores], initializers=weights, opset_imports={"": 17}, name="layers"
    )
    return ir.Model(graph, ir_version=8, producer_name="tests")


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write model.onnx and calib.npz once: 40 samples, labelled with what the model says."""
    folder = tmp_path_factory.mktemp("originals")
    model = _layers()
    ir.save(model, folder / "model.onnx")
    x = np.random.default_rng(1).normal(size=(40, 64)).astype(np.float32)
    w1, w2 = (model.graph.initializers[name].const_value.numpy() for name in ("w1", "w2"))
    np.savez(folder / "calib.npz", x=x, labels=np.argmax(np.maximum(x @ w1, 0) @ w2, axis=1))
    return folder


@pytest.fixture
def work(originals: Path, tmp_path: Path) -> Path:
    """Return a folder with copies of model.onnx and calib.npz."""
    for path in originals.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def qgraph(work: Path) -> Run:
    """Return a function that runs the command in the folder, as a process of its own."""

    def run(*arguments: str | Path, **settings) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "qgraph", *map(str, arguments)]
        return subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300, **settings)

    return run


@pytest.fixture(scope="session")
def artifact(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the model once; tests must not change the artifact."""
    folder = tmp_path_factory.mktemp("artifact")
    command = [sys.executable, "-P", "-m", "qgraph", "compile", originals / "model.onnx", "-t", "cpu-int8", "--quiet"]
    options = ["--calib", originals / "calib.npz", "--passes", "dynamic-int8", "-o", folder / "a"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return folder / "a"
