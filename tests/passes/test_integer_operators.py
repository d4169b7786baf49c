"""Operators that reach integers by way of others: the whole way from one float operator to the integer graph.

What the integer graph gives is held against numpy in float64, written from the operator's definition, within the
stated share of the largest result; the reference executor and ONNX Runtime must agree to the bit. Where results are
truth values, whole numbers or moved elements, they are held against numpy on what the quantized inputs stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from integer_compilation import assert_reference_agrees

from qgraph.errors import UserError
from qgraph.passes.integer_requantize import BOUNDARY_KEY
from qgraph.pipeline import Context, Pipeline
from qgraph.targets.integer import Integer

Arrays = list[np.ndarray]
Reference = Callable[..., np.ndarray | tuple[np.ndarray, ...]]
IMAGE, ROWS = (2, 4, 6, 6), (2, 5, 8)


class Case(NamedTuple):
    """An operator, its inputs (a shape for one of the model, an array for a constant), and numpy's definition of it."""

    op_type: str
    inputs: tuple[Any, ...]
    reference: Reference
    attributes: Mapping[str, Any] = {}
    bound: float = 0.02
    low: float = -2.0
    outputs: tuple[int, ...] = (1,)

    def model(self) -> ir.Model:
        names = [f"x{place}" for place in range(len(self.inputs))]
        given = list(zip(names, self.inputs, strict=True))
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(self.op_type, names, [f"y{place}" for place in range(len(self.outputs))],
                                   **self.attributes)],
            "one",
            [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in given if isinstance(shape, tuple)],
            [onnx.helper.make_empty_tensor_value_info(f"y{place}") for place in range(len(self.outputs))],
            [onnx.numpy_helper.from_array(one, name) for name, one in given if isinstance(one, np.ndarray)],
        )  # fmt: skip
        imports = [onnx.helper.make_opsetid("", 21)]
        proto = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10))
        return ir.from_proto(proto)

    def feeds(self, seed: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {f"x{place}": random.uniform(self.low, 2.0, shape).astype(np.float32)
                for place, shape in enumerate(self.inputs) if isinstance(shape, tuple)}  # fmt: skip

    def expected(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        arrays = [feeds.get(f"x{place}", one) for place, one in enumerate(self.inputs)]
        result = self.reference(*(np.asarray(one, np.float64 if one.dtype == np.float32 else None) for one in arrays))
        return [np.asarray(one) for one in (result if isinstance(result, tuple) else (result,))]


def i64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def windows(x: np.ndarray, size: int, step: int) -> np.ndarray:
    """Return [n, c, i, j, elements]: the windows of images that lie inside."""
    found = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::step, ::step]
    return found.reshape(*found.shape[:4], -1)


def local_response(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, [(0, 0), (1, 1), (0, 0), (0, 0)])
    squares = sum(padded[:, place : place + x.shape[1]] ** 2 for place in range(3))
    return x / (1 + 0.5 / 3 * squares) ** 0.75


def ceiled_average(x: np.ndarray) -> np.ndarray:
    """Average windows of 4 x 4 in steps of 4: of 6 elements, the second has two."""
    parts = [x[:, :, i : i + 4, j : j + 4].mean(axis=(2, 3)) for i in (0, 4) for j in (0, 4)]
    return np.stack(parts, axis=-1).reshape(*x.shape[:2], 2, 2)


def bilinear(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    result = np.zeros((*x.shape[:2], *grid.shape[1:3]))
    across, down = (((grid[..., axis] + 1) * size - 1) / 2 for axis, size in ((0, x.shape[3]), (1, x.shape[2])))
    for i, j in np.ndindex(x.shape[2:]):
        weight = np.maximum(1 - np.abs(down - i), 0) * np.maximum(1 - np.abs(across - j), 0)
        result += weight[:, None] * x[:, :, i, j, None, None]
    return result


CASES = {
    "Sum": Case("Sum", (ROWS, ROWS, normal(8)), lambda a, b, c: a + b + c),
    "Mean": Case("Mean", (ROWS, ROWS, ROWS), lambda a, b, c: (a + b + c) / 3),
    "Einsum": Case("Einsum", (ROWS, (2, 3, 8)), lambda a, b: np.einsum("bik,bjk->bij", a, b),
                   {"equation": "bik,bjk->bij"}),
    "Einsum and weights": Case("Einsum", ((2, 5, 2, 4), normal(2, 4, 6)), lambda a, b: np.einsum("bshd,hde->bse", a, b),
                               {"equation": "bshd,hde->bse"}),
    "Einsum of one": Case("Einsum", (ROWS,), lambda a: a.sum(axis=1), {"equation": "bij->bj"}),
    "MatMul with a vector": Case("MatMul", (ROWS, (8,)), lambda a, b: a @ b),
    "MatMul with constants": Case("MatMul", (ROWS, normal(8)), lambda a, b: a @ b),
    "MatMul of a vector": Case("MatMul", (normal(5), ROWS), lambda a, b: a @ b),
    "Gemm of two": Case("Gemm", ((8, 5), (8, 6), (5, 1)), lambda a, b, c: 0.5 * (a.T @ b) + c,
                        {"transA": 1, "alpha": 0.5}),
    "Gemm and a matrix": Case("Gemm", ((5, 8), normal(8, 6), normal(5, 6)), lambda a, b, c: a @ b + c),
    "Hardmax": Case("Hardmax", (ROWS,), lambda x: np.eye(x.shape[1])[x.argmax(axis=1)].swapaxes(1, 2), {"axis": 1}),
    "ReduceProd": Case("ReduceProd", (ROWS, i64(1)), lambda x, _: x.prod(axis=1, keepdims=True)),
    "ReduceLogSum": Case("ReduceLogSum", (ROWS, i64(2)), lambda x, _: np.log(x.sum(axis=2, keepdims=True)), low=0.1),
    "LRN": Case("LRN", (IMAGE,), local_response, {"size": 3, "alpha": 0.5}),
    "LpPool": Case("LpPool", (IMAGE,), lambda x: np.sqrt((windows(x, 2, 2) ** 2).sum(-1)),
                   {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "LpPool of order 3": Case("LpPool", (IMAGE,), lambda x: np.cbrt((np.abs(windows(x, 3, 1)) ** 3).sum(-1)),
                              {"kernel_shape": [3, 3], "p": 3}),
    "AveragePool ceil": Case("AveragePool", (IMAGE,), ceiled_average,
                             {"kernel_shape": [4, 4], "strides": [4, 4], "ceil_mode": 1}),
    "CumSum": Case("CumSum", (ROWS, np.array(1)), lambda x, _: np.cumsum(x, axis=1)),
    "CumSum from the end": Case("CumSum", (ROWS, np.array(-1)), lambda x, _: np.cumsum(x[..., ::-1], -1)[..., ::-1] - x,
                                {"reverse": 1, "exclusive": 1}),
    "GridSample": Case("GridSample", (IMAGE, (2, 3, 5, 2)), bilinear),
    "ScatterElements": Case("ScatterElements", (ROWS, np.full((2, 1, 8), -2), (2, 1, 8)),
                            lambda x, _, u: np.concatenate([x[:, :3], u, x[:, 4:]], axis=1), {"axis": 1}),
    "ScatterND": Case("ScatterND", (ROWS, i64(1).reshape(1, 1), (1, 5, 8)), lambda x, _, u: np.stack([x[0], u[0]])),
    "Dropout": Case("Dropout", (ROWS,), lambda x: x),
}  # fmt: skip
"""Within two hundredths of the largest result: activations have 8 bits where products read them."""


def compiled(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> ir.Model:
    target, context = Integer(), Context(threads=1)
    for pipeline in (target.prepare_passes(), Pipeline.parse("full-qdq"), target.lower_passes()):
        pipeline.run(model, calibration=samples, context=context)
    return model


def assert_all_integer(model: ir.Model) -> None:
    assert Integer().check(model) == []
    assert [node.metadata_props[BOUNDARY_KEY] for node in model.graph if BOUNDARY_KEY in node.metadata_props] == []
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("name", CASES)
def test_near_to_the_definition(name: str):
    case = CASES[name]
    feeds = [case.feeds(seed) for seed in range(8)]
    model = compiled(case.model(), feeds)
    assert_all_integer(model)
    for feed in feeds[:3]:
        for found, expected in zip(assert_reference_agrees(model, feed, name), case.expected(feed), strict=True):
            assert found.shape == expected.shape
            off = np.abs(found - expected)
            if name == "Hardmax":  # equal integers are told apart by their places alone
                assert (found.sum(axis=1).round() == 1).all()
                assert (off > 0.5).mean() < 0.05
                continue
            assert off.max() <= case.bound * np.abs(expected).max(), f"{name}: {off.max() / np.abs(expected).max():.4f}"


def rounded(model: ir.Model, feed: Mapping[str, np.ndarray]) -> Arrays:
    """Return what the integers that the inputs become stand for, in float64."""
    found = []
    for value in model.graph.inputs:
        (node,) = {use.node for use in value.uses()}
        scale, zero = (np.asarray(one.const_value.numpy(), np.float64) for one in node.inputs[1:])
        low, high = (-32768, 32767) if node.outputs[0].dtype is ir.DataType.INT16 else (0, 255)
        codes = np.clip(np.rint(feed[value.name] / np.float32(scale)) + zero, low, high)
        found.append((codes - zero) * scale)
    return found


COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "Equal": np.equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "Less": np.less,
    "LessOrEqual": np.less_equal,
}  # fmt: skip


@pytest.mark.parametrize("op_type", COMPARISONS)
@pytest.mark.parametrize("constant", [None, 0, 1])
def test_comparisons_are_exact(op_type: str, constant: int | None):
    limits = np.round(normal(8) * 4) / 4
    inputs: list[Any] = [ROWS, (5, 8)]
    if constant is not None:
        inputs[constant] = limits
    case = Case(op_type, tuple(inputs), COMPARISONS[op_type])
    feeds = [{key: np.round(one * 4) / 4 for key, one in case.feeds(seed).items()} for seed in range(8)]
    model = compiled(case.model(), feeds)
    assert_all_integer(model)
    for feed in feeds[:3]:
        arrays = rounded(model, feed)
        if constant is not None:
            arrays.insert(constant, limits.astype(np.float64))
        (found,) = assert_reference_agrees(model, feed)
        np.testing.assert_array_equal(found, COMPARISONS[op_type](*arrays))
        if op_type == "Equal" and constant is None:
            assert found.any()


@pytest.mark.parametrize(("axis", "largest"), [(1, 1), (-1, 0)])
def test_order_is_exact(axis: int, largest: int):
    case = Case("TopK", (ROWS, i64(3)), np.sort, {"axis": axis, "largest": largest}, outputs=(1, 7))
    feeds = [case.feeds(seed) for seed in range(8)]
    model = compiled(case.model(), feeds)
    assert_all_integer(model)
    for feed in feeds[:3]:
        (x,) = rounded(model, feed)
        order = np.argsort(-x if largest else x, axis=axis, kind="stable").take(range(3), axis=axis)
        values, indices = assert_reference_agrees(model, feed)
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_allclose(values, np.take_along_axis(x, order, axis), rtol=1e-6)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("ScatterElements", (ROWS, np.zeros((2, 1, 8), np.int64), (2, 1, 8)), np.add,
              {"axis": 1, "reduction": "add"}), "combined with what is there"),
        (Case("GridSample", (IMAGE, (2, 3, 5, 2)), bilinear, {"mode": "cubic"}), "GridSample has no integer form"),
        (Case("Equal", (ROWS, np.full(8, np.nan, np.float32)), np.equal), "holds NaN"),
        (Case("Mod", (ROWS, ROWS), np.fmod, {"fmod": 1}, low=0.5), "Mod has no integer form"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_what_stays_in_float_is_told(case: Case, reason: str):
    model = compiled(case.model(), [case.feeds(seed) for seed in range(4)])
    reasons = [node.metadata_props[BOUNDARY_KEY] for node in model.graph if BOUNDARY_KEY in node.metadata_props]
    assert any(reason in one for one in reasons), reasons


def test_strict_refuses_what_stays_in_float():
    case = Case("GridSample", (IMAGE, (2, 3, 5, 2)), bilinear, {"mode": "cubic"})
    model, feeds = case.model(), [case.feeds(seed) for seed in range(4)]
    Integer().prepare_passes().run(model, calibration=feeds)
    Pipeline.parse("full-qdq").run(model, calibration=feeds)
    with pytest.raises(UserError, match="GridSample has no integer form"):
        Pipeline.parse("integer-requantize{strict=true}").run(model)
