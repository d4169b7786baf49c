"""`decompose-operators` against numpy, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session

X = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
MATRIX, SQUARE = X[:, :, 0], X[0, :, :4]


def single(op_type: str, inputs: list[Any], shapes: dict[int, list[Any]], outputs: int = 1, **attributes: Any):
    """Return a model of one node; inputs at places that `shapes` names are inputs of the model, others constants."""
    names = [f"x{place}" for place in range(len(inputs))]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op_type, names, [f"y{place}" for place in range(outputs)], **attributes)],
        "g",
        [onnx.helper.make_tensor_value_info(names[place], 1, shape) for place, shape in shapes.items()],
        [onnx.helper.make_tensor_value_info(f"y{place}", 1 if place == 0 else 9, None) for place in range(outputs)],
        [onnx.numpy_helper.from_array(np.asarray(array), names[place]) for place, array in enumerate(inputs)
         if place not in shapes],
    )  # fmt: skip
    imports = [onnx.helper.make_opsetid("", 21)]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def assert_is(expected: np.ndarray, op_type: str, *inputs: np.ndarray, known: tuple[int, ...] = (), **attributes: Any):
    """Rewrite a node and compare with what is expected; inputs at the places `known` are constants."""
    shapes = {place: list(array.shape) for place, array in enumerate(inputs) if place not in known}
    model = single(op_type, list(inputs), shapes, **attributes)
    assert Pipeline.parse("decompose-operators").run(model).changed == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert op_type not in {node.op_type for node in model.graph} - {"MatMul"}
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1, optimise=False)
    (found,) = session.run(None, {f"x{place}": inputs[place] for place in shapes})
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert Pipeline.parse("decompose-operators").run(model).changed == 0


def test_sums_and_means():
    for count in (1, 2, 3):
        arrays = [X, X[0] * 2, X[:1, :, :1]][:count]
        total = sum(arrays[1:], arrays[0])
        assert_is(total, "Sum", *arrays)
        assert_is(total / count, "Mean", *arrays)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_products(size: int, keepdims: int):
    x = np.random.default_rng(size).uniform(0.5, 1.5, (2, size, 3)).astype(np.float32)
    for axes in ([1], [-1, 1], None):
        inputs = [x] if axes is None else [x, np.array(axes, np.int64)]
        expected = np.prod(x, axis=None if axes is None else tuple(axes), keepdims=bool(keepdims))
        assert_is(np.asarray(expected), "ReduceProd", *inputs, known=(1,), keepdims=keepdims)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_where_the_largest_is(axis: int):
    x = np.round(X * 2) / 2  # with equal ones, of which the first counts
    first = np.argmax(x, axis=axis)
    expected = np.moveaxis(np.eye(x.shape[axis])[first], -1, axis)
    assert_is(expected, "Hardmax", x, axis=axis)


def test_products_with_vectors():
    vector = X[0, 0]
    for known in ((), (0,), (1,)):
        assert_is(X @ vector, "MatMul", X, vector, known=known)
        assert_is(X[0, :, 0] @ X, "MatMul", X[0, :, 0], X, known=known)
        assert_is(np.asarray(vector @ vector), "MatMul", vector, vector, known=known)


@pytest.mark.parametrize("flags", [{}, {"transA": 1}, {"transB": 1}, {"transA": 1, "transB": 1}])
def test_gemm_of_two_tensors(flags: dict[str, int]):
    a, b = X[0, :3, :4], X[1, :4, :5]
    expected = 0.5 * (a @ b)
    factors = [one.T.copy() if flip in flags else one for one, flip in ((a, "transA"), (b, "transB"))]
    assert_is(expected, "Gemm", *factors, alpha=0.5, **flags)
    for addend in (X[2, :3, :5], X[2, :3, :1], X[2, 0], X[2, :1]):
        assert_is(expected - 2 * addend, "Gemm", *factors, addend, alpha=0.5, beta=-2.0, **flags)
        assert_is(expected - 2 * addend, "Gemm", *factors, addend, known=(2,), alpha=0.5, beta=-2.0, **flags)


def test_gemm_that_is_more_than_a_layer():
    a, b = X[0, :3, :4], X[1, :4, :5]
    assert_is(a @ b + X[2, :3, :1], "Gemm", a, b, X[2, :3, :1], known=(1, 2))
    assert_is(a @ b + X[2, :3, :5], "Gemm", a, b, X[2, :3, :5], known=(1,))
    assert_is(a @ b, "Gemm", a.T.copy(), b, known=(1,), transA=1)


def test_dropout_at_inference():
    assert_is(X, "Dropout", X)
    assert_is(X, "Dropout", X, np.float32(0.3), np.array(False), known=(1, 2))


AXES = np.array([1], np.int64)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (single("Dropout", [X], {0: [3]}, outputs=2), "mask is read"),
        (single("Dropout", [X, np.float32(0.3), np.array(True)], {0: [3]}), "training mode"),
        (single("ReduceProd", [X, AXES], {0: [3, "n"]}), "not known"),
        (single("ReduceProd", [X, AXES], {0: [3, 0]}), "multiplies nothing"),
        (single("ReduceProd", [X], {0: [3, 4]}, noop_with_empty_axes=1), "may reduce nothing"),
        (single("Hardmax", [X], {0: [3, "n"]}), "not known"),
        (single("MatMul", [X, X], {0: ["n"], 1: None}), "rank of a factor"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_stays(model: ir.Model, reason: str):
    before = ir.to_onnx_text(model)
    report = Pipeline.parse("decompose-operators").run(model)
    assert report.changed == 0
    assert reason in report.parts[0].skipped[0].reason
    assert ir.to_onnx_text(model) == before


def test_what_is_plain_is_not_told():
    for model in (
        single("MatMul", [X, X], {0: [3, 4], 1: [4, 3]}),
        single("Gemm", [MATRIX, SQUARE, SQUARE[0]], {0: [3, 4]}),
        single("Gemm", [MATRIX, SQUARE, SQUARE[:1]], {0: [3, 4]}),
    ):
        report = Pipeline.parse("decompose-operators").run(model)
        assert (report.changed, report.skipped) == (0, ())
