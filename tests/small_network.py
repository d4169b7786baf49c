"""A network with something for every target: a convolution, a wide product, and scores; and samples for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

import qgraph.ir

SIDE, CHANNELS, WIDTH, CLASSES, SAMPLES = 8, 16, 32, 10, 20


def write(folder: Path) -> tuple[Path, Path]:
    """Write net.onnx, image [n, 4, 8, 8] -> scores [n, 10], and samples.npz; return both."""
    random = np.random.default_rng(11)

    def weight(name: str, *shape: int) -> ir.Value:
        array = (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        return ir.Value(name=name, const_value=ir.tensor(array, name=name))

    image = ir.Value(name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4, SIDE, SIDE]))
    kernel, inner, outer = (
        weight("kernel", CHANNELS, 4, 3, 3), weight("inner", CHANNELS * 4, WIDTH), weight("outer", WIDTH, CLASSES)
    )  # fmt: skip
    conv = ir.node("Conv", [image, kernel], {"strides": [2, 2], "pads": [1, 1, 1, 1]}, name="conv")
    relu = ir.node("Relu", conv.outputs, name="relu")
    pool = ir.node("AveragePool", relu.outputs, {"kernel_shape": [2, 2], "strides": [2, 2]}, name="pool")
    flat = ir.node("Flatten", pool.outputs, name="flat")
    hidden = ir.node("MatMul", [flat.outputs[0], inner], name="hidden")
    active = ir.node("Relu", hidden.outputs, name="active")
    last = ir.node("MatMul", [active.outputs[0], outer], name="last")
    scores = last.outputs[0]
    scores.name, scores.type, scores.shape = "scores", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", CLASSES])
    nodes, weights = [conv, relu, pool, flat, hidden, active, last], [kernel, inner, outer]
    graph = ir.Graph([image], [scores], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="net")
    qgraph.ir.save(ir.Model(graph, ir_version=10), folder / "net.onnx")
    samples = random.standard_normal((SAMPLES, 4, SIDE, SIDE)).astype(np.float32)
    np.savez(folder / "samples.npz", image=samples)
    return folder / "net.onnx", folder / "samples.npz"
