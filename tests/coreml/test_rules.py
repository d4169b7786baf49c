"""Every lowering rule: a model of one node as a package, read back and interpreted, against ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="coremltools is not installed")

sys.path.insert(0, str(Path(__file__).parent))

from package_build import Case, Constant, assert_same

from qgraph.coreml.interpreter import SEMANTICS
from qgraph.coreml.lowering import RULES
from qgraph.coreml.program import read_package
from qgraph.coreml.structure import examine


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.1, 0.9, shape).astype(np.float32)


def integers(*shape: int, low: int = -9, high: int = 9) -> np.ndarray:
    return np.random.default_rng(2).integers(low, high, shape).astype(np.int64)


def booleans(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


def fixed(*numbers: int) -> Constant:
    return Constant(np.array(numbers, np.int64))


def scalar(number: float) -> Constant:
    return Constant(np.array(number, np.float32))


X = floats(2, 3, 4)
IMAGE = floats(1, 4, 7, 6)
LSTM = [floats(5, 2, 3), Constant(floats(1, 16, 3)), Constant(floats(1, 16, 4)), Constant(floats(1, 32))]
STATE = floats(1, 2, 4, seed=7)

ELEMENTWISE = [
    *(Case(op, [X]) for op in (
        "Abs", "Atan", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "Identity", "Neg", "Reciprocal", "Relu", "Round",
        "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Tan", "Tanh", "Mish", "HardSwish", "IsNaN",
        "ThresholdedRelu", "Elu", "LeakyRelu", "HardSigmoid", "Gelu",
    )),
    *(Case(op, [positive(2, 3)]) for op in ("Acos", "Asin", "Atanh", "Log", "Sqrt")),
    Case("Gelu", [X], {"approximate": "tanh"}, name="tanh"),
    Case("Elu", [X], {"alpha": 0.3}, name="alpha"),
    Case("LeakyRelu", [X], {"alpha": 0.3}, name="alpha"),
    Case("HardSigmoid", [X], {"alpha": 0.4, "beta": 0.2}, name="parameters"),
    Case("ThresholdedRelu", [X], {"alpha": 0.4}, name="alpha"),
    Case("Swish", [X], opset=24),
    Case("Swish", [X], {"alpha": 0.5}, opset=24, name="alpha"),
    Case("IsInf", [np.array([1, np.inf, -np.inf, np.nan], np.float32)]),
    Case("IsNaN", [np.array([1, np.inf, np.nan], np.float32)], name="hit"),
    Case("Neg", [integers(2, 3)], name="integers"),
    Case("Abs", [integers(2, 3)], name="integers"),
    Case("PRelu", [X, Constant(positive(3, 1))]),
    Case("Dropout", [X]),
    *(Case(op, [X, floats(3, 1)]) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")),
    *(Case(op, [integers(2, 3), integers(3)], name="integers") for op in ("Add", "Sub", "Mul", "Max", "Equal")),
    Case("Div", [integers(4, 5), Constant(np.array([-3, -2, 2, 3, 4], np.int64))], name="integers"),
    Case("Mod", [integers(4, 5), Constant(np.array([-3, -2, 2, 3, 4], np.int64))]),
    Case("Sum", [X], name="one"),
    Case("Max", [X, floats(4), floats(2, 1, 1)], name="three"),
    Case("Pow", [positive(2, 3), scalar(2.5)]),
    Case("Pow", [positive(2, 3), Constant(np.array(3, np.int64))], name="integer"),
    *(Case(op, [X, floats(4)]) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    Case("Equal", [booleans(3, 4), booleans(4, seed=4)], name="booleans"),
    *(Case(op, [booleans(3, 4), booleans(4, seed=4)]) for op in ("And", "Or", "Xor")),
    Case("Not", [booleans(3, 4)]),
    Case("Clip", [X, scalar(-0.5), scalar(0.4)]),
    Case("Clip", [X, scalar(-0.5)], name="from"),
    Case("Clip", [X, None, scalar(0.4)], name="to"),
    Case("Clip", [integers(4), Constant(np.array(-2, np.int64)), Constant(np.array(3, np.int64))], name="integers"),
    Case("Where", [booleans(2, 3, 4), X, floats(4)]),
    Case("Where", [booleans(2, 3, 4), scalar(1.0), scalar(-1e9)], name="scalars"),
    Case("Where", [booleans(3, 1), integers(4), Constant(np.array(3))], name="integers"),
    Case("Cast", [X], {"to": 7}),
    Case("Cast", [X], {"to": 9}, name="to-bool"),
    Case("Cast", [booleans(3)], {"to": 1}, name="of-bool"),
    Case("Cast", [X], {"to": 1}, name="nothing"),
    Case("Cast", [X], {"to": 10}, name="half"),
    Case("Cast", [np.arange(5, dtype=np.uint8)], {"to": 6}, name="of-uint8"),
]  # fmt: skip

LAYERS = [
    Case("MatMul", [X, Constant(floats(4, 5))]),
    Case("MatMul", [X, floats(2, 4, 5)], name="computed"),
    Case("MatMul", [floats(2, 2, 3, 4), Constant(floats(4, 5))], name="four-axes"),
    Case("MatMul", [Constant(floats(5, 3)), X], name="constant-first"),
    Case("MatMul", [floats(4), Constant(floats(4, 5))], name="vector"),
    Case("MatMul", [X, floats(4)], name="by-vector"),
    Case("MatMul", [floats(4), floats(4, seed=1)], name="vectors"),
    Case("Gemm", [floats(3, 4), Constant(floats(5, 4)), Constant(floats(5))], {"transB": 1}),
    Case("Gemm", [floats(3, 4), Constant(floats(4, 5))], name="bare"),
    Case("Gemm", [floats(4, 3), Constant(floats(4, 5)), Constant(floats(3, 1))], {"transA": 1, "beta": 0.5},
         name="addend"),
    Case("Gemm", [floats(3, 4), floats(5, 4), floats(5)], {"transB": 1, "alpha": 0.5}, name="computed"),
    Case("Conv", [IMAGE, Constant(floats(6, 4, 3, 3)), Constant(floats(6))], {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    Case("Conv", [IMAGE, Constant(floats(4, 1, 3, 2))], {"group": 4, "dilations": [2, 1]}, name="depthwise"),
    Case("Conv", [IMAGE, Constant(floats(4, 2, 2, 2))], {"group": 2, "auto_pad": "SAME_UPPER"}, name="same"),
    Case("Conv", [IMAGE, Constant(floats(4, 4, 2, 2))], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, name="lower"),
    Case("Conv", [floats(1, 3, 9), Constant(floats(4, 3, 4))], {"strides": [2]}, name="line"),
    Case("Conv", [floats(1, 2, 4, 5, 3), Constant(floats(3, 2, 2, 2, 2))], name="volume"),
    Case("Conv", [IMAGE, floats(6, 4, 3, 3)], name="computed"),
    Case("ConvTranspose", [IMAGE, Constant(floats(4, 3, 3, 2)), Constant(floats(3))], {"strides": [2, 3]}),
    Case("ConvTranspose", [IMAGE, Constant(floats(4, 3, 3, 2))],
         {"strides": [2, 2], "pads": [1, 0, 1, 1], "output_padding": [1, 0]}, name="padding"),
    Case("ConvTranspose", [IMAGE, Constant(floats(4, 3, 3, 2))], {"group": 2, "dilations": [1, 2]}, name="groups"),
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 0]}),
    Case("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, name="ceil"),
    Case("MaxPool", [floats(1, 3, 9)], {"kernel_shape": [3]}, name="line"),
    Case("MaxPool", [np.arange(48, dtype=np.uint8).reshape(1, 2, 4, 6) * 5], {"kernel_shape": [2, 2]}, name="integers"),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 0]}),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "count_include_pad": 1},
         name="counted"),
    Case("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, name="ceil"),
    Case("GlobalAveragePool", [IMAGE]),
    Case("GlobalMaxPool", [IMAGE]),
]  # fmt: skip

REDUCTIONS = [
    *(Case(op, [positive(2, 3, 4), fixed(-1)]) for op in (
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
        "ReduceSum", "ReduceSumSquare",
    )),
    Case("ReduceSum", [X], {"keepdims": 0}, name="all"),
    Case("ReduceMean", [X, fixed(0, 2)], {"keepdims": 0}, name="two"),
    Case("ReduceSum", [X], {"noop_with_empty_axes": 1}, name="none"),
    Case("ArgMax", [X], {"axis": -1}),
    Case("ArgMin", [X], {"axis": 1, "keepdims": 0}),
    Case("TopK", [X, fixed(2)], {"axis": 1}, outputs=2),
    Case("TopK", [X, fixed(3)], {"largest": 0}, outputs=2, name="least"),
    Case("CumSum", [X, Constant(np.array(1, np.int64))]),
    Case("CumSum", [X, Constant(np.array(-1, np.int64))], {"exclusive": 1, "reverse": 1}, name="reverse"),
    Case("Softmax", [X], {"axis": 1}),
    Case("LogSoftmax", [X * 50]),
    Case("LayerNormalization", [X, Constant(floats(4)), Constant(floats(4, seed=1))], {"epsilon": 1e-3}),
    Case("LayerNormalization", [X, Constant(floats(3, 4))], {"axis": 1}, name="two-axes"),
    Case("RMSNormalization", [X, Constant(floats(4))], {"epsilon": 1e-3}, opset=23),
    Case("InstanceNormalization", [IMAGE, Constant(floats(4)), Constant(floats(4, seed=1))]),
    Case("GroupNormalization", [IMAGE, Constant(floats(4)), Constant(floats(4, seed=1))], {"num_groups": 2}),
    Case("BatchNormalization", [IMAGE, *(Constant(one) for one in (floats(4), floats(4), floats(4), positive(4)))]),
    Case("LRN", [IMAGE], {"size": 3, "alpha": 0.5, "bias": 2.0}),
    Case("LpNormalization", [X], {"axis": 1}),
    Case("LpNormalization", [X], {"p": 1}, name="first"),
]  # fmt: skip

MOVEMENT = [
    Case("Reshape", [X, fixed(4, -1)]),
    Case("Flatten", [X], {"axis": 2}),
    Case("Squeeze", [floats(1, 3, 1), fixed(0)]),
    Case("Squeeze", [booleans(1, 3), fixed(0)], name="booleans"),
    Case("Squeeze", [floats(1, 1), fixed(0, 1)], name="scalar"),
    Case("Unsqueeze", [X, fixed(0, -1)]),
    Case("Transpose", [X], {"perm": [2, 0, 1]}),
    Case("Transpose", [X], name="default"),
    Case("Concat", [X, floats(2, 5, 4)], {"axis": 1}),
    Case("Concat", [integers(2, 3), integers(2, 1)], {"axis": -1}, name="integers"),
    Case("Concat", [X], {"axis": 1}, name="one"),
    Case("Split", [X, fixed(1, 3)], {"axis": 2}, outputs=2),
    Case("Split", [floats(2, 5)], {"axis": -1, "num_outputs": 2}, outputs=2, name="uneven"),
    Case("Split", [X], {"num_outputs": 1}, name="one"),
    Case("Slice", [X, fixed(1, -3), fixed(3, 99), fixed(1, 2)]),
    Case("Slice", [X, fixed(-1, 3), fixed(-99, 0), fixed(1, 2), fixed(-1, -2)], name="backwards"),
    Case("Slice", [X, fixed(0, 0, 1), fixed(2, 3, 4), None, fixed(1, 2, 1)], name="all-axes"),
    Case("Pad", [X, fixed(0, 1, 0, 0, 0, 2), scalar(1.5)]),
    Case("Pad", [X, fixed(1, 2), None, fixed(-1)], {"mode": "reflect"}, name="reflect"),
    Case("Pad", [X, fixed(0, 1, 2, 0, 1, 1)], {"mode": "edge"}, name="edge"),
    Case("Pad", [X, fixed(0, -1, 0, 1, 0, -2)], name="cropped"),
    Case("Pad", [integers(2, 3), fixed(0, 1, 1, 0), Constant(np.array(7, np.int64))], name="integers"),
    Case("Pad", [X, fixed(0, 0, 0, 0, 0, 0)], name="nothing"),
    Case("Expand", [floats(3, 1), fixed(2, 3, 4)]),
    Case("Tile", [X, fixed(1, 2, 3)]),
    Case("DepthToSpace", [floats(1, 8, 2, 3)], {"blocksize": 2}),
    Case("DepthToSpace", [floats(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}, name="CRD"),
    Case("SpaceToDepth", [floats(1, 2, 4, 6)], {"blocksize": 2}),
    Case("Trilu", [floats(2, 4, 5), Constant(np.array(1, np.int64))]),
    Case("Trilu", [floats(4, 5)], {"upper": 0}, name="lower"),
    Case("Resize", [IMAGE, None, Constant(np.array([1, 1, 2, 3], np.float32))],
         {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    Case("Resize", [IMAGE, None, None, fixed(1, 4, 5, 9)], {"mode": "nearest"}, name="nearest"),
    Case("Resize", [IMAGE, None, None, fixed(1, 4, 14, 9)], {"mode": "linear"}, name="linear"),
    Case("Resize", [IMAGE, None, None, fixed(1, 4, 3, 11)],
         {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, name="corners"),
    Case("Resize", [IMAGE, None, None, fixed(1, 4, 14, 9)],
         {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}, name="asymmetric"),
    Case("Resize", [IMAGE, None, None, fixed(1, 4, 14, 9)], {"mode": "cubic"}, name="cubic"),
    Case("Resize", [IMAGE, None, None, fixed(1, 4, 7, 6)], {"mode": "linear"}, name="nothing"),
]  # fmt: skip

INDEXING = [
    Case("Gather", [X, fixed(2, 0, -1)], {"axis": 1}),
    Case("Gather", [Constant(floats(9, 4)), integers(2, 3, low=0)], name="embedding"),
    Case("Gather", [X, Constant(np.array(-1, np.int64))], {"axis": 2}, name="scalar"),
    Case("Gather", [booleans(4, 3), fixed(1, 2)], name="booleans"),
    Case("GatherElements", [X, Constant(integers(2, 2, 4, low=-3, high=3))], {"axis": 1}),
    Case("GatherND", [X, integers(5, 2, low=0, high=2)]),
    Case("GatherND", [X, integers(2, 5, 1, low=0, high=3)], {"batch_dims": 1}, name="batch"),
    Case("GatherND", [booleans(2, 3), integers(4, 2, low=0, high=2)], name="booleans"),
    Case("ScatterND", [X, Constant(np.array([[1, 0], [0, 2]])), floats(2, 4)]),
    Case("ScatterND", [X, Constant(np.array([[1, 0], [1, 0]])), floats(2, 4)], {"reduction": "add"}, name="add"),
    Case("ScatterElements", [X, Constant(np.array([[[2, 0, -1, 1]]] * 2)), floats(2, 1, 4)], {"axis": 1}),
    Case("ScatterElements", [X, Constant(np.array([[[2, 0, 0, 1], [2, 1, 0, 0]]] * 2)), floats(2, 2, 4)],
         {"axis": 1, "reduction": "max"}, name="max"),
    Case("OneHot", [integers(3, low=0, high=5), Constant(np.array(5)), Constant(np.array([-1, 2], np.float32))]),
    Case("OneHot", [integers(2, 3, low=0, high=5), Constant(np.array(5)), Constant(np.array([0, 1]))], {"axis": 0},
         name="integers"),
]  # fmt: skip

RECURRENT = [
    Case("LSTM", LSTM, {"hidden_size": 4}, outputs=3),
    Case("LSTM", [*LSTM, None, STATE, STATE], {"hidden_size": 4, "direction": "reverse"}, outputs=3, name="reverse"),
    Case("LSTM", [floats(5, 2, 3), *(Constant(floats(2, *shape)) for shape in ((16, 3), (16, 4), (32,))), None,
                  floats(2, 2, 4), floats(2, 2, 4)],
         {"hidden_size": 4, "direction": "bidirectional"}, outputs=3, name="bidirectional"),
    Case("LSTM", LSTM[:3], {"hidden_size": 4}, outputs=1, name="bare"),
    Case("GRU", [floats(5, 2, 3), *(Constant(floats(1, *shape)) for shape in ((12, 3), (12, 4), (24,))), None, STATE],
         {"hidden_size": 4, "linear_before_reset": 1}, outputs=2),
    Case("GRU", [floats(5, 2, 3), *(Constant(floats(1, *shape)) for shape in ((12, 3), (12, 4)))],
         {"hidden_size": 4, "linear_before_reset": 1, "direction": "reverse"}, outputs=2, name="reverse"),
    Case("RNN", [floats(5, 2, 3), *(Constant(floats(1, *shape)) for shape in ((4, 3), (4, 4), (8,)))],
         {"hidden_size": 4}, outputs=2),
]  # fmt: skip

SCALE, ZERO = scalar(0.05), Constant(np.array(3, np.uint8))
QUANTIZED = [
    Case("DequantizeLinear", [np.arange(12, dtype=np.uint8).reshape(3, 4), SCALE, ZERO]),
    Case("DequantizeLinear", [np.arange(12, dtype=np.int8).reshape(3, 4), Constant(positive(4))], {"axis": 1},
         name="channels"),
    Case("QuantizeLinear", [X * 9, SCALE, ZERO]),
    Case("QuantizeLinear", [X * 9, Constant(positive(3)), Constant(np.array([-3, 0, 5], np.int8))], {"axis": 1},
         name="channels"),
    Case("QuantizeLinear", [X * 9, SCALE], name="default"),
]  # fmt: skip

CASES = [*ELEMENTWISE, *LAYERS, *REDUCTIONS, *MOVEMENT, *INDEXING, *RECURRENT, *QUANTIZED]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rule_computes_what_onnx_runtime_does(case: Case, tmp_path: Path, seen: set[str]):
    model, feeds = case.model()
    written = assert_same(model, feeds, tmp_path)
    assert examine(written).faults == ()
    seen.update(one.type for one in read_package(written).block.walk())


@pytest.fixture(scope="module")
def seen() -> set[str]:
    return set()


def test_every_rule_has_a_case(seen: set[str]):
    assert {case.op for case in CASES} | {"If"} == set(RULES)  # If: test_package
    if len(seen) > len(RULES) // 2:  # all cases were run
        assert {name for name in SEMANTICS if not name.startswith("constexpr_")} <= seen


REFUSED = [
    (Case("Loop", []), "Loop has no form in ML Programs: loops of a known length"),
    (Case("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 2]}), "windows with gaps"),
    (Case("TopK", [X, fixed(2)], {"sorted": 0}, outputs=2), "the order of the elements is left open"),
    (Case("Mod", [X, floats(4)], {"fmod": 1}), "fmod=1"),
    (Case("Exp", [X.astype(np.float64)]), "is DOUBLE, which ML Programs do not have"),
    (Case("Relu", [floats(1, 1, 1, 1, 2, 2)]), "has 6 axes, and Core ML has at most 5"),
    (Case("Reshape", [X, np.array([4, 6])]), "the sizes of 'out0' are not known"),
    (Case("GRU", [floats(5, 2, 3), *(Constant(floats(1, *shape)) for shape in ((12, 3), (12, 4)))],
          {"hidden_size": 4}, outputs=2), "put unroll-recurrent before"),
    (Case("Resize", [IMAGE, None, None, fixed(1, 4, 3, 3)], {"mode": "linear", "antialias": 1}), "antialiasing"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=lambda one: str(one)[:40])
def test_what_has_no_form_is_told_in_one_line(case: Case, reason: str, tmp_path: Path):
    from qgraph.errors import UserError

    if case.op == "Loop":
        import onnx_ir as ir

        model = ir.from_onnx_text("""
            <ir_version: 10, opset_import: ["" : 21]>
            g (float[2] x, bool c) => (float[2] y) <int64 n = {3}> {
                y = Loop (n, c, x) <body = b (int64 i, bool k, float[2] s) => (bool l, float[2] t) {
                    l = Identity (k) t = Neg (s) }>
            }
        """)
    else:
        model, _ = case.model()
    with pytest.raises(UserError) as told:
        from package_build import package

        package(model, tmp_path)
    assert reason in str(told.value)
    assert "\n" not in str(told.value)
