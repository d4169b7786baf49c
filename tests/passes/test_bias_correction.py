"""`bias-correction`: golden graphs, mean errors against full runs of both models, and what it must leave alone.

A golden file `tests/golden/bias-correction/<case>.onnxtxt` holds a model's text before quantization, `---`, and its
text after `qdq,bias-correction` (a first line `# ...` gives other passes), without the values of constants. Inputs
whose names do not begin with `x` are constants. QGRAPH_UPDATE_GOLDEN=1 writes the second part anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qgraph.analysis.paired_layers import paired_layers
from qgraph.pipeline import Context, Feeds, Pipeline, Report

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


def mean_errors(model: ir.Model, context: Context, feeds: list[Feeds]) -> dict[str, np.ndarray]:
    """Return the mean over all samples and positions of exact minus quantized output, by layer: two full runs."""
    layers, _ = paired_layers(model, context.reference)
    exact = values_of(context.reference, [layer.twin_last.outputs[0].name for layer in layers], feeds)
    rounded = values_of(model, [layer.output.name for layer in layers], feeds)
    result = {}
    for layer, one, other in zip(layers, exact, rounded, strict=True):
        error = np.moveaxis(one.astype(np.float64) - other, layer.axis, 0)
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
    for layer, error in mean_errors(mended, context, feeds).items():
        assert (np.abs(error) <= 0.76 * steps_of(mended, context)[layer] + 1e-6).all(), layer
    worst = [np.abs(error).max() for error in mean_errors(plain, before, feeds).values()]
    assert min(worst) > 1e-4, "quantization left nothing to correct"
