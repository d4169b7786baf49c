"""The targets for NVIDIA GPUs, without one: what is written, by which rules, what is refused and what is told."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph import doctor
from qgraph.analysis.provider_split import split_by_provider
from qgraph.analysis.tensorrt_rules import broken_rules
from qgraph.errors import UserError
from qgraph.pipeline import Pipeline
from qgraph.runtime import session as sessions
from qgraph.runtime.session import open_session
from qgraph.target_options import read_target
from qgraph.targets import nvidia
from qgraph.targets.cuda import CudaFp8, CudaFp16, CudaInt8
from qgraph.targets.cuda_sparse24 import CudaSparse24
from qgraph.targets.nvidia import NvidiaTarget
from qgraph.targets.tensorrt import TensorrtFp8, TensorrtInt8

CNN = """<ir_version: 8, opset_import: ["" : 13]>
g (float[N,3,8,8] x) => (float[N,10] y)
<float[16,3,3,3] w0, float[16] b0, float[16,16,3,3] w1, float[16,16,3,3] w2, float[10,16] w3, float[10] b3>
{
    [c0] c = Conv<pads = [1,1,1,1]>(x, w0, b0)
    [r0] r = Relu(c)
    [c1] d = Conv<pads = [1,1,1,1]>(r, w1)
    [r1] e = Relu(d)
    [c2] f = Conv<pads = [1,1,1,1]>(e, w2)
    [add] a = Add(f, r)
    [r2] s = Relu(a)
    [pool] p = GlobalAveragePool(s)
    [flat] q = Flatten(p)
    [fc] y = Gemm<transB = 1>(q, w3, b3)
}"""
SHAPES = {"w0": (16, 3, 3, 3), "b0": (16,), "w1": (16, 16, 3, 3), "w2": (16, 16, 3, 3), "w3": (10, 16), "b3": (10,)}


def small_cnn() -> ir.Model:
    text = CNN.replace("float[16,3,3,3] w0, ", "float[1] w0 = {0}, ").replace("float[16] b0", "float[1] b0 = {0}")
    for name in ("[16,16,3,3] w1", "[16,16,3,3] w2", "[10,16] w3", "[10] b3"):
        text = text.replace(f"float{name}", f"float[1] {name.split()[1]} = {{0}}")
    model = ir.from_onnx_text(text)
    generator = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        value = model.graph.initializers[name]
        array = generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 1)
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
        value.shape = ir.Shape(shape)
    return model


def feeds(count: int = 6) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [{"x": generator.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def build(target: str, folder: Path, model: ir.Model | None = None, **options) -> qgraph.Artifact:
    options.setdefault("calibration", feeds())
    return qgraph.compile(small_cnn() if model is None else model, target, output=folder / "out", **options)


def operators(artifact: qgraph.Artifact) -> Counter[str]:
    return Counter(node.op_type for node in qgraph.ir.walk(qgraph.ir.load(artifact.path / "model.onnx")))


# --- CUDA -------------------------------------------------------------------------------------------------------------


def test_float16_and_how_to_run_it(tmp_path: Path):
    artifact = build("cuda-fp16", tmp_path, shapes={"x": (1, 3, 8, 8)})
    model = qgraph.ir.load(artifact.path / "model.onnx")

    weights = [value.dtype for value in model.graph.initializers.values() if value.name in SHAPES]
    assert set(weights) == {ir.DataType.FLOAT16}
    assert model.graph.opset_imports[""] == 18
    assert artifact.manifest["verification"]["outputs"][0]["sqnr_db"] > 50
    runtime = artifact.manifest["runtime"]
    providers = artifact.manifest["session"]["providers"]
    assert providers == [["CUDAExecutionProvider", {"prefer_nhwc": "1"}], ["CPUExecutionProvider", {}]]
    assert runtime["io_binding"]
    assert runtime["cuda_graph"] == {"possible": True, "against": []}
    assert set(runtime) == {"io_binding", "cuda_graph", "parts", "elsewhere"}
    placement = artifact.manifest["placement"]
    assert (placement["copies"], runtime["elsewhere"], set(placement["providers"])) == (
        0,
        [],
        {"CUDAExecutionProvider"},
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "behind", "preferred"),
    [
        ("float16", "3,3", "MaxPool <kernel_shape = [2,2]> (c)", True),
        ("float16", "3,3", "Resize (c, , s)", False),
        ("float", "3,3", "MaxPool <kernel_shape = [2,2]> (c)", False),
        ("float16", "3", "MaxPool <kernel_shape = [2]> (c)", False),
    ],
)
def test_convolutions_of_half_images_want_their_channels_last(dtype: str, shape: str, behind: str, preferred: bool):
    image = ",".join("8" for _ in shape.split(","))
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g ({dtype}[1,4,{image}] x) => (y)
    <{dtype}[4,4,{shape}] w = {{0}}, float[4] s = {{1, 1, 2, 2}}> {{ c = Conv (x, w)  y = {behind} }}"""
    model = ir.from_onnx_text(text)

    assert bool(CudaFp16().hints(model)) == preferred
    assert TensorrtInt8().hints(model) == {}


def test_without_convolutions_nothing_is_asked_for():
    assert CudaFp16().hints(small_mlp()) == {}


def test_a_dynamic_axis_and_a_node_on_the_cpu_are_against_a_cuda_graph(tmp_path: Path):
    model = small_cnn()
    node = next(node for node in model.graph if node.name == "flat")
    det = ir.node("Det", [node.outputs[0]], name="det")  # the CUDA provider has none
    shape = qgraph.ir.initializer(model.graph, "square", np.array([-1, 4, 4]))
    reshape = ir.node("Reshape", [node.outputs[0], shape], name="reshape")
    det.replace_input_with(0, reshape.outputs[0])
    det.outputs[0].name, reshape.outputs[0].name = "z", "matrix"
    det.outputs[0].dtype, det.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["N"])
    qgraph.ir.insert_before(model.graph[-1], reshape, det)
    model.graph.outputs.append(det.outputs[0])

    manifest = build("cuda-fp16", tmp_path, model).manifest
    runtime = manifest["runtime"]

    assert not runtime["cuda_graph"]["possible"]
    assert runtime["cuda_graph"]["against"] == [
        "input 'x' has a dynamic axis: fix it with --shape x=...",
        "nodes run on the CPU: 1 Det",
    ]
    assert manifest["placement"]["copies"] == 2  # to the Det, and from it to the Cast of an output in float16
    assert runtime["elsewhere"] == [{"node": "det", "reason": "ONNX Runtime's CUDAExecutionProvider has no Det"}]


@pytest.mark.parametrize("target", ["cuda-fp16", "tensorrt-int8"])
def test_where_nodes_run_is_found_out_once_for_the_lowered_model_and_once_for_its_file(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    splits, events = [], []

    def counted(*arguments):
        splits.append(split_by_provider(*arguments))
        return splits[-1]

    monkeypatch.setattr(nvidia, "split_by_provider", counted)
    artifact = build(target, tmp_path, observer=events.append)

    assert len(splits) == 2
    (provider,) = set(splits[1].providers.values())
    count = len(splits[1].providers)
    assert artifact.manifest["placement"]["providers"] == {provider: count}
    told = {"CUDAExecutionProvider": "CUDA", "TensorrtExecutionProvider": "TensorRT"}[provider]
    (line,) = [event.text for event in events if event.stage == "placement"]
    assert line == f"{count} nodes on {told}, as predicted from the tables"


def test_a_model_in_slices_is_placed_by_the_tables_all_the_same(tmp_path: Path):
    manifest = build("cuda-fp16", tmp_path, context=qgraph.Context(calibration_memory=8000)).manifest

    assert manifest["kernels"] is None
    assert set(manifest["placement"]["providers"]) == {"CUDAExecutionProvider"}


@pytest.mark.parametrize(("target", "kind"), [("cuda-int8", "integer"), ("cuda-fp8", "float8")])
def test_convolutions_are_refused_with_the_targets_that_take_them(target: str, kind: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        build(target, tmp_path)
    instead = "tensorrt-int8" if kind == "integer" else "tensorrt-fp8"
    assert str(error.value) == (
        f"{target} cannot run this model: 3 Conv nodes, and ONNX Runtime's CUDA provider has no {kind} Conv. "
        f"Use --target {instead}, or --target cuda-fp16."
    )
    assert not (tmp_path / "out").exists()


def small_mlp() -> ir.Model:
    """Three products of 64 by 64 with a GELU between the first two, and a tail of ten classes."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,64] x) => (float[N,10] y)
    <float[1] w0 = {0}, float[1] w1 = {0}, float[1] w2 = {0}, float[1] w3 = {0}, float[1] b = {0}>
    {
        h = MatMul(x, w0)  t = Tanh(h)  k = Gemm<transB = 1>(t, w1, b)  r = Relu(k)  l = MatMul(r, w2)
        y = MatMul(l, w3)
    }""")
    generator = np.random.default_rng(0)
    for name, shape in {"w0": (64, 64), "w1": (64, 64), "w2": (64, 64), "w3": (64, 10), "b": (64,)}.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(generator.normal(size=shape).astype(np.float32) / 8, name=name)
        value.shape = ir.Shape(shape)
    return model


def rows() -> list[dict[str, np.ndarray]]:
    return [{"x": part.astype(np.float32)} for part in np.random.default_rng(1).normal(size=(4, 2, 64))]


def test_linear_layers_in_8_bits(tmp_path: Path):
    artifact = build("cuda-int8", tmp_path, small_mlp(), calibration=rows())

    model = qgraph.ir.load(artifact.path / "model.onnx")
    products = [node for node in qgraph.ir.walk(model) if node.op_type == "MatMulNBits"]
    assert len(products) == 3
    assert {node.attributes.get_int("bits", 0) for node in products} == {8}
    assert {node.outputs[0].dtype for node in products} == {ir.DataType.FLOAT16}
    assert artifact.manifest["verification"]["outputs"][0]["sqnr_db"] > 40
    assert not CudaInt8().check(model)


def test_linear_layers_in_8_bit_floats(tmp_path: Path):
    artifact = build("cuda-fp8", tmp_path, small_mlp(), calibration=rows())

    model = qgraph.ir.load(artifact.path / "model.onnx")
    stored = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT8E4M3FN]
    assert len(stored) == 3
    assert artifact.manifest["verification"]["outputs"][0]["sqnr_db"] > 26
    assert not CudaFp8().check(model)
    open_session(artifact.path / "model.onnx", optimised_path=tmp_path / "optimised.onnx")
    opened = qgraph.ir.load(tmp_path / "optimised.onnx")
    kept = [node for node in opened.graph if node.op_type == "DequantizeLinear"]
    assert len(kept) == 3  # the runtime does not make floats of them when it opens the model
    (result,) = artifact.session().run(None, rows()[0])
    assert result.shape == (2, 10)

    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            node.inputs[1].const_value = ir.tensor(qgraph.ir.constant(node.inputs[1]).astype(np.float64))
            node.inputs[1].dtype = ir.DataType.DOUBLE  # of which the provider has no DequantizeLinear
    refused = CudaFp8().check(model)
    assert len(refused) == 3
    assert all("input 1 is float64" in reason for _, reason in refused)


def test_what_computes_on_the_cpu_is_refused_where_it_is_the_work():
    types = "(bfloat16[5,1,4] x) => (y) <bfloat16[1,8,4] w, bfloat16[1,8,2] r>"
    text = f'<ir_version: 10, opset_import: ["" : 22]> g {types} {{'
    model = ir.from_onnx_text(f"{text} [lstm] y = LSTM<hidden_size = 2>(x, w, r) }}")

    ((node, reason),) = CudaFp16().check(model)

    assert node == "lstm"
    assert reason.startswith(
        "it would run on the CPU: LSTM: input 0 is bfloat16, and ONNX Runtime's CUDAExecutionProvider"
    )


# --- TensorRT ---------------------------------------------------------------------------------------------------------


def test_int8_by_the_rules_of_tensorrt(tmp_path: Path):
    artifact = build("tensorrt-int8", tmp_path)
    model = qgraph.ir.load(artifact.path / "model.onnx")

    assert broken_rules(model) == []
    assert operators(artifact)["QuantizeLinear"] == 5  # x, r, e, the pooling's input, the product's
    assert artifact.manifest["verification"]["outputs"][0]["sqnr_db"] > 25
    session = artifact.manifest["session"]
    assert session["providers"][0][1] == {
        "trt_engine_cache_enable": "1",
        "trt_fp16_enable": "1",
        "trt_int8_enable": "1",
        "trt_timing_cache_enable": "1",
    }
    assert session["disabled_optimizers"] == ["WeightBiasQuantization"]
    assert [name for name, _ in session["providers"][1:]] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    placement = artifact.manifest["placement"]
    assert set(placement["providers"]) == {"TensorrtExecutionProvider"}
    assert placement["kernels"]["integer"] == {"Conv": 3, "Gemm": 1}
    assert "not run on TensorRT here" in artifact.manifest["stand_in"]
    assert artifact.manifest["kernels"]["integer"] == {"Conv": 3, "Gemm": 1}
    assert artifact.manifest["kernels"]["left_in_float"] == []


def test_float8_by_the_rules_of_tensorrt(tmp_path: Path):
    artifact = build("tensorrt-fp8", tmp_path)
    model = qgraph.ir.load(artifact.path / "model.onnx")

    assert broken_rules(model) == []
    layers = {
        node.name: node.inputs[0].producer() for node in qgraph.ir.walk(model) if node.op_type in ("Conv", "Gemm")
    }
    assert layers["c1"] is not None
    assert layers["c1"].op_type == "DequantizeLinear"
    assert layers["c1"].outputs[0].dtype == ir.DataType.FLOAT16
    assert qgraph.ir.is_op(layers["c0"], "Cast")  # three channels have no kernel in 8-bit floats
    assert "trt_int8_enable" not in artifact.manifest["session"]["providers"][0][1]
    assert artifact.manifest["verification"]["outputs"][0]["sqnr_db"] > 18
    kernels = artifact.manifest["kernels"]
    assert (kernels["low_bit"], kernels["float"]) == ({"Conv": 2, "Gemm": 1}, {"Conv": 1})
    reasons = {one["node"]: one["reason"] for one in artifact.manifest["skipped"]}
    assert kernels["left_in_float"] == [{"node": "c0", "reason": reasons["c0"]}]
    assert reasons["c0"] == "its 3 to 16 channels are no multiples of 16, which 8-bit floats want"


@pytest.mark.parametrize(
    ("what", "size", "reason"),
    [
        ("activation", 1e5, "'ts_dq' reaches"),
        ("activation", 1e9, "it reads 'ts_dq', which a constant may take out of what float16 holds"),
        ("weight", 1e9, "it reads 'w1_dq', which a constant may take out of what float16 holds"),
        ("weight", 1e-9, "it reads 'w1_dq', which a constant may take out of what float16 holds"),
    ],
)
def test_only_the_layer_that_float16_cannot_hold_is_of_float32(what: str, size: float, reason: str, tmp_path: Path):
    """It still multiplies 8-bit floats: the types around them are wider."""
    text = """<ir_version: 8, opset_import: ["" : 19]> g (float[N,64] x) => (float[N,64] y)
    <float[1] w0 = {0}, float[1] w1 = {0}, float[1] w2 = {0}, float up = {1}, float down = {1}>
    {
        h = MatMul(x, w0)  t = Relu(h)  ts = Mul(t, up)
        [far] k = MatMul(ts, w1)
        r = Relu(k)  l = Mul(r, down)
        [last] y = MatMul(l, w2)
    }"""
    model = ir.from_onnx_text(text)
    generator = np.random.default_rng(0)
    sizes = {"up": size if what == "activation" else 1.0, "down": 1 / size}
    arrays = {name: generator.normal(size=(64, 64)) / 8 for name in ("w0", "w1", "w2")} | sizes
    arrays["w1"] = arrays["w1"] * (size if what == "weight" else 1.0)
    for name, array in arrays.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.asarray(array, np.float32), name=name)
        value.shape = value.const_value.shape

    artifact = build("tensorrt-fp8", tmp_path, model, calibration=rows())

    made = qgraph.ir.load(artifact.path / "model.onnx")
    assert broken_rules(made) == []
    types = {node.name: node.outputs[0].dtype for node in made.graph if node.op_type == "MatMul"}
    assert (types["far"], types["last"]) == (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    assert artifact.manifest["kernels"]["low_bit"] == {"MatMul": 3}
    assert artifact.manifest["verification"]["outputs"][0]["sqnr_db"] > 20
    assert {one["node"]: one["reason"] for one in artifact.manifest["skipped"]}["far"].startswith(reason)


@pytest.mark.parametrize("target", ["tensorrt-int8", "tensorrt-fp8"])
def test_the_runtime_leaves_biases_in_float(target: str, tmp_path: Path):
    """Its own optimizer would make int32 of them, by way of float16, which overflows."""
    model = small_cnn()
    layer = next(node for node in model.graph if node.name == "c1")
    layer.resize_inputs(3)
    layer.replace_input_with(2, qgraph.ir.initializer(model.graph, "b1", np.full(16, 3.0, np.float32)))

    artifact = build(target, tmp_path, model)

    opened = read_target(target)
    assert isinstance(opened, NvidiaTarget)
    open_session(artifact.path / "model.onnx", optimised_path=tmp_path / "seen.onnx", disabled=opened.disabled)
    seen = qgraph.ir.load(tmp_path / "seen.onnx")
    stored = [node.inputs[0].dtype for node in seen.graph if node.op_type == "DequantizeLinear" and node.inputs[0]]
    assert ir.DataType.INT32 not in stored
    assert artifact.manifest["verification"]["outputs"][0]["sqnr_db"] > 18


@pytest.mark.parametrize(
    ("passes", "rule"),
    [
        ("qdq", "(zero point)"),
        ("qdq{activations=int8,symmetric=true}", "(bias in float)"),
    ],
)
def test_other_passes_are_checked_by_the_same_rules(passes: str, rule: str, tmp_path: Path):
    with pytest.raises(UserError, match="tensorrt-int8 cannot run this model") as error:
        build("tensorrt-int8", tmp_path, passes=passes)
    assert rule in str(error.value)


@pytest.mark.parametrize("method", ["fast", "full"])
def test_a_corrected_bias_stays_in_float(method: str, tmp_path: Path):
    passes = f"qdq{{activations=int8,symmetric=true,placement=tensorrt}},bias-correction{{method={method}}}"

    artifact = build("tensorrt-int8", tmp_path, passes=passes)

    model = qgraph.ir.load(artifact.path / "model.onnx")
    biases = [
        node.inputs[2] for node in qgraph.ir.walk(model) if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2
    ]
    assert len(biases) > 2
    assert {value.dtype for value in biases if value is not None} == {ir.DataType.FLOAT}
    assert all(value is not None and value.is_initializer() for value in biases)


def test_a_model_without_layers_is_refused(tmp_path: Path):
    text = '<ir_version: 8, opset_import: ["" : 13]> g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Sigmoid(x) }'
    with pytest.raises(UserError, match=r"no convolution and no linear layer. Use --target cuda-fp16."):
        build("tensorrt-int8", tmp_path, ir.from_onnx_text(text))


def test_the_range_of_a_dynamic_axis(tmp_path: Path):
    target = read_target("tensorrt-int8{min_shapes=[x:1x3x8x8],opt_shapes=[x:8x3x8x8],max_shapes=[x:32x3x8x8]}")

    artifact = build(target, tmp_path)  # type: ignore[arg-type]

    options = artifact.manifest["session"]["providers"][0][1]
    assert options["trt_profile_min_shapes"] == "x:1x3x8x8"
    assert options["trt_profile_max_shapes"] == "x:32x3x8x8"
    assert artifact.target == target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("min_shapes=[x:1x3x8x8]", "go together"),
        ("min_shapes=[x],opt_shapes=[x],max_shapes=[x]", "write NAME:1x3x224x224"),
        ("min_shapes=[x:1x3],opt_shapes=[x:8x3],max_shapes=[x:4x3]", "'x' must grow .* not 1x3 <= 8x3 <= 4x3"),
        ("min_shapes=[x:9x3],opt_shapes=[x:10x3],max_shapes=[x:10x2]", "must grow from min_shapes to max_shapes"),
        ("min_shapes=[x:1x3],opt_shapes=[x:1x3x1],max_shapes=[x:1x3]", "must grow from min_shapes to max_shapes"),
    ],
)
def test_a_range_that_says_nothing_is_refused(options: str, message: str):
    with pytest.raises(UserError, match=message):
        read_target(f"tensorrt-int8{{{options}}}")


def test_the_inputs_of_a_range_go_in_any_order():
    one, other = "min_shapes=[b:1x9,a:2x3]", "opt_shapes=[a:2x3,b:1x9],max_shapes=[a:10x3,b:1x9]"
    assert isinstance(read_target(f"tensorrt-int8{{{one},{other}}}"), TensorrtInt8)


def test_what_is_wrong_with_a_range_is_said_once():
    target = TensorrtInt8(min_shapes=("x:1x4x8x8",), opt_shapes=("x:1x4x8x8",), max_shapes=("x:1x4x8x8",))
    assert [one.reason for one in target.check(small_cnn())] == ["its shape is Nx3x8x8, which 1x4x8x8 does not fit"]


@pytest.mark.parametrize("name", ["cuda-int8", "cuda-fp8"])
def test_a_refused_model_is_sent_only_to_targets_that_take_it(name: str, tmp_path: Path):
    signature = "g (float[2,16] x, float[16,16] w) => (float[2,16] y)"  # too small to be stored in 8 bits
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 18]> {signature} {{ y = MatMul(x, w) }}')
    weight = model.graph.inputs.pop(1)
    weight.const_value = ir.tensor(np.ones((16, 16), np.float32), name="w")
    model.graph.register_initializer(weight)
    with pytest.raises(UserError, match=r"in float32 or float16, .* Use --target cuda-fp16\.$"):
        qgraph.compile(model, name, output=tmp_path / "out")


@pytest.mark.parametrize(("one", "message"), [("z:1x3x8x8", "it is no input"), ("x:1x4x8x8", "does not fit")])
def test_a_range_must_fit_an_input(one: str, message: str):
    target = TensorrtInt8(min_shapes=(one,), opt_shapes=(one,), max_shapes=(one,))
    assert message in target.check(small_cnn())[0].reason


def test_a_range_is_for_all_inputs_with_dynamic_axes_or_for_none():
    """ONNX Runtime fails at the first run where a profile leaves one out."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] a, float[n,4] b, float[2,4] c) => (float[n,4] y, float[2,4] z) { y = Add(a, b) z = Relu(c) }"""
    model, one, other = ir.from_onnx_text(text), ("a:1x4",), ("a:1x4", "b:1x4")
    left_out = TensorrtInt8(min_shapes=one, opt_shapes=one, max_shapes=one).check(model)
    assert [found.node for found in left_out if "no profile names it" in found.reason] == ["b"]
    assert TensorrtInt8(min_shapes=other, opt_shapes=other, max_shapes=other).check(model) == []
    assert TensorrtInt8().check(model) == []


def test_sparsity_is_of_the_family():
    assert CudaSparse24().options()["TensorrtExecutionProvider"]["trt_sparsity_enable"] == "1"
    assert "trt_int8_enable" not in CudaSparse24().options()["TensorrtExecutionProvider"]


# --- what is installed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "count"), [(CudaFp16(), 2), (TensorrtFp8(), 3)])
def test_with_a_gpu_the_options_reach_the_session(target, count: int, monkeypatch, tmp_path: Path):
    opened = []
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    for module in ("qgraph.targets.nvidia", "qgraph.runtime.serving"):
        monkeypatch.setattr(f"{module}.installed_providers", lambda: names)
        monkeypatch.setattr(f"{module}.provider_fault", lambda provider: "")
    monkeypatch.setattr("qgraph.runtime.serving.open_session", lambda path, **options: opened.append(options))

    model = small_cnn()
    Pipeline.parse("to-fp16").run(model)
    qgraph.ir.save(model, tmp_path / "model.onnx")

    target.session(tmp_path)

    assert target.stand_in() == ""
    assert tuple(opened[0]["disabled"]) == tuple(target.disabled)
    providers = opened[0]["providers"]
    assert len(providers) == count
    if count == 2:
        assert providers[0] == ("CUDAExecutionProvider", {"prefer_nhwc": "1"})
    if count == 3:
        name, options = providers[0]
        assert name == "TensorrtExecutionProvider"
        assert options["trt_engine_cache_enable"] == "1"
        assert options["trt_engine_cache_path"].endswith("tensorrt")


def test_libraries_that_do_not_load_are_told_with_the_remedy(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("qgraph.targets.nvidia.installed_providers", lambda: ["CUDAExecutionProvider"])

    artifact = build("cuda-fp16", tmp_path)  # the CPU's package has no such library

    note = artifact.manifest["stand_in"]
    assert note.startswith("the CPU provider (same operators; not run on CUDA here: CUDAExecutionProvider is installed")
    assert "libonnxruntime_providers_cuda.so" in note
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in note
    assert "\n" not in note


def test_a_library_that_another_one_lacks_is_named(monkeypatch):
    def refuse(path: str) -> None:
        raise OSError("libcublasLt.so.12: cannot open shared object file: No such file or directory\nmore")

    monkeypatch.setattr(sessions.ctypes, "CDLL", refuse)
    sessions.provider_fault.cache_clear()
    try:
        fault = sessions.provider_fault("CUDAExecutionProvider")
    finally:
        sessions.provider_fault.cache_clear()
    assert "does not start (libcublasLt.so.12: cannot open shared object file: No such file or directory)" in fault


def test_a_provider_that_fails_prints_nothing_and_its_reason_is_told(monkeypatch, capsys):
    import onnxruntime

    real = onnxruntime.InferenceSession._create_inference_session

    def fail(self, providers, *others):
        if "CUDAExecutionProvider" in (providers or ()):
            raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version\nat ...")
        return real(self, providers, *others)

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    sessions.provider_fault.cache_clear()
    try:
        fault = sessions.provider_fault("CUDAExecutionProvider")
    finally:
        sessions.provider_fault.cache_clear()
    assert "(CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version)" in fault
    assert capsys.readouterr().out == ""


def test_the_doctor_tells_of_it(monkeypatch):
    runtime = doctor.Runtime("ONNX Runtime", "1.31.1", ("CUDAExecutionProvider", "CPUExecutionProvider"))
    monkeypatch.setattr(doctor, "_onnxruntime", lambda: runtime)
    ready = {one.target: one for one in doctor.survey().targets}

    assert not ready["cuda-fp16"].usable
    assert ready["cuda-fp16"].missing == (
        "no CUDAExecutionProvider is installed: it takes an NVIDIA GPU and pip install 'qgraph-compiler[cuda]'"
    )
    assert "pip install 'qgraph-compiler[cuda]' tensorrt" in ready["tensorrt-int8"].missing


def test_a_driver_that_does_not_match_is_told_with_the_remedy(tmp_path: Path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    survey = doctor.survey()

    assert survey.devices == ()
    assert survey.device_fault == (
        "nvidia-smi says 'Failed to initialize NVML: Driver/library version mismatch': restart the machine, or install "
        "the driver anew, so that kernel module and library are of one version"
    )


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ("rtn{bits=4}", "rtn would round weights to 4 bits: use --target cuda-int4"),
        ("gptq{bits=8}", "gptq rounds weights alone: leave --passes out, or use --target cuda-int8"),
    ],
)
@pytest.mark.parametrize("target", ["tensorrt-int8", "tensorrt-fp8"])
def test_weights_that_tensorrt_cannot_use_are_refused_before_they_are_rounded(
    target: str, passes: str, reason: str, tmp_path: Path
):
    with pytest.raises(UserError, match=reason):
        build(target, tmp_path, passes=passes)


@pytest.mark.parametrize("target", ["cuda-fp16", "tensorrt-int8", "tensorrt-fp8"])
def test_building_twice_gives_the_same_bytes(target: str, tmp_path: Path):
    texts = []
    for name in "ab":
        artifact = build(target, tmp_path / name)
        files = sorted(path for path in artifact.path.iterdir() if path.suffix in (".onnx", ".toml"))
        texts.append([path.read_bytes() for path in [*files, artifact.path / "manifest.json"]])
    assert texts[0] == texts[1]
    assert "runtime" in json.loads(texts[0][-1])
