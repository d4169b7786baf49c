"""`bias-correction`: golden graphs, mean errors against full runs of both models, and what it must leave alone.

A golden file `tests/golden/bias-correction/<case>.onnxtxt` holds a model's text before quantization, `---`, and its
text after `qdq,bias-correction` (a first line `# ...` gives other passes), without the values of constants. Inputs
whose names do not begin with `x` are constants. QGRAPH_UPDATE_GOLDEN=1 writes the second part anew.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from golden_rewrites import is_after, structure, what_to_do

from qgraph import models
from qgraph.analysis.paired_layers import PairedLayer, paired_layers
from qgraph.errors import UserError
from qgraph.numerics.bias_correction import Errors, bias_shift
from qgraph.numerics.quantize import Parameters, dequantize, quantize
from qgraph.numerics.schemes import UINT8
from qgraph.passes import BiasCorrection
from qgraph.pipeline import Context, Feeds, Pipeline, Report
from qgraph.targets.cpu_int8 import CpuInt8

GOLDEN = Path(__file__).parent.parent / "golden" / "bias-correction"
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'

RESIDUAL = f"""
{HEADER}
residual (float[N, 8, 6, 6] x, float[8, 8, 3, 3] k, float[8] k_bias, float[8, 1, 3, 3] d, float[8, 8, 1, 1] p)
    => (float[N, 8, 6, 6] y)
{{
    [stem] a = Conv <pads = [1, 1, 1, 1]> (x, k, k_bias)
    b = Relu (a)
    [depthwise] c = Conv <pads = [1, 1, 1, 1], group = 8> (b, d)
    e = Relu (c)
    [project] f = Conv (e, p)
    [sum] y = Add (b, f)
}}
"""
GATE = f"""
{HEADER}
gate (float[N, 8, 6, 6] x, float[8, 8, 1, 1] k, float[8] k_bias, float[4, 8, 1, 1] r, float[4] r_bias,
      float[8, 4, 1, 1] w, float[8] w_bias, float[8, 8, 1, 1] p, float[8] p_bias) => (float[N, 8, 6, 6] y)
{{
    [expand] a = Conv (x, k, k_bias)
    h = HardSwish (a)
    s = GlobalAveragePool (h)
    [reduce] t = Conv (s, r, r_bias)
    u = Relu (t)
    [widen] v = Conv (u, w, w_bias)
    g = HardSigmoid <alpha = 0.16666667, beta = 0.5> (v)
    m = Mul (h, g)
    [project] y = Conv (m, p, p_bias)
}}
"""
BRANCHES = f"""
{HEADER}
branches (float[N, 6, 6, 6] x, float[8, 6, 1, 1] k, float[8] k_bias, float[4, 8, 1, 1] l, float[4] l_bias,
          float[4, 8, 3, 3] r, float[4] r_bias, float[5, 8, 1, 1] p, float[5] p_bias, float[7, 5] w, float[7] w_bias)
    => (float[N, 7] y)
{{
    [squeeze] a = Conv (x, k, k_bias)
    b = Relu (a)
    [left] c = Conv (b, l, l_bias)
    d = Relu (c)
    [right] e = Conv <pads = [1, 1, 1, 1]> (b, r, r_bias)
    f = Relu (e)
    j = Concat <axis = 1> (d, f)
    [after] o = Conv (j, p, p_bias)
    q = Relu (o)
    s = GlobalAveragePool (q)
    t = Flatten (s)
    [classify] y = Gemm <transB = 1> (t, w, w_bias)
}}
"""
GRAPHS = {"residual": RESIDUAL, "gate": GATE, "branches": BRANCHES}


def filled(text: str, seed: int = 0) -> ir.Model:
    """Read a model and turn the inputs that do not begin with x into constants."""
    proto = onnx.parser.parse_model(text)
    generator = np.random.default_rng(seed)
    for value in list(proto.graph.input):
        if value.name.startswith("x"):
            continue
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = generator.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[1:], dtype=np.float32))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        proto.graph.input.remove(value)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True))


def samples(model: ir.Model, count: int = 24, seed: int = 1) -> list[Feeds]:
    generator = np.random.default_rng(seed)
    (x,) = model.graph.inputs
    shape = [1 if isinstance(size, ir.SymbolicDim) else size for size in x.shape]
    return [{"x": (generator.normal(size=shape) + 0.3).astype(np.float32)} for _ in range(count)]


def compress(model: ir.Model, text: str, feeds: list[Feeds] | None = None) -> tuple[ir.Model, Context, Report]:
    """Run a pipeline over a copy; return it, the context with the reference, and the last pass's report."""
    context = Context(calibration=samples(model) if feeds is None else feeds, threads=1)
    copy = model.clone()
    report = Pipeline.parse(text).run(copy, context=context)
    return copy, context, report.parts[-1]


def values_of(model: ir.Model, names: list[str], feeds: list[Feeds]) -> list[np.ndarray]:
    """Run a whole model with the values `names` put out, and return each on all samples."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.concatenate(arrays) for arrays in zip(*(session.run(names, feed) for feed in feeds), strict=True)]


def mean_errors(
    model: ir.Model, context: Context, feeds: list[Feeds], *, behind: bool = False
) -> dict[str, np.ndarray]:
    """Return the mean over all samples and positions of exact minus quantized output, by layer: two full runs.

    `behind`: of what the activation that follows makes of it.
    """
    layers, _ = paired_layers(model, context.reference)
    exact = values_of(context.reference, [layer.twin_last.outputs[0].name for layer in layers], feeds)
    rounded = values_of(model, [layer.output.name for layer in layers], feeds)
    result = {}
    for layer, one, other in zip(layers, exact, rounded, strict=True):
        passed = layer.activation if behind and layer.activation is not None else np.asarray
        error = np.moveaxis(passed(one).astype(np.float64) - passed(other), layer.axis, 0)
        result[layer.name] = error.reshape(len(error), -1).mean(axis=1)
    return result


def steps_of(model: ir.Model, context: Context) -> dict[str, np.ndarray]:
    """Return the step of each layer's int32 bias."""
    steps = {}
    for layer in paired_layers(model, context.reference)[0]:
        bias = layer.last.inputs[layer.bias]
        steps[layer.name] = np.asarray(bias.producer().inputs[1].const_value.numpy()).astype(np.float64)
    return steps


def initializers(model: ir.Model) -> dict[str, bytes]:
    return {name: value.const_value.tobytes() for name, value in model.graph.initializers.items()}


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.onnxtxt")), ids=lambda path: path.stem)
def test_golden(path: Path):
    pipeline, text = what_to_do(path, "qdq,bias-correction")
    model, context, report = compress(filled(text), pipeline)
    is_after(path, structure(model))
    assert (report.changed > 0) == (not path.stem.startswith("not-")), "cases that stay are called not-..."
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    again = Pipeline.parse(pipeline.rpartition(",")[2]).run(model, context=context).parts[0]
    assert again.changed == 0
    assert ir.to_proto(model) == proto


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", ["true", "false"])
@pytest.mark.parametrize("name", GRAPHS)
def test_full_leaves_no_mean_error_but_what_an_integer_cannot_mend(name: str, per_channel: str):
    model = filled(GRAPHS[name])
    feeds = samples(model)
    text = f"qdq{{per_channel={per_channel}}}"
    plain, before, _ = compress(model, text, feeds)
    mended, context, _ = compress(model, f"{text},bias-correction{{method=full,significance=0}}", feeds)
    assert mean_errors(plain, before, feeds).keys() == mean_errors(mended, context, feeds).keys()
    left = mean_errors(mended, context, feeds, behind=True)
    for layer, error in mean_errors(plain, before, feeds, behind=True).items():
        assert np.abs(error).max() > 1e-4, "quantization left nothing to correct"
        assert (np.abs(left[layer]) <= 0.02 * np.abs(error).max() + steps_of(mended, context)[layer]).all(), layer


def test_positions_that_are_drawn_stand_for_all_of_a_large_image():
    model = filled(RESIDUAL.replace("6, 6]", "48, 40]"))
    feeds = samples(model, 6)
    plain, before, _ = compress(model, "qdq{weights=int4}", feeds)
    mended, context, _ = compress(model, "qdq{weights=int4},bias-correction{method=full,significance=0}", feeds)
    left = mean_errors(mended, context, feeds, behind=True)
    for layer, error in mean_errors(plain, before, feeds, behind=True).items():
        assert np.square(left[layer]).sum() <= 0.01 * np.square(error).sum(), layer


@pytest.mark.parametrize("name", GRAPHS)
def test_full_is_what_full_runs_for_each_layer_give(name: str):
    model = with_zero_biases(filled(GRAPHS[name]))
    feeds = samples(model)
    mended, context, _ = compress(model, "qdq{weights=int4},bias-correction{method=full,significance=0}", feeds)
    slow, _, _ = compress(model, "qdq{weights=int4}", feeds)
    twins = {node.name: node for node in mended.graph}
    for layer in paired_layers(slow, context.reference)[0]:
        integers = layer.last.inputs[layer.bias].producer().inputs[0]
        before, step = stored(layer.last.inputs[layer.bias]), steps_of(slow, context)[layer.name]
        exact = values_of(context.reference, [layer.twin_last.outputs[0].name], feeds)[0]
        slope = np.ones(layer.channels)
        if layer.activation is not None:
            slope = layer.activation.slope(np.moveaxis(exact, 1, 0)).reshape(layer.channels, -1).mean(axis=1)
        for _ in range(12):  # each step is measured by two runs of everything
            error = mean_errors(slow, context, feeds, behind=True)[layer.name]
            more = np.rint(np.clip(error / np.maximum(slope, 0.2), -0.3, 0.3) / step).astype(np.int32)
            integers.const_value = ir.tensor(integers.const_value.numpy() + more, name=integers.name)
            if np.abs(error).max() < 5e-4:
                break
        wanted, got = (stored(value) - before for value in (layer.last.inputs[2], twins[layer.node.name].inputs[2]))
        alive = slope > 0.2
        # Channels that the activation lets little pass of are shifted to match before it.
        np.testing.assert_allclose(got[alive], wanted[alive], atol=0.005 + 0.03 * np.abs(wanted).max())
        integers.const_value = ir.tensor(np.rint((before + got) / step).astype(np.int32), name=integers.name)


def with_zero_biases(model: ir.Model) -> ir.Model:
    """Return a copy in which every convolution has a bias."""
    copy = model.clone()
    for node in copy.graph:
        if node.op_type == "Conv" and len(node.inputs) < 3:
            name = f"{node.name}_bias"
            zeros = np.zeros(node.inputs[1].const_value.shape[0], np.float32)
            value = ir.Value(name=name, const_value=ir.tensor(zeros, name=name), type=ir.TensorType(ir.DataType.FLOAT))
            value.shape = ir.Shape(zeros.shape)
            copy.graph.register_initializer(value)
            node.resize_inputs(3)
            node.replace_input_with(2, value)
    return copy


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, group: int, pad: int) -> np.ndarray:
    """Return a convolution of stride 1, one output position after the other."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    outputs, depth, *kernel = weight.shape
    size = [x.shape[2] - kernel[0] + 1, x.shape[3] - kernel[1] + 1]
    y = np.zeros((len(x), outputs, *size))
    for channel, row, column in itertools.product(range(outputs), range(size[0]), range(size[1])):
        first = channel // (outputs // group) * depth
        window = x[:, first : first + depth, row : row + kernel[0], column : column + kernel[1]]
        y[:, channel, row, column] = (window * weight[channel]).sum(axis=(1, 2, 3)) + bias[channel]
    return y


def test_fast_is_the_layers_own_mean_error_on_exact_inputs():
    model = filled(RESIDUAL)
    feeds = samples(model, 6)
    plain, context, _ = compress(with_zero_biases(model), "qdq", feeds)
    mended, _, _ = compress(with_zero_biases(model), "qdq,bias-correction{significance=0}", feeds)
    for layer in paired_layers(plain, context.reference)[0]:
        exact_x, exact_y = (
            values_of(context.reference, [layer.twin.inputs[0].name, layer.twin.outputs[0].name], feeds)
            if layer.twin.inputs[0].producer()
            else (np.concatenate([feed["x"] for feed in feeds]), None)
        )
        if exact_y is None:
            (exact_y,) = values_of(context.reference, [layer.twin.outputs[0].name], feeds)
        _, scale, zero_point = (
            one if one is None else one.const_value for one in layer.node.inputs[0].producer().inputs
        )
        x = dequantize(quantize(exact_x, UINT8, Parameters(scale.numpy(), zero_point.numpy())))
        weight, bias = (stored(layer.node.inputs[index]) for index in (1, 2))
        group, pad = layer.node.attributes.get_int("group", 1), layer.node.attributes.get_ints("pads", [0])[0]
        error = (exact_y - convolve(x, weight, bias, group, pad)).mean(axis=(0, 2, 3))
        twin = next(node for node in mended.graph if node.name == layer.node.name)
        step = steps_of(plain, context)[layer.name]
        np.testing.assert_allclose(stored(twin.inputs[2]) - bias, error, atol=0.76 * step.max() + 1e-6)


def stored(value: ir.Value) -> np.ndarray:
    """Return what the integers behind a DequantizeLinear stand for."""
    integers, scale, *_ = (np.asarray(one.const_value.numpy()) for one in value.producer().inputs)
    return integers * scale.astype(np.float64).reshape(-1, *[1] * (integers.ndim - 1))


@pytest.mark.parametrize("method", ["fast", "full"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_second_run_finds_nothing_and_the_bytes_repeat(name: str, method: str):
    model = filled(GRAPHS[name])
    results = []
    for _ in range(2):
        mended, context, report = compress(model, f"qdq,bias-correction{{method={method}}}")
        assert report.changed > 0
        results.append(ir.to_proto(mended).SerializeToString(deterministic=True))
    assert results[0] == results[1]
    again = Pipeline([BiasCorrection(method=method)]).run(mended, context=context)
    assert again.changed == 0
    assert ir.to_proto(mended).SerializeToString(deterministic=True) == results[0]


def test_fast_does_not_undo_what_full_did():
    mended, context, _ = compress(filled(RESIDUAL), "qdq,bias-correction{method=full}")
    before = initializers(mended)
    report = Pipeline([BiasCorrection()]).run(mended, context=context).parts[0]
    assert report.changed == 0
    assert {skipped.reason for skipped in report.skipped} == {"method=full corrected it, for what comes before it too"}
    assert initializers(mended) == before


def test_values_in_files_give_the_same():
    model = filled(BRANCHES)
    feeds = samples(model)
    results = []
    for memory in (1 << 30, 1):
        copy = model.clone()
        context = Context(calibration=feeds, threads=1)
        Pipeline.parse("qdq").run(copy, context=context)
        context.calibration_memory = memory
        Pipeline.parse("bias-correction{method=full}").run(copy, context=context)
        results.append(initializers(copy))
    assert results[0] == results[1]


def test_samples_are_spread_and_bounded():
    model = filled(GATE)
    feeds = samples(model, 12)
    few, _, _ = compress(model, "qdq", feeds)
    context = Context(calibration=feeds[::3], threads=1, reference=model.clone())
    Pipeline.parse("bias-correction").run(few, context=context)
    bounded, _, _ = compress(model, "qdq,bias-correction{samples=4}", feeds)
    assert initializers(few) == initializers(bounded)


def test_batches_count_as_their_samples():
    model = filled(BRANCHES)
    feeds = samples(model, 12)
    together = [{"x": np.concatenate([feed["x"] for feed in feeds[start : start + 4]])} for start in (0, 4, 8)]
    ends = []
    for calibration in (feeds, together):
        context = Context(calibration=calibration, threads=1, reference=model.clone())
        quantized, _, _ = compress(model, "qdq", feeds)
        Pipeline.parse("bias-correction{method=full}").run(quantized, context=context)
        ends.append(values_of(quantized, ["y"], feeds)[0])
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-3)


# --- forms of biases --------------------------------------------------------------------------------------------------


def test_a_layer_without_a_bias_gets_one_of_integers():
    mended, _, _ = compress(filled(RESIDUAL), "qdq,bias-correction{significance=0}")
    for name in ("depthwise", "project"):
        node = next(node for node in mended.graph if node.name == name)
        integers, scale, zero_point = (one.const_value for one in node.inputs[2].producer().inputs)
        x_scale, w_scale = (node.inputs[index].producer().inputs[1].const_value.numpy() for index in (0, 1))
        assert integers.dtype == ir.DataType.INT32
        np.testing.assert_array_equal(scale.numpy(), np.float32(x_scale) * w_scale)
        assert not zero_point.numpy().any()
        assert np.abs(integers.numpy()).max() < 1 << 30
    kernels = optimised(mended)
    assert kernels.count("QLinearConv") == 3, "the new bias keeps the layer out of the integer kernel"


def optimised(model: ir.Model) -> list[str]:
    """Return the operators that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = "optimised.onnx"
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load("optimised.onnx").graph.node]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


SHARED = f"""
{HEADER}
shared (float[N, 4, 6, 6] x, float[4, 4, 1, 1] k, float[4, 4, 1, 1] l, float[4] b)
    => (float[N, 4, 6, 6] y, float[4] z)
{{
    [first] a = Conv (x, k, b)
    [second] c = Conv (x, l, b)
    y = Add (a, c)
    z = Identity (b)
}}
"""


def test_a_bias_with_other_readers_is_not_changed_for_them():
    model = filled(SHARED)
    kept = model.graph.initializers["b"].const_value.numpy().copy()
    mended, _, report = compress(model, "qdq,bias-correction{significance=0}")
    assert report.changed == 2
    assert np.array_equal(values_of(mended, ["z"], samples(model, 1))[0], kept)
    _, _, report = compress(model, "qdq{ops=[Conv]},bias-correction{exclude=[second],significance=0}")
    assert report.changed == 1
    assert [tuple(skipped) for skipped in report.skipped] == [("second", "it is excluded")]


TRANSPOSED = f"""
{HEADER}
transposed (float[N, 4, 5, 5] x, float[4, 3, 2, 2] k) => (float[N, 6, 6, 6] y)
{{
    [up] y = ConvTranspose <group = 2> (x, k)
}}
"""


def test_groups_of_a_transposed_convolution_share_scales():
    model = filled(TRANSPOSED)
    feeds = samples(model)
    quantized = model.clone()
    node = next(iter(quantized.graph))
    weight = node.inputs[1].const_value.numpy()
    scale = (np.abs(weight).max(axis=(0, 2, 3)) / 7).astype(np.float32)
    integers = np.clip(np.rint(weight / scale[:, None, None]), -7, 7).astype(np.int8)
    attach(quantized, node, 1, [integers, scale, np.zeros(3, np.int8)], axis=1)
    attach(quantized, node, 0, [None, np.float32(0.05), np.uint8(120)])
    context = Context(calibration=feeds, threads=1, reference=model)
    for method in ("fast", "full"):
        copy = quantized.clone()
        assert Pipeline([BiasCorrection(method=method, significance=0)]).run(copy, context=context).changed == 1
        bias = next(one for one in copy.graph if one.name == "up").inputs[2].producer()
        np.testing.assert_allclose(bias.inputs[1].const_value.numpy(), np.tile(np.float32(0.05) * scale, 2))
        (error,) = mean_errors(copy, context, feeds).values()
        assert np.abs(error).max() <= 0.76 * 0.05 * scale.max() + 1e-6


def attach(
    model: ir.Model, node: ir.Node, index: int, arrays: list[np.ndarray | None], axis: int | None = None
) -> None:
    """Let an input of `node` come from a DequantizeLinear, and from a QuantizeLinear before it where it moves."""
    values = []
    for number, array in enumerate(arrays):
        if array is None:
            values.append(None)
            continue
        name = f"stored_{index}_{number}"
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
        model.graph.register_initializer(value)
        values.append(value)
    if values[0] is None:
        rounding = ir.node("QuantizeLinear", [node.inputs[index], *values[1:]], name=f"q_{index}")
        rounding.outputs[0].name = f"q_{index}"
        model.graph.insert_before(node, rounding)
        values[0] = rounding.outputs[0]
    back = ir.node("DequantizeLinear", values, {} if axis is None else {"axis": axis}, name=f"dq_{index}")
    back.outputs[0].name = f"dq_{index}"
    model.graph.insert_before(node, back)
    node.replace_input_with(index, back.outputs[0])


PRODUCTS = f"""
{HEADER}
products (float[N, 5, 16] x, float[16, 12] w, float[12] w_bias, float[12, 9] v, float[9, 7] u, float[7] u_bias)
    => (float[N, 5, 7] y)
{{
    [biased] a = MatMul (x, w)
    [add] b = Add (w_bias, a)
    c = Relu (b)
    [bare] d = MatMul (c, v)
    e = Relu (d)
    [last] f = MatMul (e, u)
    [sum] y = Add (f, u_bias)
}}
"""


@pytest.mark.parametrize("method", ["fast", "full"])
def test_a_product_is_shifted_where_an_add_follows(method: str):
    model = filled(PRODUCTS)
    feeds = samples(model)
    plain, before, _ = compress(model, "qdq", feeds)
    mended, context, report = compress(model, f"qdq,bias-correction{{method={method},significance=0}}", feeds)
    assert [tuple(skipped) for skipped in report.skipped] == [
        ("bare", "it has no bias, and an Add of one would cost time")
    ]
    errors = [mean_errors(*pair, feeds) for pair in ((plain, before), (mended, context))]
    assert errors[0].keys() == {"biased", "last"}
    assert np.square(errors[1]["last"]).sum() < np.square(errors[0]["last"]).sum()


def test_float_biases_of_rounded_weights_are_shifted_too():
    model = filled(PRODUCTS)
    feeds = samples(model)
    text = "rtn{bits=3,group=16,min_elements=1}"
    mended, context, report = compress(model, f"{text},bias-correction{{method=full,significance=0}}", feeds)
    assert report.changed == 2
    left = mean_errors(mended, context, feeds, behind=True)
    assert np.abs(left["biased"]).max() < 2e-3
    assert np.abs(left["last"]).max() < 2e-3


def test_a_layer_in_float16_stays_where_nothing_tells_its_type_but_its_weight():
    text = TRANSPOSED.replace("[N, 6, 6, 6] y", "[N, 3, 6, 6] z").replace("<group = 2> (x, k)", "(x, k) z = Relu (y)")
    model = filled(text)
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in samples(model)]
    weight = next(iter(model.graph)).inputs[1]
    weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float16), name=weight.name)
    for value in (*model.graph.inputs, *model.graph.outputs, weight):
        value.dtype = ir.DataType.FLOAT16
    next(iter(model.graph)).outputs[0].type = None
    mended, _, report = compress(model, "adaround{bits=3,steps=5},bias-correction{significance=0}", feeds)
    assert [one.reason for one in report.skipped] == ["its output is not float32"]
    onnx.checker.check_model(ir.to_proto(mended), full_check=True)


def test_layers_left_in_float_make_up_for_those_before_them():
    model = filled(BRANCHES)
    feeds = samples(model)
    text = "qdq{weights=int4,exclude=[after,classify]},bias-correction{method=%s,significance=0}"
    full, context, _ = compress(model, text % "full", feeds)
    left = np.abs(mean_errors(full, context, feeds)["classify"]).max()
    fast, context, report = compress(model, text % "fast", feeds)
    assert report.changed == 3
    assert left < 0.1 * np.abs(mean_errors(fast, context, feeds)["classify"]).max()


INSIDE = f"""
{HEADER}
inside (float[N, 4, 6, 6] x, float[4, 4, 1, 1] k, float[4] k_bias, float[4, 4, 1, 1] l, float[4] l_bias)
    => (float[N, 4, 6, 6] y)
{{
    [before] a = Conv (x, k, k_bias)
    b = Relu (a)
    total = ReduceSum <keepdims = 0> (b)
    zero = Constant <value_float = 0.0> ()
    positive = Greater (total, zero)
    c = If (positive) <
        then_branch = yes () => (float[N, 4, 6, 6] p) {{ [hidden] p = Conv (b, l, l_bias) }},
        else_branch = no () => (float[N, 4, 6, 6] q) {{ q = Neg (b) }}
    >
    [behind] y = Conv (c, l, l_bias)
}}
"""


@pytest.mark.parametrize("method", ["fast", "full"])
def test_what_a_subgraph_reads_is_carried_and_its_nodes_stay(method: str):
    model = filled(INSIDE)
    feeds = samples(model)
    mended, context, report = compress(model, f"qdq,bias-correction{{method={method},significance=0}}", feeds)
    assert report.changed >= 1
    assert np.array_equal(
        mended.graph.initializers["l_bias"].const_value.numpy(), model.graph.initializers["l_bias"].const_value.numpy()
    )
    if method == "full":
        for name, error in mean_errors(mended, context, feeds).items():
            assert np.abs(error).max() < 2e-3, name


# --- when there is nothing to do, or it cannot be done ----------------------------------------------------------------


def test_without_a_loss_there_is_nothing_to_correct():
    model = filled(RESIDUAL)
    before = ir.to_proto(model)
    report = Pipeline([BiasCorrection()]).run(model, calibration=samples(model)).parts[0]
    assert report.changed == 0
    assert list(report.notes) == ["no pass before lost anything: there is nothing to correct"]
    assert ir.to_proto(model) == before


def test_missing_or_empty_calibration_is_told():
    quantized, context, _ = compress(filled(RESIDUAL), "qdq")
    context.calibration = None
    with pytest.raises(UserError, match="'bias-correction' needs calibration data"):
        Pipeline([BiasCorrection()]).run(quantized, context=context)
    context.calibration = []
    for method in ("fast", "full"):
        with pytest.raises(UserError, match="the calibration set is empty"):
            Pipeline([BiasCorrection(method=method)]).run(quantized, context=context)


def test_options_out_of_range_are_refused():
    for text in ("bias-correction{significance=-1}", "bias-correction{samples=-1}", "bias-correction{method=slow}"):
        with pytest.raises(UserError):
            Pipeline.parse(text)


def test_layers_that_became_something_else_are_named():
    model = filled(RESIDUAL)
    quantized, context, _ = compress(model, "qdq")
    next(node for node in quantized.graph if node.name == "project").name = "another"
    report = Pipeline([BiasCorrection()]).run(quantized, context=context).parts[0]
    assert ("another", "it has no counterpart in the model before the loss") in [tuple(one) for one in report.skipped]


def test_layers_without_names_are_told_apart_by_their_place():
    model = filled(BRANCHES)
    named, _, _ = compress(model, "qdq,bias-correction{method=full}")
    for node in model.graph:
        node.name = None
    nameless, context, _ = compress(model, "qdq,bias-correction{method=full}")
    layers: list[PairedLayer] = paired_layers(nameless, context.reference)[0]
    assert len(layers) == 5
    assert initializers(nameless) == initializers(named)


# --- chance -----------------------------------------------------------------------------------------------------------


def test_means_are_weighted_by_positions():
    errors = Errors()
    errors.add(np.array([[1.0, 0.0]]), np.array([3]))
    errors.add(np.array([[5.0, 8.0], [9.0, 9.0]]), np.array([1, 0]))
    np.testing.assert_allclose(bias_shift(*errors.arrays(), significance=0.0), [2.0, 2.0])


def test_what_is_chance_is_shrunk_and_what_is_certain_is_not():
    generator = np.random.default_rng(0)
    truth = np.repeat([0.0, 1.0], 500)
    errors = truth + generator.normal(size=(16, 1000)) * 0.5
    weights = np.full(16, 9.0)
    shift = bias_shift(errors, weights)
    mean = errors.mean(axis=0)
    assert np.square(shift - truth).sum() < 0.8 * np.square(mean - truth).sum()
    assert (shift[:500] == 0).mean() > 0.6
    np.testing.assert_allclose(shift[500:], mean[500:], rtol=0.2)
    deviation = errors.std(axis=0, ddof=1) / 4
    np.testing.assert_allclose(shift, mean * np.maximum(0, 1 - (deviation / mean) ** 2), atol=1e-12)


def test_a_layer_that_one_sample_decides_is_left_alone():
    errors = np.zeros((8, 3))
    errors[5] = [4.0, -3.0, 5.0]
    assert bias_shift(errors, np.ones(8)) is None or not bias_shift(errors, np.ones(8)).any()
    noise = np.array([[1.0], [-0.9], [0.2], [3.0], [-1.1]])
    assert bias_shift(noise, np.ones(5)) is None
    np.testing.assert_allclose(bias_shift(noise, np.ones(5), significance=0.0), noise.mean(axis=0))


def test_one_sample_is_believed_and_none_or_nan_refused():
    np.testing.assert_array_equal(bias_shift(np.array([[2.0, -1.0]]), np.ones(1)), [2.0, -1.0])
    with pytest.raises(ValueError, match="no errors"):
        bias_shift(np.zeros((0, 3)), np.zeros(0))
    with pytest.raises(ValueError, match="NaN"):
        bias_shift(np.array([[np.nan]]), np.ones(1))


# --- a network like MobileNetV3-small ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantizer", "most_without", "least_with"),
    [("qdq", 0.93, 0.95), ("qdq{per_channel=false}", 0.80, 0.84), ("qdq{weights=int4}", 0.895, 0.94)],
)
def test_full_takes_back_much_of_what_mobilenet_loses(quantizer: str, most_without: float, least_with: float):
    source = models.build("digits_mobilenet")
    dataset = models.dataset("digits_mobilenet")
    feeds = [{"image": image[None]} for image in dataset.calibration["image"][::2]]
    (held_out,) = dataset.evaluation.values()
    right, apart = {}, {}
    exact = values_of(source, ["logits"], [{"image": held_out}])[0]
    for after in ("", ",bias-correction{method=full}"):
        model, _, _ = compress(source, f"{CpuInt8().prepare_passes().to_text()},{quantizer}{after}", feeds)
        logits = values_of(model, ["logits"], [{"image": held_out}])[0]
        right[after] = (logits.argmax(axis=1) == dataset.labels).mean()
        apart[after] = np.square(logits - exact).sum()
    assert right[""] <= most_without
    assert right[",bias-correction{method=full}"] >= least_with
    assert apart[",bias-correction{method=full}"] <= 0.9 * apart[""]
