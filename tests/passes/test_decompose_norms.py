"""`decompose-norms` against ONNX Runtime's operators, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session

FLOAT = onnx.TensorProto.FLOAT


def single(
    op_type: str, shape: list[int], constants: dict[str, np.ndarray] | None = None, opset: int = 21, **attributes: Any
) -> ir.Model:
    """Return a model of one node whose first axis is the batch."""
    constants = constants or {}
    known = ["n", *shape] if op_type == "GroupNormalization" else None  # onnx does not find it
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op_type, ["x", *constants], ["y"], **attributes)],
        "g",
        [onnx.helper.make_tensor_value_info("x", FLOAT, ["n", *shape])],
        [onnx.helper.make_tensor_value_info("y", FLOAT, known)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1).run(None, {"x": x})[0]


def numbers(shape: list[int], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=[3, *shape]) * 4 + 1).astype(np.float32)


def assert_kept(model: ir.Model, x: np.ndarray, tolerance: float = 2e-6) -> None:
    before = run(model, x)
    (old,) = model.graph
    assert Pipeline.parse("decompose-norms").run(model).changed == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert old.op_type not in {node.op_type for node in model.graph}
    after = run(model, x)
    assert before.shape == after.shape
    np.testing.assert_allclose(after, before, rtol=0, atol=tolerance * np.abs(before).max())
    assert Pipeline.parse("decompose-norms").run(model).changed == 0


def per_channel(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    return {name: random.normal(size=count).astype(np.float32) for name in ("s", "b")}


@pytest.mark.parametrize("shape", [[4, 9], [1, 3, 5], [4, 3, 5], [2, 3, 4, 5]])
def test_instances(shape: list[int]):
    for options in ({}, {"epsilon": 0.1}):
        assert_kept(single("InstanceNormalization", shape, per_channel(shape[0]), **options), numbers(shape), 5e-6)


@pytest.mark.parametrize(("opset", "groups"), [(opset, groups) for opset in (18, 21) for groups in (1, 2, 3, 6)])
@pytest.mark.parametrize("shape", [[6, 5], [6, 3, 5]])
def test_groups(shape: list[int], opset: int, groups: int):
    constants = per_channel(groups if opset < 21 else 6)
    model = single("GroupNormalization", shape, constants, opset, num_groups=groups, epsilon=0.01)
    assert_kept(model, numbers(shape), 5e-6)


@pytest.mark.parametrize("op_type", ["ReduceL1", "ReduceL2", "ReduceSumSquare"])
@pytest.mark.parametrize("axes", [None, [1], [-1, 1], [0, 2]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions(op_type: str, axes: list[int] | None, keepdims: int):
    constants = {} if axes is None else {"axes": np.array(axes, np.int64)}
    assert_kept(single(op_type, [4, 5], constants, keepdims=keepdims), numbers([4, 5]))


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"axis": 1}, {"axis": 0, "p": 1}])
def test_vectors_of_length_one(options: dict[str, int]):
    x = numbers([4, 5])
    x[0], x[:, 1], x[:, :, 2] = 0, 0, 0
    model = single("LpNormalization", [4, 5], **options)
    assert_kept(model, x)
    assert np.isfinite(run(model, x)).all()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_logarithms_of_what_is_improbable(axis: int):
    assert_kept(single("LogSoftmax", [4, 5], axis=axis), numbers([4, 5]) * 100)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (single("LRN", [4, "h", 3], size=3), "not known"),
        (single("LpPool", [4, 3, 3], kernel_shape=[2, 2], ceil_mode=1), "beyond the border"),
        (single("ReduceLogSum", [4], noop_with_empty_axes=1), "may reduce nothing"),
        (single("ReduceL2", [4], noop_with_empty_axes=1), "may reduce nothing"),
        (single("InstanceNormalization", [4, "w"], per_channel(4)), "not known"),
        (single("ReduceL2", [4], {"axes": np.array([1], np.int64)}, opset=17), "convert-opset"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_stays(model: ir.Model, reason: str):
    report = Pipeline.parse("decompose-norms").run(model)
    assert report.changed == 0
    assert reason in report.parts[0].skipped[0].reason


def test_a_computed_scale_stays():
    model = single("InstanceNormalization", [4, 3], per_channel(4))
    model.graph.inputs.append(model.graph.initializers["s"])
    report = Pipeline.parse("decompose-norms").run(model)
    assert "scale or bias is computed" in report.parts[0].skipped[0].reason


@pytest.mark.parametrize("axis", [1, -2, 2, -1])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_over_several_axes(axis: int, bias: bool):
    random = np.random.default_rng(1)
    sizes = [4, 3, 5][axis % 4 - 1 :]
    constants = {name: random.normal(size=sizes).astype(np.float32) for name in (("s", "b") if bias else ("s",))}
    model = single("LayerNormalization", [4, 3, 5], constants, axis=axis, epsilon=0.01)
    if axis == -1:
        report = Pipeline.parse("decompose-norms").run(model)
        assert (report.changed, report.skipped) == (0, ())  # it is plain already
        return
    x = numbers([4, 3, 5])
    before = run(model, x)
    assert Pipeline.parse("decompose-norms").run(model).changed == 1
    assert [node.op_type for node in model.graph] == ["Reshape", "LayerNormalization", "Reshape"]
    np.testing.assert_allclose(run(model, x), before, rtol=0, atol=5e-6 * np.abs(before).max())


def test_what_no_layer_took_up_of_a_batch_norm():
    random = np.random.default_rng(2)
    constants = {name: random.normal(size=6).astype(np.float32) for name in ("s", "b", "m")}
    constants["v"] = np.abs(random.normal(size=6)).astype(np.float32) + 0.1
    assert_kept(single("BatchNormalization", [6, 3, 5], constants, epsilon=0.01), numbers([6, 3, 5]))


def test_slopes_of_channels():
    slopes = np.array([-0.5, 0.0, 0.25, 1.0], np.float32).reshape(4, 1)
    assert_kept(single("PRelu", [4, 5], {"s": slopes}), numbers([4, 5]))
    steep = single("PRelu", [4, 5], {"s": slopes * 2})
    (skipped,) = Pipeline.parse("decompose-norms").run(steep).skipped
    assert "above 1" in skipped.reason


@pytest.mark.parametrize("axes", [[1], [-1, 1]])
def test_logarithms_of_sums_of_exponentials(axes: list[int]):
    assert_kept(single("ReduceLogSumExp", [4, 5], {"axes": np.array(axes, np.int64)}), numbers([4, 5]) * 30)


@pytest.mark.parametrize("axes", [None, [1], [-1, 1]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_logarithms_of_sums(axes: list[int] | None, keepdims: int):
    constants = {} if axes is None else {"axes": np.array(axes, np.int64)}
    assert_kept(single("ReduceLogSum", [4, 5], constants, keepdims=keepdims), np.abs(numbers([4, 5])) + 0.1)


@pytest.mark.parametrize("shape", [[7, 5], [7, 3, 4], [2, 3, 4]])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_local_response(shape: list[int], size: int):
    options = {"alpha": 0.7, "beta": 0.6, "bias": 2.0}
    model, x = single("LRN", shape, size=size, **options), numbers(shape)
    if len(shape) == 3:  # ONNX Runtime knows no others
        assert_kept(model, x)
    else:
        assert Pipeline.parse("decompose-norms").run(model).changed == 1
    expected = np.zeros_like(x, dtype=np.float64)
    for channel in range(shape[0]):
        window = x[:, max(channel - (size - 1) // 2, 0) : channel + size // 2 + 1].astype(np.float64)
        total = options["bias"] + options["alpha"] / size * (window**2).sum(axis=1)
        expected[:, channel] = x[:, channel] / total ** options["beta"]
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"strides": [2, 1]}, {"pads": [1, 0, 0, 1]}, {"auto_pad": "SAME_UPPER"}, {"dilations": [2, 1]}]
)
def test_norms_of_windows(order: int, options: dict[str, Any]):
    model = single("LpPool", [2, 6, 5], kernel_shape=[2, 3], p=order, **options)
    assert_kept(model, numbers([2, 6, 5]), 1e-5)
