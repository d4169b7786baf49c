"""`qdq`: golden graphs, the kernels that ONNX Runtime makes of them, what the numbers lose, and what stays in float.

A golden file `tests/golden/qdq/<case>.onnxtxt` holds a model's text, `---`, and its text after the pass, without the
values of constants. Inputs whose names do not begin with `x` are constants. A first line `# ...` gives the pipeline.
QGRAPH_UPDATE_GOLDEN=1 writes the second part anew.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden_rewrites import is_after, structure, what_to_do
from onnx.reference import ReferenceEvaluator

from qgraph.errors import UserError
from qgraph.passes import Qdq
from qgraph.pipeline import Context, Feeds, Pipeline, Report

GOLDEN = Path(__file__).parent.parent / "golden" / "qdq"
CONSTANTS = {
    "k_low": np.float32(0),
    "k_high": np.float32(6),
    "k_zero": np.float32(0),
    "k_three": np.float32(3),
    "k_six": np.float32(6),
    "i_starts": np.array([0, 2]),
    "i_ends": np.array([8, 6]),
    "i_axes": np.array([1, 2]),
    "i_pads": np.array([0, 0, 0, 0, 0, 0, 0, 0]),
    "i_shape": np.array([1, 8, 8, 4]),
    "i_scales": np.array([1, 1, 1, 2], np.float32),
    "i_axis": np.array([1]),
    "i_zero": np.array([0]),
    "i_eight": np.array([8]),
}
KERNELS: dict[str, dict[str, int]] = {
    "clamp-with-other-readers": {"QLinearConv": 3, "QLinearAdd": 1, "Clip": 1},
    "concat-of-what-others-read": {"QLinearConv": 3, "QLinearConcat": 1},
    "concat-shares-its-scale": {"QLinearConv": 3, "QLinearConcat": 1, "Clip": 1},
    "constant-operands": {"QLinearConv": 2, "QLinearAdd": 1, "QLinearMul": 1},
    "conv-channels-of-their-own": {"QLinearConv": 1},
    "conv-clip": {"QLinearConv": 2},
    "conv-one-dimension": {"QLinearConv": 2},
    "conv-relu": {"QLinearConv": 1},
    "excluded": {"QLinearConv": 2, "Conv": 1},
    "four-bits": {"QLinearConv": 2, "MatMulIntegerToFloat": 1},
    "gemm": {"QGemm": 2},
    "hard-sigmoid-gate": {"QLinearConv": 2, "QLinearAdd": 1, "QLinearMul": 1},
    "leaky-relu": {"QLinearConv": 2, "QLinearLeakyRelu": 1},
    "logarithm": {"QLinearConv": 1, "Conv": 1, "Abs": 1, "Log": 1},
    "matmul": {"QLinearMatMul": 1, "MatMulIntegerToFloat": 1},
    "movers": {"QLinearConv": 2},
    "output-inside": {"QLinearConv": 2},
    "per-tensor": {"QLinearConv": 1},
    "pools": {"QLinearConv": 1, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "product-of-activations": {"QLinearMatMul": 4, "QLinearSoftmax": 1, "MatMulIntegerToFloat": 1},
    "residual": {"QLinearConv": 3, "QLinearAdd": 1},
    "shared-weights": {"QLinearConv": 2},
    "sigmoid-gate": {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1},
    "split": {"QLinearConv": 3, "QLinearConcat": 1},
    "symmetric-signed": {"QLinearConv": 2, "Relu": 1},
    "table": {"QLinearConv": 1},
    "tail-in-float": {"QLinearConv": 2, "Sigmoid": 1, "Concat": 1},
}
"""The kernels of the graph that ONNX Runtime runs; what only moves elements or changes between integers and floats
is left out. The counts are exact: anything else in the graph fails the test."""
LEAST_SQNR = {"four-bits": 14, "matmul": 23, "product-of-activations": 17, "tensorrt-float8": 16}
FREE = {
    "DepthToSpace",
    "DequantizeLinear",
    "Flatten",
    "Gather",
    "MaxPool",
    "NhwcMaxPool",
    "Pad",
    "QuantizeLinear",
    "ReorderInput",
    "ReorderOutput",
    "Reshape",
    "Resize",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
FLOAT_NAMES = {"FusedConv": "Conv"}


def load(path: Path) -> tuple[str, ir.Model]:
    """Return the pipeline and the model, with its constants filled in."""
    pipeline, text = what_to_do(path, "qdq")
    return pipeline, filled(text)


def filled(text: str) -> ir.Model:
    """Read a model and turn the inputs that do not begin with x into constants."""
    proto = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    for value in list(proto.graph.input):
        if value.name.startswith("x"):
            continue
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = CONSTANTS.get(value.name)
        if array is None:
            array = generator.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[1:], dtype=np.float32))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), value.name))
        proto.graph.input.remove(value)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True))


def samples(model: ir.Model, count: int = 8, seed: int = 0) -> list[Feeds]:
    generator = np.random.default_rng(seed)

    def array(value: ir.Value) -> np.ndarray:
        assert value.shape is not None
        shape = [dim if isinstance(dim, int) else 2 for dim in value.shape]
        if value.dtype == ir.DataType.INT64:
            return generator.integers(0, 1024, shape)
        return generator.normal(size=shape).astype(np.float32)

    return [{value.name or "": array(value) for value in model.graph.inputs} for _ in range(count)]


def open_session(model: ir.Model, optimised: Path | None = None):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if any(value.dtype == ir.DataType.FLOAT8E4M3FN for value in model.graph.initializers.values()):
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # its rules are for integers
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def sqnr(exact: np.ndarray, other: np.ndarray) -> float:
    noise = np.sum(np.square(exact.astype(np.float64) - other))
    return float(10 * np.log10(np.sum(np.square(exact, dtype=np.float64)) / noise)) if noise else np.inf


def quantize(model: ir.Model, pipeline: str = "qdq") -> Report:
    return Pipeline.parse(pipeline).run(model, calibration=samples(model)).parts[0]


FILES = sorted(GOLDEN.glob("*.onnxtxt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path, tmp_path: Path) -> None:
    pipeline, model = load(path)
    feeds = samples(model, seed=1)
    source = open_session(model)
    exact = [source.run(None, feed) for feed in feeds]
    signature = [(value.name, value.type, value.shape) for value in model.graph.outputs]

    report = quantize(model, pipeline)

    is_after(path, structure(model))
    assert (report.changed > 0) == (not path.stem.startswith("not-")), "cases that stay are called not-..."
    assert [(value.name, value.type, value.shape) for value in model.graph.outputs] == signature
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)

    session = open_session(model, tmp_path / "optimised.onnx")
    results = [session.run(None, feed) for feed in feeds]
    for index in range(len(signature)):
        one, other = (np.stack([run[index] for run in runs]) for runs in (exact, results))
        assert sqnr(one, other) >= LEAST_SQNR.get(path.stem, 27)
    if path.stem in KERNELS:
        counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
        kernels = {FLOAT_NAMES.get(op, op): count for op, count in counts.items() if op not in FREE}
        assert kernels == KERNELS[path.stem]

    again = quantize(model, pipeline)
    assert again.changed == 0
    assert ir.to_proto(model) == proto


def test_split_parts_keep_their_range() -> None:
    """A part that only a Concat reads must not lend the Concat's range to the parts that others read."""
    _, model = load(GOLDEN / "split.onnxtxt")
    weight = model.graph.initializers["w"]
    array = weight.const_value.numpy().copy()
    array[4:] *= 100  # the part that goes through a convolution; the Concat never sees it as it is
    weight.const_value = ir.tensor(array, name="w")
    c = [np.einsum("nchw,oc->nohw", feed["x"], array[:, :, 0, 0]) for feed in samples(model)]

    quantize(model, "qdq{method=minmax}")

    node = next(node for node in model.graph if node.name == "c_q")
    np.testing.assert_allclose(node.inputs[1].const_value.numpy(), np.ptp(c) / 255, rtol=1e-5)


def outputs(model: ir.Model, seed: int = 1) -> np.ndarray:
    session = open_session(model)
    return np.stack([session.run(None, feed)[0] for feed in samples(model, seed=seed)])


CONV = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n,8,8,8] x, float[8,8,1,1] w, float[8] b) => (float[n,8,8,8] y) {
    [one] c = Conv (x, w, b)
    [two] y = Conv (c, w, b)
}
"""


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ("", 33),
        ("{activations=int8}", 33),
        ("{weights=uint8}", 33),
        ("{symmetric=true}", 33),
        ("{per_channel=false}", 33),
        ("{reduce_range=true}", 30),
        ("{method=percentile}", 33),
        ("{method=moving-average}", 30),
        ("{method=entropy}", 25),
        ("{method=minmax}", 35),
    ],
)
def test_options(options: str, least: float, tmp_path: Path) -> None:
    model = filled(CONV)
    exact = outputs(model)

    quantize(model, f"qdq{options}")

    assert sqnr(exact, outputs(model)) >= least
    open_session(model, tmp_path / "optimised.onnx")
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert counts["QLinearConv"] == 2, "falls to float"
    stored = model.graph.initializers["w_q"].const_value.numpy().astype(int) - 128 * ("weights=uint8" in options)
    assert np.abs(stored).max() == (63 if "reduce" in options else 128 if "weights=uint8" in options else 127)


def test_shared_weight_is_stored_once_and_fits_both_biases() -> None:
    model = filled(CONV)
    model.graph.initializers["b"].const_value = ir.tensor(np.full(8, 1e5, np.float32), name="b")
    weight = model.graph.initializers["w"].const_value.numpy().copy()
    weight[3] = 0  # a scale that no bias would fit
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    exact = outputs(model)

    quantize(model)

    assert [name for name in model.graph.initializers if name.startswith("w_q")] == ["w_q"]
    assert "w" not in model.graph.initializers
    assert sqnr(exact, outputs(model)) >= 35


CLAMPED_OUTPUT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n,8,8,8] x, float[8,8,1,1] w) => (float[n,8,8,8] y) <float low = {0}, float high = {6}> {
    a = Conv (x, w)
    y = Clip (a, low, high)
}
"""


def test_an_output_may_be_clamped_in_integers() -> None:
    model = filled(CLAMPED_OUTPUT)
    feeds = [{"x": np.zeros((1, 8, 8, 8), np.float32)}]  # a scale of 1, at which integers go beyond 6
    Pipeline.parse("qdq").run(model, context=Context(calibration=feeds, threads=1))
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    assert "Clip" in [node.op_type for node in made.graph.node]
    (y,) = ReferenceEvaluator(made).run(["y"], {"x": np.full((1, 8, 8, 8), 100, np.float32)})
    assert y.max() == 6
    assert y.min() == 0


ROUNDED = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n,8,8,8] x, float[8] b) => (float[n,8,8,8] y) <int8[8,8,1,1] q, float[8] s, int8[8] z> {
    w = DequantizeLinear <axis: int = 0> (q, s, z)
    [one] c = Conv (x, w, b)
    [two] y = Conv (c, w, b)
}
"""


def rounded(dtype: ir.DataType = ir.DataType.INT8, zero_point: int = 0) -> ir.Model:
    """Return a model whose weight was rounded before; both layers read it."""
    model = filled(ROUNDED)
    generator = np.random.default_rng(1)
    largest = 7 if dtype == ir.DataType.INT4 else 127
    arrays = {
        "q": generator.integers(-largest, largest + 1, (8, 8, 1, 1)).astype(dtype.numpy()),
        "s": (generator.uniform(0.5, 1.0, 8) / largest).astype(np.float32),
        "z": np.full(8, zero_point).astype(dtype.numpy()),
    }
    for name, array in arrays.items():
        value = next(one for node in model.graph for one in node.inputs if one is not None and one.name == name)
        value.type, value.const_value = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("dtype", [ir.DataType.INT8, ir.DataType.INT4])
def test_weights_that_were_rounded_before_stay(dtype: ir.DataType, tmp_path: Path) -> None:
    model = rounded(dtype)
    exact = outputs(model)
    codes = model.graph.initializers["q"].const_value.numpy()

    report = quantize(model, "qdq,widen-weights")

    assert report.changed == 2
    assert model.graph.initializers["q"].const_value.numpy().tobytes() == codes.tobytes()
    assert sqnr(exact, outputs(model)) >= 33
    open_session(model, tmp_path / "optimised.onnx")
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert counts["QLinearConv"] == 2, "falls to float"
    assert quantize(model, "qdq,widen-weights").changed == 0


def test_a_rounded_weight_gives_way_to_its_bias() -> None:
    model = rounded()
    scale = model.graph.initializers["s"]
    scale.const_value = ir.tensor(np.where(np.arange(8) == 3, 1e-12, scale.const_value.numpy()).astype(np.float32))
    model.graph.initializers["b"].const_value = ir.tensor(np.full(8, 10, np.float32), name="b")
    exact = outputs(model)
    weight = model.graph.initializers["q"].const_value.numpy() * scale.const_value.numpy()[:, None, None, None]

    quantize(model)

    assert sqnr(exact, outputs(model)) >= 33
    node = next(one for one in model.graph if one.name == "one").inputs[1].producer()
    codes, raised = (value.const_value.numpy() for value in node.inputs[:2])
    assert raised[3] > 1e-12
    np.testing.assert_array_equal(np.delete(raised, 3), np.delete(scale.const_value.numpy(), 3))
    error = np.abs(codes * raised[:, None, None, None] - weight).max(axis=(1, 2, 3))
    assert (error <= 0.5 * raised).all(), "the numbers of the raised channel still stand for the old scale"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("axis", "its weight has its scales along the inputs"),
        ("zero point", "its weight has zero points"),
        ("uint8", "its weight is stored as uint8, not as int8"),
    ],
)
def test_rounded_weights_without_a_kernel_say_so(change: str, reason: str) -> None:
    dtype = ir.DataType.UINT8 if change == "uint8" else ir.DataType.INT8
    model = rounded(dtype, zero_point=3 if change == "zero point" else 0)
    if change == "axis":
        node = next(one for one in model.graph if one.op_type == "DequantizeLinear")
        node.attributes["axis"] = ir.AttrInt64("axis", 1)

    report = quantize(model)

    assert report.changed == 0
    assert {name for name, _ in report.skipped} == {"one", "two"}
    assert all(one.reason.startswith(reason) for one in report.skipped)


def test_the_width_that_is_noted_counts() -> None:
    model = filled(
        CONV.replace("y = Conv (c, w, b)", "y = Conv (c, w2, b)").replace(
            ", float[8] b", ", float[8,8,1,1] w2, float[8] b"
        )
    )
    model.graph[0].metadata_props["qgraph.bits"] = "8"

    quantize(model, "qdq{weights=int4}")

    stored = {name: one.dtype for name, one in model.graph.initializers.items() if name in ("w_q", "w2_q")}
    assert stored == {"w_q": ir.DataType.INT8, "w2_q": ir.DataType.INT4}


def test_a_node_marked_for_float_stays_there() -> None:
    model = filled(CONV)
    model.graph[1].metadata_props.update({"qgraph.bits": "16", "qgraph.float": "it hurts"})

    report = quantize(model)

    assert [tuple(one) for one in report.skipped] == [("two", "it hurts")]


def test_four_bits_need_opset_21() -> None:
    with pytest.raises(UserError, match="needs opset 21, and the model has 20"):
        quantize(filled(CONV.replace('"" : 21', '"" : 20')), "qdq{weights=int4}")


def test_names_and_reasons() -> None:
    model = filled(CONV)

    report = quantize(model, 'qdq{exclude=["tw?","three"]}')

    assert report.changed == 1
    assert [tuple(one) for one in report.skipped] == [("two", "it is excluded")]
    assert "exclude: no node is called 'three'" in report.notes
    assert {node.name: node.metadata_props["qgraph.float"] for node in model.graph if node.metadata_props} == {
        "two": "it is excluded"
    }


def test_only_some_operators() -> None:
    _, model = load(GOLDEN / "residual.onnxtxt")

    report = quantize(model, "qdq{ops=[Conv,Relu]}")

    assert ("Add->e", "Add is not among 'ops'") in [tuple(one) for one in report.skipped]
    assert "QuantizeLinear" in {node.op_type for node in model.graph}


def test_unknown_operator_is_refused() -> None:
    with pytest.raises(UserError, match=r"Cnov cannot be quantized. Did you mean 'Conv'\?"):
        Pipeline.parse("qdq{ops=[Cnov]}")


def test_old_opset_is_refused() -> None:
    model = filled(CONV.replace('"" : 21', '"" : 11'))
    with pytest.raises(UserError, match="put convert-opset before it"):
        quantize(model)


def test_needs_calibration_only_when_there_is_something_to_quantize() -> None:
    with pytest.raises(UserError, match="needs calibration data"):
        Pipeline([Qdq()]).run(filled(CONV))
    idle = filled('<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Relu (x) }')
    assert Qdq().apply(idle, Context()).changed == 0


MASKED = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n,8] x, float[8,8] w, float k_mask) => (float[n,8] y) {
    a = MatMul (x, w)
    [masked] m = Add (a, k_mask)
    s = Softmax (m)
    y = MatMul (s, w)
}
"""


def test_masks_are_left_in_float() -> None:
    proto = ir.to_proto(filled(MASKED))
    mask = next(one for one in proto.graph.initializer if one.name == "k_mask")
    mask.CopyFrom(onnx.numpy_helper.from_array(np.array([0] * 7 + [-3.4e38], np.float32), "k_mask"))
    model = ir.from_proto(proto)
    exact = outputs(model)

    report = quantize(model)

    assert "as masks do" in dict(report.skipped)["masked"]
    assert sqnr(exact, outputs(model)) >= 18


def test_weights_without_a_scale_for_their_bias_stay_in_float() -> None:
    model = filled(CONV)
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1e30), name="w")
    for feed in (feeds := samples(model)):
        feed["x"] = feed["x"] * np.float32(1e-20)

    report = Pipeline([Qdq()]).run(model, calibration=feeds)

    assert report.changed == 0
    assert any("too far for the scale of its bias" in one.reason for one in report.skipped)


def test_infinities_inside_stay_in_float() -> None:
    text = MASKED.replace("Add (a, k_mask)", "Mul (a, a2)").replace(
        "a = MatMul (x, w)", "a = MatMul (x, w)\n    a2 = MatMul (x, k_huge)"
    )
    model = filled(text.replace("float k_mask", "float[8,8] k_huge"))
    huge = model.graph.initializers["k_huge"]
    huge.const_value = ir.tensor(np.full((8, 8), 1e35, np.float32), name="k_huge")

    report = quantize(model)

    reasons = dict(report.skipped)
    assert "reaches 1e+35, too far" in reasons["MatMul->a2"]
    assert "DequantizeLinear" not in {node.op_type for node in model.graph if node.name == "masked"}


def test_subgraphs_are_skipped_with_the_reason() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n,8,8,8] x, bool x_which, float[8,8,1,1] w) => (float[n,8,8,8] y) {
        c = Conv (x, w)
        y = If (x_which) <
            then_branch = a () => (float[n,8,8,8] t) { [inside] t = Conv (c, w) },
            else_branch = b () => (float[n,8,8,8] e) { e = Identity (c) }
        >
    }
    """
    model = filled(text)
    feeds = [{**feed, "x_which": np.asarray(True)} for feed in _floats(model)]

    report = Pipeline([Qdq()]).run(model, calibration=feeds).parts[0]

    assert ("inside", "it is inside a subgraph, which calibration does not see") in [
        tuple(one) for one in report.skipped
    ]
    assert report.changed == 1
    open_session(model).run(None, feeds[0])


def _floats(model: ir.Model) -> list[Feeds]:
    generator = np.random.default_rng(0)
    return [{"x": generator.normal(size=(2, 8, 8, 8)).astype(np.float32)} for _ in range(4)]


def test_large_weights_are_computed_when_written() -> None:
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    model = filled(f"{head} g (float[n,1024] x, float[1024,1100] w) => (float[n,1100] y) {{ y = MatMul (x, w) }}")
    exact = outputs(model)

    quantize(model)

    stored = model.graph.initializers["w_q"].const_value
    assert isinstance(stored, ir.LazyTensor)
    assert stored.nbytes == 1024 * 1100
    assert sqnr(exact, outputs(model)) >= 30


def test_same_input_gives_the_same_bytes() -> None:
    models = [load(GOLDEN / "residual.onnxtxt")[1] for _ in range(2)]
    for model in models:
        quantize(model)
    assert len({ir.to_proto(model).SerializeToString(deterministic=True) for model in models}) == 1


def test_constant_operands_must_fit() -> None:
    _, model = load(GOLDEN / "constant-operands.onnxtxt")
    uneven = np.full((1, 8, 8, 8), 10, np.float32)
    uneven[0, 0, 0, 0] = 0.01
    model.graph.initializers["k_six"].const_value = ir.tensor(uneven, name="k_six")
    model.graph.initializers["k_six"].shape = ir.Shape(uneven.shape)

    report = quantize(model)

    assert "does not fit into 8 bits" in dict(report.skipped)["Div->d"]
