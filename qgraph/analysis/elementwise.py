"""Operators that work on each element alone, and the values of functions that are made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["ELEMENTWISE", "evaluate"]

ELEMENTWISE = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid",
    "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mod",
    "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
})  # fmt: skip
"""Operators whose every output element is a function of the input elements at its place."""


def evaluate(
    nodes: Sequence[ir.Node], source: ir.Value, result: ir.Value, points: np.ndarray, opset: int
) -> np.ndarray:
    """Return the values of a function of one tensor at given points, as ONNX Runtime computes it in float32.

    Args:
        nodes: of the graph, in topological order, all in `ELEMENTWISE`; what else they read are constants of one
            element.
        source: the tensor that the function is of.
        result: one of the outputs of `nodes`.
        points: float32, (n,).
        opset: the default-domain opset that the nodes are written in.

    Returns:
        (n,), of the type of `result`.
    """
    import onnxruntime

    start = ir.Value(name="points", shape=ir.Shape([len(points)]), type=ir.TensorType(ir.DataType.FLOAT))
    copies: dict[ir.Value, ir.Value] = {source: start}
    initializers: dict[ir.Value, ir.Value] = {}
    made: list[ir.Node] = []
    for number, node in enumerate(nodes):
        inputs = [None if one is None else copies.get(one) or _stored(one, initializers) for one in node.inputs]
        copy = ir.node(node.op_type, inputs, dict(node.attributes))
        for index, (before, after) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            after.name, after.type = f"value_{number}_{index}", before.type
            copies[before] = after
        made.append(copy)
    output = copies[result]
    output.shape = ir.Shape([len(points)])
    output.type = output.type or ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([start], [output], nodes=made, initializers=list(initializers.values()), opset_imports={"": opset})
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with np.errstate(all="ignore"):
        return np.asarray(session.run(None, {"points": np.asarray(points, np.float32)})[0]).reshape(-1)


def _stored(value: ir.Value, initializers: dict[ir.Value, ir.Value]) -> ir.Value:
    if value not in initializers:
        tensor = value.const_value
        if tensor is None:
            tensor = ir.convenience.get_const_tensor(value)
        if tensor is None:
            raise ValueError(f"'{value.name}' is not constant")
        name = f"constant_{len(initializers)}"
        copy = ir.tensor(np.asarray(tensor.numpy()), name=name)
        shape = ir.Shape(copy.shape.numpy())
        initializers[value] = ir.Value(name=name, shape=shape, type=ir.TensorType(copy.dtype), const_value=copy)
    return initializers[value]
