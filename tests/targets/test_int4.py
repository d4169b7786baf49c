"""`cpu-int4` and `cuda-int4`: what they compile to, what they refuse, and what they tell of weights and kernels."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph import verbs
from qgraph.analysis.index_limits import index_limits
from qgraph.errors import UserError
from qgraph.runtime import session as sessions
from qgraph.targets.base import Target
from qgraph.targets.cpu import CpuFp32
from qgraph.targets.cpu_fp16 import CpuFp16
from qgraph.targets.cpu_int4 import CpuInt4, weight_kernels
from qgraph.targets.cpu_int8 import CpuInt8
from qgraph.targets.cuda import CudaInt4

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
ROWS, WIDTH = 512, 64
DECODER = f"""
decoder (int64[batch,seq] ids) => (float[batch,seq,{ROWS}] logits)
<float[1] table = {{0}}, float[1] up = {{0}}, float[1] down = {{0}}, float[1] tiny = {{0}}, int64[1] last = {{-1}},
 float[1] two = {{2}}, float[1] epsilon = {{1e-6}}>
{{
    [look_up] e = Gather(table, ids)
    p = Pow(e, two)
    m = ReduceMean(p, last)
    v = Add(m, epsilon)
    r = Sqrt(v)
    n = Div(e, r)
    [up] h = MatMul(n, up)
    a = Relu(h)
    [down] d = Gemm<transB = 1>(flat, down)
    k = Shape(e)
    b = Reshape(d, k)
    [tiny] z = Mul(b, tiny)
    s = Add(e, z)
    t = Transpose<perm = [1,0]>(table)
    [head] logits = MatMul(s, t)
}}
""".replace("[down] d", "width = Shape<start = -1>(a) one = Neg(last) w2 = Concat<axis = 0>(last, width) "
            "flat = Reshape(a, w2) [down] d")  # fmt: skip


def decoder() -> ir.Model:
    """A tied decoder of one block: a norm, a MatMul, a Gemm with a transposed weight, and the embedding as its head."""
    model = ir.from_onnx_text(f"{HEAD}\n{DECODER}")
    random = np.random.default_rng(0)
    shapes = {"table": (ROWS, WIDTH), "up": (WIDTH, 128), "down": (WIDTH, 128), "tiny": (1,)}
    for name, shape in shapes.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(random.standard_normal(shape).astype(np.float32) / 4, name=name)
        value.shape = ir.Shape(shape)
    return model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "decoder.onnx"
    qgraph.ir.save(decoder(), path)
    return path


def test_weights_end_in_integer_kernels_without_any_data(source: Path, tmp_path: Path):
    told = []
    artifact = qgraph.compile(source, "cpu-int4", observer=lambda event: told.append((event.stage, event.text)))
    manifest = artifact.manifest
    assert manifest["pipeline"]["compress"] == "rtn"
    assert manifest["kernels"]["integer"] == {"MatMulNBits": 3}
    assert manifest["kernels"]["low_bit"] == {"GatherBlockQuantized": 1}
    assert manifest["kernels"]["left_in_float"] == []
    assert manifest["verification"]["outputs"][0]["sqnr_db"] > 15  # of random weights
    assert "3 MatMulNBits" in dict(told)["lower"]
    assert artifact.verified

    weights = manifest["weights"]
    assert weights["parameters"] == (ROWS + 2 * 128) * WIDTH
    tied = next(one for one in weights["tensors"] if one["name"] == "table")
    assert tied["operators"] == ["GatherBlockQuantized", "MatMulNBits"]
    assert (tied["scheme"], tied["shape"]) == ("int4g32a", [ROWS, WIDTH])
    assert (tied["bits_per_weight"], tied["stored_bits_per_weight"]) == (5.125, 5.125)
    assert tied["bytes"] == ROWS * WIDTH // 2 + ROWS * 2 * 4 + ROWS
    assert weights == verbs.inspect(artifact.path).weights
    assert "int4g32a" in (artifact.path / "report.html").read_text(encoding="utf-8")


def test_building_twice_gives_the_same_bytes(source: Path, tmp_path: Path):
    files = []
    for name in ("one", "two"):
        folder = qgraph.compile(source, "cpu-int4", output=tmp_path / name).path
        files.append([(folder / file).read_bytes() for file in ("model.onnx", "manifest.json", "recipe.toml")])
    assert files[0] == files[1]


@pytest.mark.parametrize(("bits", "stored"), [(2, 2), (3, 4), (5, 8), (6, 8), (8, 8)])
def test_every_width_runs_in_the_next_that_has_a_kernel(bits: int, stored: int, source: Path, tmp_path: Path):
    manifest = qgraph.compile(source, "cpu-int4", passes=f"rtn{{bits={bits},group=32}}").manifest
    assert manifest["kernels"]["integer"] == {"MatMulNBits": 3}
    weights = manifest["weights"]
    assert weights["bits_per_weight"] == pytest.approx(bits + (32 + bits) / 32, abs=1e-4)
    assert weights["stored_bits_per_weight"] == pytest.approx(
        stored + (32 + stored) / 32, abs=0.08
    )  # whole bytes of zero points
    assert {one["scheme"] for one in weights["tensors"]} == {f"int{bits}g32a"}


def test_calibration_data_make_it_awq_and_gptq(source: Path, tmp_path: Path):
    random = np.random.default_rng(1)
    feeds = [{"ids": random.integers(0, ROWS, (1, 32))} for _ in range(8)]
    manifest = qgraph.compile(source, "cpu-int4", calibration=feeds).manifest
    assert manifest["pipeline"]["compress"].startswith("awq,gptq")
    assert manifest["kernels"]["integer"] == {"MatMulNBits": 3}


def test_without_a_gpu_the_operators_run_on_the_cpu_and_it_is_said(source: Path, monkeypatch):
    monkeypatch.setattr("qgraph.targets.nvidia.installed_providers", lambda: ["CPUExecutionProvider"])
    told = []
    artifact = qgraph.compile(source, "cuda-int4", observer=lambda event: told.append((event.stage, event.text)))
    manifest = artifact.manifest
    assert "not run on CUDA here" in manifest["stand_in"]
    assert "not run on CUDA here" in dict(told)["verify"]
    assert "not run on CUDA here" in (artifact.path / "report.html").read_text(encoding="utf-8")
    assert not (artifact.path / "bench.json").exists()  # a latency of the CPU would mislead
    assert "latency" not in artifact.report.table()
    assert manifest["kernels"]["low_bit"] == {"GatherBlockQuantized": 1, "MatMulNBits": 3}
    assert manifest["verification"]["outputs"][0]["sqnr_db"] > 15  # of random weights
    model = qgraph.ir.load(artifact.path / "model.onnx")
    fused = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert [node.outputs[0].dtype for node in fused] == [ir.DataType.FLOAT16] * 3
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_with_a_gpu_its_provider_comes_first(source: Path, monkeypatch):
    artifact = qgraph.compile(source, "cuda-int4")
    opened = []
    for module in ("qgraph.targets.nvidia", "qgraph.runtime.serving"):
        monkeypatch.setattr(f"{module}.installed_providers", lambda: ["CUDAExecutionProvider"])
        monkeypatch.setattr(f"{module}.provider_fault", lambda provider: "")
    monkeypatch.setattr(
        "qgraph.runtime.serving.open_session", lambda path, **options: opened.append(options["providers"])
    )
    CudaInt4().session(artifact.path)
    assert CudaInt4().stand_in() == ""
    assert opened == [["CUDAExecutionProvider", "CPUExecutionProvider"]]


def test_without_the_runtime_its_extra_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"qgraph-compiler\[cuda\]"):
        CudaInt4().session(tmp_path)


def test_random_ids_come_from_the_whole_vocabulary():
    limits = index_limits(decoder())
    assert limits == {"ids": ROWS}
    spec = [sessions.TensorSpec("ids", "int64", ["batch", 64])]
    feeds = sessions.random_feeds(spec, 0, count=8, limits=limits)
    drawn = np.concatenate([feed["ids"] for feed in feeds])
    assert ROWS - 32 < drawn.max() < ROWS


REFUSED = {
    "2, 4 and 8 bits, not for 3": "y = com.microsoft.MatMulNBits<K = 32, N = 32, bits = 3, block_size = 32>(x, b, s)",
    "power of two": "y = com.microsoft.MatMulNBits<K = 32, N = 32, bits = 4, block_size = 48>(x, b, s)",
}
ON_CUDA = {
    "no integer convolution": "y = QLinearConv(x, s, b, b, s, b, s, b)",
    "no such integer product": "y = com.microsoft.DynamicQuantizeMatMul(x, b, s)",
    "fuses no quantized activations": "y = QuantizeLinear(x, s)",
    "without gaps": "z = com.microsoft.GatherBlockQuantized<bits = 4, block_size = 32>(t, i, s, b) y = Relu(x)",
    "whole groups only": "z = com.microsoft.GatherBlockQuantized<bits = 4, block_size = 64>(t, i, s) y = Relu(x)",
}


def graph_of(body: str) -> ir.Model:
    inputs = "float[4,32] x, uint8[32,1,16] b, float[32] s, uint8[8,48] t, int64[2] i"
    return ir.from_onnx_text(f"{HEAD}\ng ({inputs}) => (float[4,32] y) {{ {body} }}")


@pytest.mark.parametrize("target", [CpuInt4(), CudaInt4()], ids=lambda target: target.name)
@pytest.mark.parametrize("reason", REFUSED)
def test_forms_without_kernels_are_refused(reason: str, target: CpuInt4):
    (refused,) = target.check(graph_of(REFUSED[reason]))
    assert reason in refused.reason


@pytest.mark.parametrize("reason", ON_CUDA)
def test_what_a_gpu_hands_to_the_cpu_is_refused(reason: str):
    (refused,) = CudaInt4().check(graph_of(ON_CUDA[reason]))
    assert reason in refused.reason
    assert CpuInt4().check(graph_of(ON_CUDA[reason])) == []


@pytest.mark.parametrize("target", [CpuInt4(), CpuFp32(), CpuFp16(), CpuInt8()], ids=lambda one: one.name)
def test_bfloat16_is_refused_on_the_cpu_only(target: Target):
    model = ir.from_onnx_text(
        f"{HEAD}\ng (bfloat16[4,32] x, bfloat16[32,32] w) => (bfloat16[4,32] y) {{ y = MatMul(x, w) }}"
    )
    assert ["bfloat16" in one.reason for one in target.check(model)] == [True]
    assert CudaInt4().check(model) == []


def test_a_refusal_stops_the_compilation(source: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"cuda-int4 cannot run this model.*integer product"):
        qgraph.compile(source, "cuda-int4", passes="dynamic-int8{min_elements=1}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.onnx"]


@pytest.mark.parametrize("cause", ["full disk", "Ctrl-C"])
def test_nothing_is_left_of_a_compilation_that_was_stopped(cause: str, tmp_path: Path):
    ends = "(float[s,1024] x) => (float[s,4096] y)"
    model = ir.from_onnx_text(f"{HEAD}\ng {ends} <float[1] w = {{0}}> {{ y = MatMul(x, w) }}")
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(np.zeros((1024, 4096), np.float32), name="w")
    weight.shape = ir.Shape((1024, 4096))
    qgraph.ir.save(model, tmp_path / "wide.onnx")
    command = [sys.executable, "-P", "-m", "qgraph", "compile", "wide.onnx", "--target", "cpu-int4"]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    if cause == "full disk":
        done = subprocess.run(command, cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(
            "error: wide.cpu-int4/model.onnx cannot be written: File too large"
        )
    else:
        child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        while not child.stderr.readline().startswith("rtn"):
            pass
        child.send_signal(signal.SIGINT)
        assert child.wait() == 130
        child.stderr.close()
    assert [path.name for path in tmp_path.iterdir()] == ["wide.onnx"]


def test_what_computes_in_float_is_not_counted_as_integers():
    body = (
        "a = com.microsoft.MatMulNBits<K = 32, N = 32, bits = 4, block_size = 32, accuracy_level = 4>(x, b, s) "
        "c = com.microsoft.MatMulNBits<K = 32, N = 32, bits = 4, block_size = 32, accuracy_level = 0>(a, b, s) "
        "d = com.microsoft.MatMulNBits<K = 32, N = 32, bits = 2, block_size = 16, accuracy_level = 4>(c, b, s) "
        "e = com.microsoft.MatMulBnb4<K = 32, N = 32, quant_type = 1, block_size = 32>(d, b, s) "
        "[scores] f = MatMul(d, e) w = DequantizeLinear(b, s) [weight] y = MatMul(f, w)"
    )
    found = weight_kernels(graph_of(body), integers=True)
    assert found.integer == {"MatMulNBits": 1}
    assert found.low_bit == {"MatMulNBits": 2, "MatMulBnb4": 1}
    assert found.floating == {"MatMul": 2}
    reasons = {one.node: one.reason for one in found.left_in_float}
    assert "activations with activations" in reasons["scores"]
    assert "dequantized to float at every run" in reasons["weight"]
    assert "2 MatMulNBits with weights of few bits" in found.summary()
    assert weight_kernels(graph_of(body), integers=False).integer == {}


def test_the_manifest_is_plain_json(source: Path):
    path = qgraph.compile(source, "cpu-int4", passes="rtn{format=mxfp4}").path
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["weights"]["tensors"][0]["scheme"] == "mxfp4g32"
    assert manifest["weights"]["bits_per_weight"] < 4.5 < manifest["weights"]["stored_bits_per_weight"]


def test_a_sum_and_its_normalization_are_not_fused_to_what_is_slower(tmp_path: Path):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    block (float[batch,seq,64] x, float[batch,seq,64] r) => (float[batch,seq,64] y)
    <float[1] w = {0}, float[1] b = {0}, float[1] g = {0}>
    {
        p = MatMul(x, w)
        s = Add(p, b)
        t = Add(s, r)
        n = LayerNormalization(t, g, b)
        y = Relu(n)
    }"""
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for name, shape in {"w": (64, 64), "b": (64,), "g": (64,)}.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(random.standard_normal(shape).astype(np.float32), name=name)
        value.shape = ir.Shape(shape)
    qgraph.ir.save(model, tmp_path / "block.onnx")
    qgraph.compile(tmp_path / "block.onnx", target="cpu-int4", output=tmp_path / "out", passes="rtn{bits=4,group=32}")
    optimised = tmp_path / "optimised.onnx"
    sessions.open_session(tmp_path / "out/model.onnx", optimised_path=optimised)
    run = {node.op_type for node in qgraph.ir.load(optimised).graph}
    assert {"MatMulNBits", "LayerNormalization"} <= run
    assert "SkipLayerNormalization" not in run
