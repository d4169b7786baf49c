"""Passes ask the table of a runtime before they write: what it lacks is left alone, with the table's reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import capabilities
from qgraph.capabilities import Entry, Table, Types
from qgraph.passes import _qdq_kernels
from qgraph.passes._kernels import fused_kernel, lacking, unraisable
from qgraph.pipeline import Context, Pipeline, Report

CPU, CUDA, TENSORRT = "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"
real = capabilities.table


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that takes entries from a table, or puts others in their place."""

    def put(name: str, without: Sequence[str] = (), entries: Sequence[Entry] = (), **others: object) -> None:
        operators = {key: one for key, one in real(name).operators.items() if key not in without}
        for entry in entries:
            operators[entry.name] = (entry,)
        altered: Table = dataclasses.replace(real(name), operators=operators, **others)
        monkeypatch.setattr(capabilities, "table", lambda asked: altered if asked == name else real(asked))
        _qdq_kernels._against.cache_clear()

    yield put
    _qdq_kernels._against.cache_clear()


def network(opset: int = 21) -> ir.Model:
    """A convolution, what clamps and moves behind it, and a product."""
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
    g (float[1,4,8,8] x) => (float[1,10] y)
    <float[8,4,3,3] w = {{0}}, float[128,10] v = {{0}}, int64[2] shape = {{1, 128}}> {{
        [conv] a = Conv <pads = [1,1,1,1]> (x, w)
        [relu] b = Relu (a)
        [pool] c = MaxPool <kernel_shape = [2,2], strides = [2,2]> (b)
        [flat] d = Reshape (c, shape)
        [product] y = MatMul (d, v)
    }}"""
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for name in ("w", "v"):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(random.normal(size=value.shape.numpy()).astype(np.float32), name=name)
    return model


def applied(passes: str, model: ir.Model) -> Report:
    feeds = [{"x": np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(2)]
    return Pipeline.parse(passes).run(model, context=Context(calibration=feeds, threads=1)).parts[0]


def told(report: Report) -> dict[str, str]:
    return {one.node: one.reason for one in report.skipped}


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_without_a_table_nothing_is_asked():
    assert lacking("Nonsense", [], "") is None
    assert unraisable(network(), 23, "Nonsense", "") is None


def test_the_version_counts():
    reason = lacking("Gelu", [ir.DataType.FLOAT], CUDA, version=18)
    assert reason == (
        "there is no kernel for it: Gelu: opset 18, and ONNX Runtime's CUDAExecutionProvider takes from 20"
    )
    assert lacking("Gelu", [ir.DataType.FLOAT], CUDA, version=20) is None


def test_layers_that_a_runtime_computes_in_float():
    pattern = "DequantizeLinear -> Conv -> QuantizeLinear"
    told = fused_kernel(pattern, "uint16 activations, int8 weight", CPU)
    assert told == (
        f"ONNX Runtime's CPUExecutionProvider of {real(CPU).version} computes {pattern} in float "
        "(uint16 activations, int8 weight)"
    )
    assert fused_kernel(pattern, "uint8 activations, int8 weight", CPU) is None
    assert fused_kernel(pattern, "of which nothing is known", CPU) is None


def test_an_opset_that_would_cost_a_node_its_kernel():
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float[1,1,2,2] x, float[1,2,2,2] p) => (y) { '
    model = ir.from_onnx_text(text + "[sampled] y = GridSample (x, p) }")
    reason = unraisable(model, 20, "Gelu", TENSORRT)
    assert reason is not None
    assert reason.startswith("opset 20 would cost 'sampled' its kernel: GridSample: opset 20, and ")
    assert unraisable(network(18), 20, "Gelu", TENSORRT) is None


# --- quantization -----------------------------------------------------------------------------------------------------


def test_qdq_leaves_layers_that_would_stay_in_float(change: Callable[..., None]):
    assert applied("qdq", network()).changed == 5
    kept = [one for one in real(CPU).fusions if "Conv" not in one.pattern]
    broken = [dataclasses.replace(one, kernel="", arithmetic="float") for one in real(CPU).fusions if one not in kept]
    change(CPU, fusions=(*kept, *broken))
    report = applied("qdq", model := network())
    assert "computes DequantizeLinear -> Conv -> QuantizeLinear in float" in told(report)["conv"]
    conv = next(node for node in model.graph if node.op_type == "Conv")
    assert conv.inputs[0] is model.graph.inputs[0]


def test_qdq_leaves_movers_without_an_integer_kernel(change: Callable[..., None]):
    floats = Types({0: ("float32",)})
    change(CPU, entries=[Entry("MaxPool", inputs=floats, source="registry")])
    report = applied("qdq", network())
    assert told(report)["pool"].startswith("there is no kernel for it: MaxPool: input 0 is uint8")
    assert "conv" not in told(report)
    # Signed ones are moved between DequantizeLinear and QuantizeLinear, which the runtime sees to.
    assert "pool" not in told(applied("qdq{activations=int8}", network()))


@pytest.mark.parametrize("name", ["QuantizeLinear", "DequantizeLinear"])
def test_nothing_is_quantized_without_quantizers(change: Callable[..., None], name: str):
    change(CPU, without=[name])
    report = applied("qdq", model := network())
    assert report.changed == 0
    assert told(report)["product"] == (f"there is no kernel for it: ONNX Runtime's CPUExecutionProvider has no {name}")
    assert [node.op_type for node in model.graph] == ["Conv", "Relu", "MaxPool", "Reshape", "MatMul"]
    assert applied("qdq{activations=int8,symmetric=true,placement=tensorrt}", network()).changed > 0


def test_tensorrt_is_asked_about_8_bit_floats(change: Callable[..., None]):
    passes = "qdq{weights=float8e4m3fn,activations=float8e4m3fn,symmetric=true,placement=tensorrt}"
    assert applied(passes, network()).changed > 0
    change(TENSORRT, entries=[Entry("DequantizeLinear", inputs=Types({0: ("int8",)}), source="operators")])
    report = applied(passes, network())
    assert report.changed == 0
    assert "input 0 is float8e4m3fn" in told(report)["conv"]


def test_full_qdq_goes_without_16_bits_where_they_have_no_quantizer(change: Callable[..., None]):
    model = network()
    passes = "full-qdq{sqnr=60}"
    assert any(value.dtype == ir.DataType.INT16 for value in constants(passes, model))
    bytes_ = Types({0: ("int8", "uint8", "int32")})
    change(CPU, entries=[Entry("DequantizeLinear", inputs=bytes_, source="registry")])
    report = applied(passes, model := network())
    assert report.changed
    assert not any(value.dtype == ir.DataType.INT16 for value in model.graph.initializers.values())
    assert "nothing in 16 bits: there is no kernel for it: DequantizeLinear: input 0 is int16" in report.notes[-1]
    change(CPU, without=["QuantizeLinear"])
    report = applied(passes, network())
    assert report.changed == 0
    assert "has no QuantizeLinear" in told(report)["product"]


def constants(passes: str, model: ir.Model) -> list[ir.Value]:
    applied(passes, model)
    return list(model.graph.initializers.values())


def test_weights_stay_narrow_where_nothing_widens_them(change: Callable[..., None]):
    wide = network()
    Pipeline.parse("qdq{weights=int4}").run(wide, context=context())
    narrow = wide.clone()
    assert applied("widen-weights", wide).changed == 2
    change(CPU, entries=[Entry("Cast", inputs=Types({0: ("float32", "int8")}), source="registry")])
    report = applied("widen-weights", narrow)
    assert report.changed == 0
    assert len(report.skipped) == 2
    assert all(reason.startswith("there is no kernel for it: Cast: input 0 is int4") for _, reason in report.skipped)


def context() -> Context:
    feeds = [{"x": np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(2)]
    return Context(calibration=feeds, threads=1)


# --- packing and fusing -----------------------------------------------------------------------------------------------


def test_sparse_weights_are_not_packed_for_a_runtime_that_cannot_unpack_them():
    def sparse() -> ir.Model:
        text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n,64] x) => (y) <float[64,64] w = {0}>'
        model = ir.from_onnx_text(f"{text} {{ [product] y = MatMul (x, w) }}")
        data = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
        model.graph.initializers["w"].const_value = ir.tensor(data, name="w")
        Pipeline.parse("sparsify{pattern=unstructured,ratio=0.9}").run(model)
        return model

    assert applied("pack-sparse", sparse()).changed == 1
    report = applied(f"pack-sparse{{table={CUDA}}}", sparse())
    assert report.changed == 0
    assert told(report) == {
        "product": "there is no kernel for it: ONNX Runtime's CUDAExecutionProvider has no BitShift"
    }


GELU = """g (float[2,8] x) => (float[2,8] y)
<float root = {1.4142135}, float one = {1.0}, float half = {0.5}> {
    a = Div (x, root)
    b = Erf (a)
    c = Add (b, one)
    d = Mul (x, c)
    y = Mul (d, half)
}"""
NORM = """g (float[2,8] x) => (float[2,8] y)
<float[8] g = {1, 2, 3, 4, 5, 6, 7, 8}, int64[1] last = {-1}, float two = {2.0}, float small = {0.001}> {
    a = Pow (x, two)
    b = ReduceMean (a, last)
    c = Add (b, small)
    d = Sqrt (c)
    e = Div (x, d)
    y = Mul (e, g)
}"""


def of_opset(opset: int, text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')


@pytest.mark.parametrize(
    ("passes", "table", "text", "opset", "after"),
    [
        ("fuse-gelu", CUDA, GELU, 18, 20),
        ("fuse-gelu", TENSORRT, GELU, 18, 20),
        ("fuse-gelu", CPU, GELU, 21, 21),
        ("fuse-norms", CUDA, NORM, 18, 23),
        ("fuse-norms", CPU, NORM, 21, 23),
        ("fuse-norms", CUDA, NORM, 24, 24),
    ],
)
def test_a_model_is_raised_for_what_the_table_has(passes: str, table: str, text: str, opset: int, after: int):
    model = of_opset(opset, text)
    report = applied(f"{passes}{{table={table}}}", model)
    assert (report.changed, model.graph.opset_imports[""], list(report.skipped)) == (1, after, [])
    assert len(model.graph) == 1
    assert applied(f"{passes}{{table={table}}}", model).changed == 0


@pytest.mark.parametrize(("passes", "text", "name"), [("fuse-norms", NORM, "RMSNormalization")])
def test_what_the_table_lacks_is_not_fused(passes: str, text: str, name: str):
    model = of_opset(18, text)
    report = applied(f"{passes}{{table={TENSORRT}}}", model)
    assert (report.changed, model.graph.opset_imports[""]) == (0, 18)
    assert list(told(report).values()) == [
        f"there is no kernel for it: ONNX Runtime's TensorrtExecutionProvider has no {name}"
    ]


def test_a_model_is_not_raised_for_nothing():
    model = of_opset(18, GELU.replace("half = {0.5}", "half = {0.25}"))
    readers = len(model.graph.inputs[0].uses())
    report = applied(f"fuse-gelu{{table={CUDA}}}", model)
    assert (report.changed, list(report.skipped), model.graph.opset_imports[""]) == (0, [], 18)
    assert len(model.graph.inputs[0].uses()) == readers


def test_a_model_stays_of_its_opset_where_another_node_would_lose_its_kernel():
    text = GELU.replace("g (float[2,8] x) =>", "g (float[2,8] x, float[1,1,2,2] i, float[1,2,2,2] p) =>")
    text = text.replace("float[2,8] y)", "float[2,8] y, float[1,1,2,2] z)")
    text = text.rstrip().removesuffix("}") + "    z = GridSample (i, p)\n}"
    model = of_opset(18, text)
    report = applied(f"fuse-gelu{{table={TENSORRT}}}", model)
    assert (report.changed, model.graph.opset_imports[""]) == (0, 18)
    assert "opset 20 would cost" in next(iter(told(report).values()))
    assert applied(f"fuse-gelu{{table={CUDA}}}", model).changed == 1
