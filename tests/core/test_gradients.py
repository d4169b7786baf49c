"""Gradients against central differences: every rule in float64 on the reference evaluator, and whole models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

import qgraph.ir
from qgraph.analysis.gradient_elementwise import FLAT
from qgraph.analysis.gradients import RULES, differentiate, gradient_model, uncovered
from qgraph.errors import UserError

HEAD = '<ir_version: 10, opset_import: ["" : {}]>\ng ({}) => (float[] y)\n{{ {} }}'

# What a rule is tried on: inputs by name (negative sizes are unknown to the graph), and the nodes that make y.
CASES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "Conv": ({"x": (2, 4, 7, 6), "w": (6, 4, 3, 2), "b": (6,)}, "y = Conv <pads = [1, 0, 2, 1]> (x, w, b)"),
    "Conv strides": (
        {"x": (2, 4, 8, 7), "w": (6, 2, 3, 2)},
        "y = Conv <group = 2, strides = [2, 3], pads = [1, 0, 1, 1], dilations = [2, 1]> (x, w)",
    ),
    "Conv open": (
        {"x": (2, 4, -8, -7), "w": (6, 2, 3, 2)},
        "y = Conv <group = 2, strides = [2, 3], pads = [1, 0, 1, 1], dilations = [2, 1]> (x, w)",
    ),
    "Conv depthwise": (
        {"x": (2, 4, 6, 6), "w": (8, 1, 3, 3)},
        "y = Conv <group = 4, strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)",
    ),
    "Conv line": ({"x": (2, 3, 9), "w": (2, 3, 4)}, "y = Conv <strides = [3], dilations = [2], pads = [2, 1]> (x, w)"),
    "Conv auto": (
        {"x": (1, 2, 7, 8), "w": (3, 2, 3, 4)},
        'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)',
    ),
    "Conv auto low": ({"x": (1, 2, -7, 8), "w": (3, 2, 2, 4)}, 'y = Conv <auto_pad = "SAME_LOWER"> (x, w)'),
    "ConvTranspose": (
        {"x": (2, 4, 3, 4), "w": (4, 3, 3, 2), "b": (6,)},
        "y = ConvTranspose <group = 2, strides = [2, 3], pads = [1, 0, 0, 1], output_padding = [1, 1]> (x, w, b)",
    ),
    "MaxPool": (
        {"x": (2, 3, 7, 8)},
        "y = MaxPool <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1], ceil_mode = 1> (x)",
    ),
    "AveragePool": (
        {"x": (2, 3, 7, 8)},
        "y = AveragePool <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1]> (x)",
    ),
    "AveragePool open": (
        {"x": (2, 3, -7, -8)},
        "y = AveragePool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1], count_include_pad = 1> (x)",
    ),
    "GlobalAveragePool": ({"x": (-2, 3, 4, 5)}, "y = GlobalAveragePool (x)"),
    "GlobalMaxPool": ({"x": (2, 3, 4, 5)}, "y = GlobalMaxPool (x)"),
    "BatchNormalization": (
        {"x": (3, 4, 5), "s": (4,), "b": (4,), "m": (4,), "+v": (4,)},
        "y = BatchNormalization <epsilon = 0.01> (x, s, b, m, v)",
    ),
    "LayerNormalization": (
        {"x": (2, 3, 4), "s": (3, 4), "b": (4,)},
        "y = LayerNormalization <axis = 1, epsilon = 0.01> (x, s, b)",
    ),
    "LayerNormalization last": ({"x": (-2, -3, 4), "s": (4,), "b": (4,)}, "y = LayerNormalization (x, s, b)"),
    "RMSNormalization": ({"x": (2, 3, 4), "s": (4,)}, "y = RMSNormalization (x, s)"),
    "InstanceNormalization": (
        {"x": (2, 3, 4, 2), "s": (3,), "b": (3,)},
        "y = InstanceNormalization <epsilon = 0.01> (x, s, b)",
    ),
    "GroupNormalization": (
        {"x": (2, 4, 3, 2), "s": (4,), "b": (4,)},
        "y = GroupNormalization <num_groups = 2, epsilon = 0.01> (x, s, b)",
    ),
    "MatMul": ({"a": (3, 4), "b": (4, 2)}, "y = MatMul (a, b)"),
    "MatMul stack": ({"a": (2, 3, 3, 4), "b": (4, 2)}, "y = MatMul (a, b)"),
    "MatMul stacks": ({"a": (2, 1, 3, 4), "b": (5, 4, 2)}, "y = MatMul (a, b)"),
    "MatMul open": ({"a": (-2, -5, 3, 4), "b": (-5, 4, -2)}, "y = MatMul (a, b)"),
    "Gemm": ({"a": (3, 4), "b": (4, 2), "c": (2,)}, "y = Gemm <alpha = 0.5, beta = 2.0> (a, b, c)"),
    "Gemm A": ({"a": (4, 3), "b": (4, 2)}, "y = Gemm <transA = 1> (a, b)"),
    "Gemm B": ({"a": (3, 4), "b": (2, 4), "c": (3, 1)}, "y = Gemm <transB = 1, alpha = 0.5> (a, b, c)"),
    "Gemm AB": ({"a": (4, 3), "b": (2, 4), "c": (1,)}, "y = Gemm <transA = 1, transB = 1> (a, b, c)"),
    "Softmax": ({"x": (2, 3, 4)}, "y = Softmax <axis = 1> (x)"),
    "LogSoftmax": ({"x": (2, 3, 4)}, "y = LogSoftmax (x)"),
    "Attention": ({"q": (2, 4, 3, 5), "k": (2, 2, 6, 5), "v": (2, 2, 6, 4)}, "y = Attention (q, k, v)"),
    "Attention flat": (
        {"q": (2, 3, 8), "k": (2, 3, 8), "v": (2, 3, 4), "m": (3, 3)},
        "y = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1, scale = 0.4> (q, k, v, m)",
    ),
    "Add": ({"a": (2, 3, 4), "b": (3, 1)}, "y = Add (a, b)"),
    "Add open": ({"a": (-2, -3, -4), "b": (-3, 1)}, "y = Add (a, b)"),
    "Sub": ({"a": (4,), "b": (2, 3, 1)}, "y = Sub (a, b)"),
    "Mul": ({"a": (2, 3), "b": ()}, "y = Mul (a, b)"),
    "Mul same": ({"a": (2, 3)}, "y = Mul (a, a)"),
    "Div": ({"a": (2, 3), "+b": (3,)}, "y = Div (a, b)"),
    "Pow": ({"+a": (2, 3), "b": (3,)}, "y = Pow (a, b)"),
    "Pow square": ({"a": (2, 3)}, "two = Constant <value_float = 2.0> ()\n y = Pow (a, two)"),
    "Where": (
        {"a": (2, 3), "b": (3,)},
        "zero = Constant <value_float = 0.0> ()\n c = Greater (a, zero)\n y = Where (c, a, b)",
    ),
    "PRelu": ({"x": (2, 3, 4), "s": (3, 1)}, "y = PRelu (x, s)"),
    "Min": ({"a": (2, 3), "b": (3,), "c": (2, 1)}, "y = Min (a, b, c)"),
    "Max": ({"a": (2, 3), "b": (3,), "c": (2, 1)}, "y = Max (a, b, c)"),
    "Sum": ({"a": (2, 3), "b": (3,)}, "y = Sum (a, b)"),
    "Mean": ({"a": (2, 3), "b": (3,)}, "y = Mean (a, b)"),
    "Clip bounds": ({"x": (4, 5), "low": (), "+high": ()}, "y = Clip (x, low, high)"),
    "Clip": (
        {"x": (4, 5)},
        "low = Constant <value_float = -0.5> ()\n high = Constant <value_float = 1.0> ()\n y = Clip (x, low, high)",
    ),
    "LeakyRelu": ({"x": (4, 5)}, "y = LeakyRelu <alpha = 0.2> (x)"),
    "HardSigmoid": ({"x": (9, 9)}, "y = HardSigmoid <alpha = 0.4, beta = 0.6> (x)"),
    "Elu": ({"x": (4, 5)}, "y = Elu <alpha = 0.7> (x)"),
    "Gelu tanh": ({"x": (4, 5)}, 'y = Gelu <approximate = "tanh"> (x)'),
    "ThresholdedRelu": ({"x": (9, 9)}, "y = ThresholdedRelu <alpha = 0.4> (x)"),
    "Swish": ({"x": (4, 5)}, "y = Swish <alpha = 0.7> (x)"),
    "Log": ({"+x": (4, 5)}, "y = Log (x)"),
    "Sqrt": ({"+x": (4, 5)}, "y = Sqrt (x)"),
    "Reciprocal": ({"+x": (4, 5)}, "y = Reciprocal (x)"),
    "Cast": ({"x": (4, 5)}, "d = Cast <to = 11> (x)\n s = Sin (d)\n y = Cast <to = 1> (s)"),
    "Dropout": ({"x": (4, 5)}, "y = Dropout (x)"),
    **{
        op: ({"x": (-9, 9)}, f"y = {op} (x)")
        for op in (
            "Abs",
            "Cos",
            "Erf",
            "Exp",
            "Gelu",
            "HardSwish",
            "Identity",
            "Mish",
            "Neg",
            "Relu",
            "Sigmoid",
            "Sin",
            "Softplus",
            "Softsign",
            "Tanh",
        )
    },
    **{
        op: ({"+x": (2, 3, 4)}, f"a = Constant <value_ints = [0, -1]> ()\n y = {op} <keepdims = 0> (x, a)")
        for op in (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        )
    },
    "ReduceMean kept": ({"x": (-2, -3, -4)}, "a = Constant <value_ints = [1]> ()\n y = ReduceMean (x, a)"),
    "ReduceSum all": ({"x": (2, 3, 4)}, "y = ReduceSum <keepdims = 0> (x)"),
    "Reshape": ({"x": (2, 3, 4)}, "s = Constant <value_ints = [4, -1]> ()\n y = Reshape (x, s)"),
    "Flatten": ({"x": (-2, 3, 4)}, "y = Flatten (x)"),
    "Transpose": ({"x": (2, 3, 4)}, "y = Transpose <perm = [1, 2, 0]> (x)"),
    "Squeeze": ({"x": (2, 1, 4)}, "y = Squeeze (x)"),
    "Unsqueeze": ({"x": (2, 4)}, "a = Constant <value_ints = [0, -1]> ()\n y = Unsqueeze (x, a)"),
    "Concat": ({"a": (2, 3), "b": (2, 2)}, "y = Concat <axis = -1> (a, b, a)"),
    "Concat open": ({"a": (2, -3), "b": (2, -2)}, "y = Concat <axis = 1> (a, b, a)"),
    "Split": (
        {"x": (7, 2)},
        "s = Constant <value_ints = [2, 4, 1]> ()\n a, b, c = Split (x, s)\n d = Slice (b, t, f)\n y = Mul (a, d)",
    ),
    "Slice": (
        {"x": (7, -6)},
        """s = Constant <value_ints = [5, -1]> () e = Constant <value_ints = [0, -5]> ()
        a = Constant <value_ints = [0, 1]> () t = Constant <value_ints = [-2, -1]> () y = Slice (x, s, e, a, t)""",
    ),
    "Gather": ({"x": (5, 3)}, "i = Constant <value = int64[2, 3] {1, 4, 1, -2, 0, 1}> ()\n y = Gather (x, i)"),
    "Gather columns": ({"x": (3, -5)}, "i = Constant <value_ints = [1, 4, 1]> ()\n y = Gather <axis = 1> (x, i)"),
    "GatherElements": (
        {"x": (3, 2)},
        "i = Constant <value = int64[2, 2] {1, 0, 1, 2}> ()\n y = GatherElements (x, i)",
    ),
    "GatherND": ({"x": (3, 2, 2)}, "i = Constant <value = int64[3, 1] {1, 0, 1}> ()\n y = GatherND (x, i)"),
    "Expand": ({"x": (3, 1)}, "s = Constant <value_ints = [2, 1, 4]> ()\n y = Expand (x, s)"),
    "Tile": ({"x": (3, 2)}, "s = Constant <value_ints = [2, 3]> ()\n y = Tile (x, s)"),
    "Pad": ({"x": (-3, 4)}, "p = Constant <value_ints = [1, 0, 2, 3]> ()\n y = Pad (x, p)"),
    "Pad crop": ({"x": (3, 4)}, "p = Constant <value_ints = [1, -1, 2, 3]> ()\n y = Pad (x, p)"),
    "Pad axes": (
        {"x": (3, 4)},
        "p = Constant <value_ints = [1, 2]> () a = Constant <value_ints = [1]> () y = Pad (x, p, , a)",
    ),
    "Pad reflect": ({"x": (3, 4)}, 'p = Constant <value_ints = [1, 2, 2, 3]> ()\n y = Pad <mode = "reflect"> (x, p)'),
    "Resize": (
        {"x": (1, 2, 3, 4)},
        """s = Constant <value_floats = [1.0, 1.0, 2.0, 1.5]> ()
        y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric"> (x, , s)""",
    ),
    "DepthToSpace": ({"x": (2, 8, 3, 2)}, "y = DepthToSpace <blocksize = 2> (x)"),
    "DepthToSpace CRD": ({"x": (2, 8, 3, 2)}, 'y = DepthToSpace <blocksize = 2, mode = "CRD"> (x)'),
    "SpaceToDepth": ({"x": (2, 3, 4, 6)}, "y = SpaceToDepth <blocksize = 2> (x)"),
    "CumSum": ({"x": (3, 4)}, "a = Constant <value_int = 1> ()\n y = CumSum <exclusive = 1> (x, a)"),
    "Trilu": ({"x": (3, 4)}, "y = Trilu <upper = 0> (x)"),
    "TopK": ({"x": (3, 6)}, "k = Constant <value_ints = [2]> ()\n y, i = TopK (x, k)"),
}


SINGLE = {"Cast", "ConvTranspose", "Erf", "Gelu", "GroupNormalization", "Pad crop", "Where"}
"""What the reference evaluator computes in float32, or not at all: ONNX Runtime does, with a longer step."""


def build(inputs: dict[str, tuple[int, ...]], nodes: str, opset: int = 24) -> ir.Model:
    nodes = nodes.replace(
        "d = Slice (b, t, f)",
        "z = Constant <value_ints = [1]> () e = Constant <value_ints = [3]> () d = Slice (b, z, e)",
    )
    sizes = {
        name.strip("+"): ", ".join(str(s) if s > 0 else f"{name.strip('+')}{i}" for i, s in enumerate(shape))
        for name, shape in inputs.items()
    }
    declared = ", ".join(f"float[{size}] {name}" for name, size in sizes.items())
    return ir.from_onnx_text(HEAD.format(opset, declared, nodes))


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


Forward = Callable[[dict[str, np.ndarray]], np.ndarray]


def doubles(model: ir.Model) -> Forward:
    reference = ReferenceEvaluator(ir.to_proto(model))
    return lambda feed: reference.run(None, feed)[0].astype(np.float64)


def singles(model: ir.Model) -> Forward:
    runtime = session(model)
    return lambda feed: runtime.run(None, {name: np.asarray(array, np.float32) for name, array in feed.items()})[
        0
    ].astype(np.float64)


@pytest.mark.parametrize("case", CASES)
def test_rules_against_central_differences(case: str):
    inputs, nodes = CASES[case]
    model = build(inputs, nodes)
    rng = np.random.default_rng(0)
    feed = {}
    for name, shape in inputs.items():
        array = rng.normal(size=[abs(size) for size in shape])
        feed[name.strip("+")] = np.abs(array) + 0.5 if name.startswith("+") else array
    forward, length, tolerance = doubles(model), 1e-6, 1e-3
    if case in SINGLE:
        forward, length, tolerance = singles(model), 1e-2, 5e-3
    v = rng.normal(size=forward(feed).shape)
    found = gradient_model(model, ["y"], list(feed))
    narrow = {name: np.asarray(array, np.float32) for name, array in {**feed, "y_cotangent": v}.items()}
    gradients = session(found.model).run([found.values[name].name for name in feed], narrow)
    for name, gradient in zip(feed, gradients, strict=True):
        assert gradient.shape == feed[name].shape
        for _ in range(3):
            direction = rng.normal(size=feed[name].shape)
            step = length * direction
            ends = [forward(feed | {name: feed[name] + sign * step}) for sign in (1, -1)]
            expected = float(np.sum(v * (ends[0] - ends[1])) / (2 * length))
            bound = tolerance * max(float(np.sum(np.abs(gradient * direction))), 1e-2)
            assert float(np.sum(gradient * direction)) == pytest.approx(expected, abs=bound), name


def test_every_rule_is_tried():
    assert {case.partition(" ")[0] for case in CASES} >= set(RULES) - {"QuantizeLinear", "DequantizeLinear"}
    assert not FLAT & set(RULES)
    assert all(onnx.defs.has(op) for op in (*RULES, *FLAT))


def test_what_is_uncovered_is_named():
    model = build(
        {"x": (2, 3), "w": (3,)},
        'a = Relu (x)\n b = Einsum <equation = "ij->ji"> (a)\n c = MatMul (b, a)\n [vector] y = MatMul (c, w)',
    )
    assert uncovered(model) == {"vector": "it multiplies a vector"}
    found = differentiate(model, ["c"], ["x", "w", "a", "b"])
    assert {str(node.op_type): reason for node, reason in found.uncovered.items()} == {
        "Einsum": "there is no rule for Einsum"
    }
    assert found.incomplete == {"x", "a"}
    with pytest.raises(UserError, match="there is no gradient of 'x'"):
        gradient_model(model, ["c"], ["x"])


def test_nodes_with_subgraphs_are_uncovered_with_what_they_capture():
    branch = "{} = g () => (float[2] {}) {{ {} = {} (x) }}"
    branches = ", ".join(
        branch.format(f"{one}_branch", one, one, op) for one, op in (("then", "Relu"), ("else", "Neg"))
    )
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[2] x, bool c) => (float[2] y)\n'
        f"{{ [choice] h = If <{branches}> (c)\n s = Mul (h, x)\n y = Sin (s) }}"
    )
    assert uncovered(model) == {"choice": "If has subgraphs"}
    assert differentiate(model, ["y"], ["x", "h", "s"]).incomplete == {"x"}


def test_old_opsets_are_refused():
    with pytest.raises(UserError, match="gradients need opset 16, and the model has 13"):
        gradient_model(build({"x": (2, 3)}, "y = Relu (x)", opset=13), ["y"], ["x"])


def test_values_in_between_outputs_and_constants():
    model = build({"x": (2, 3)}, "two = Constant <value_float = 2.0> ()\n h = Mul (x, two)\n y = Mul (h, h)")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = gradient_model(model, ["y", "h"], ["h", "x", "two", "y"])
    feed = {"x": x, "y_cotangent": np.ones_like(x), "h_cotangent": np.full_like(x, 3)}
    h, dx, two, y = session(found.model).run(None, feed)
    np.testing.assert_array_equal(h, 4 * x + 3)
    np.testing.assert_array_equal(dx, 8 * x + 6)
    assert two == np.sum(x * (4 * x + 3))
    np.testing.assert_array_equal(y, np.ones_like(x))


def test_what_does_not_depend_has_gradient_zero():
    model = build({"x": (2, 3), "z": (2, 3)}, "s = Shape (z)\n e = ConstantOfShape (s)\n y = Add (x, e)")
    found = gradient_model(model, ["y"], ["z"])
    feed = {name: np.ones((2, 3), np.float32) for name in ("x", "z", "y_cotangent")}
    (z,) = session(found.model).run(None, feed)
    np.testing.assert_array_equal(z, np.zeros((2, 3)))


def test_rounding_there_and_back_is_passed_straight_through():
    model = build(
        {"x": (2, 3)},
        "s = Constant <value_float = 0.1> ()\n z = Constant <value = uint8 {9}> ()\n"
        " q = QuantizeLinear (x, s, z)\n d = DequantizeLinear (q, s, z)\n y = Mul (d, d)",
    )
    found = gradient_model(model, ["y"], ["x"])
    x = np.full((2, 3), 0.52, np.float32)
    (gradient,) = session(found.model).run(None, {"x": x, "y_cotangent": np.ones_like(x)})
    np.testing.assert_allclose(gradient, np.full((2, 3), 1.0), rtol=1e-6)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_encoder"])
def test_whole_models_along_directions(name: str):
    module = importlib.import_module(f"qgraph.models.{name}")
    model = module.build()
    along_directions(model, {"image": module.dataset().calibration["image"][:4]})


def test_a_real_model_along_directions(assets: Path):
    model = qgraph.ir.load(assets / "cifar10" / "resnet20_cifar10.onnx")
    (image,) = [value for value in model.graph.inputs if value.const_value is None]
    rng = np.random.default_rng(0)
    along_directions(model, {str(image.name): rng.normal(size=(2, 3, 32, 32)).astype(np.float32)})


def along_directions(model: ir.Model, feed: dict[str, np.ndarray]) -> None:
    """Compare with differences along random directions: of the input, of weights, and of both."""
    assert uncovered(model) == {}
    output = str(model.graph.outputs[0].name)
    weights = [
        name
        for name, value in model.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT and "var" not in name
    ]
    names = [name for name, array in feed.items() if array.dtype == np.float32] + weights
    found = gradient_model(model, [output], names)
    rng = np.random.default_rng(0)
    open_model = model.clone()
    open_model.graph.inputs.extend(open_model.graph.initializers[name] for name in weights)
    exact = singles(open_model)
    arrays = {name: model.graph.initializers[name].const_value.numpy() for name in weights} | feed
    v = rng.normal(size=exact(arrays).shape).astype(np.float32)
    gradients = session(found.model).run(None, {**feed, f"{output}_cotangent": v})
    by_name = dict(zip(names, gradients, strict=True))
    for chosen in ([names[0]], *([name] for name in weights[::9]), names):
        # Along the gradient itself the change is largest against what float32 rounds off.
        steps = {name: by_name[name] + by_name[name].std() * rng.normal(size=by_name[name].shape) for name in chosen}
        slope = sum(float(np.sum(by_name[name] * step)) for name, step in steps.items())
        size = np.sqrt(sum(float(np.sum(step**2)) for step in steps.values()))
        length = 1e-3 / size
        ends = [exact(arrays | {n: arrays[n] + sign * length * s for n, s in steps.items()}) for sign in (1, -1)]
        difference = float(np.sum(v * (ends[0] - ends[1]))) / (2 * length)
        assert slope == pytest.approx(difference, rel=2e-2), chosen
