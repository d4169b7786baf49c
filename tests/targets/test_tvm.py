"""The targets of TVM: what they write, that both runners compute what the session does, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph.codegen.tvm_float_build import fused_for_cpu
from qgraph.codegen.tvm_float_schedule import scheduled_float
from qgraph.codegen.tvm_import import imported
from qgraph.codegen.tvm_kernels import Limits, check_kernels
from qgraph.codegen.tvm_machines import cpu_target
from qgraph.codegen.tvm_packing import Lanes
from qgraph.errors import UserError
from qgraph.runtime.session import open_session
from qgraph.targets.tvm import TvmCpu, TvmCuda, TvmMetal

pytest.importorskip("tvm", reason="Apache TVM is not installed")

RANDOM = np.random.default_rng(0)
_AARCH64 = 183
"""Of ELF files."""


def network(**weights: np.ndarray) -> ir.Model:
    """Return a network of what schedules tell apart: dense and depthwise convolutions, pooling, norm, product, softmax.

    17 columns are no multiple of anything, nor are 5 classes.
    """
    shapes = {"w": (16, 3, 3, 3), "d": (16, 1, 3, 3), "p": (40, 16, 1, 1), "m": (40, 5), "b": (16,), "one": (40,)}
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        network (float[N, 3, 9, 17] x) => (float[N, 5] y, float[N, 40] n) {
            c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
            r = Relu (c)
            e = Conv <group = 16, strides = [2, 2], pads = [1, 1, 1, 1]> (r, d)
            a = HardSwish (e)
            f = Conv (a, p)
            g = GlobalAveragePool (f)
            h = Flatten (g)
            n = LayerNormalization <axis = -1> (h, one)
            k = MatMul (n, m)
            y = Softmax <axis = -1> (k)
        }
    """)
    return _with_weights(model, {name: weights.get(name, _numbers(shape)) for name, shape in shapes.items()})


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
    return (np.random.default_rng(len(shape)).normal(size=shape) * 0.3).astype(np.float32)


def _with_weights(model: ir.Model, weights: dict[str, np.ndarray]) -> ir.Model:
    for node in model.graph:
        for place, value in enumerate(node.inputs):
            if value is not None and value.name in weights:
                name = value.name
                if name not in model.graph.initializers:
                    qgraph.ir.initializer(model.graph, name, weights[name])
                node.replace_input_with(place, model.graph.initializers[name])
    return model


def is_near(artifact: qgraph.Artifact) -> bool:
    """Tell whether ONNX Runtime gave the same, or next to the same, of the source."""
    (one,) = artifact.manifest["verification"]["outputs"]
    return bool(one["exact"] or one["sqnr_db"] > 100)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 3, 9, 17)).astype(np.float32)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> qgraph.Artifact:
    folder = tmp_path_factory.mktemp("tvm")
    qgraph.ir.save(network(), folder / "network.onnx")
    return qgraph.compile(folder / "network.onnx", TvmCpu(), output=folder / "artifact")


def expected(artifact: qgraph.Artifact, x: np.ndarray) -> list[np.ndarray]:
    return open_session(artifact.path.parent / "network.onnx", threads=1).run(None, {"x": x})


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_any_size_is_computed_as_onnxruntime_does(artifact: qgraph.Artifact, count: int):
    x = images(count)
    found = qgraph.open(artifact.path).run(None, {"x": x})
    for one, right in zip(found, expected(artifact, x), strict=True):
        np.testing.assert_allclose(one, right, rtol=1e-4, atol=1e-5)
    (norm,) = qgraph.open(artifact.path).run(["n"], {"x": x})
    np.testing.assert_array_equal(norm, found[1])


def test_what_is_fed_is_checked(artifact: qgraph.Artifact):
    session = qgraph.open(artifact.path)
    with pytest.raises(UserError, match=r"input 'x' is not fed \(given: z\)"):
        session.run(None, {"z": images(1)})
    with pytest.raises(UserError, match=r"input 'x' is float64\[1, 3, 9, 17\], not float32\['N', 3, 9, 17\]"):
        session.run(None, {"x": images(1).astype(np.float64)})
    with pytest.raises(UserError, match="there is no output 'q'; there are: y, n"):
        session.run(["q"], {"x": images(1)})


def test_equal_models_give_equal_bytes(artifact: qgraph.Artifact, tmp_path: Path):
    again = qgraph.compile(artifact.path.parent / "network.onnx", TvmCpu(), output=tmp_path / "elsewhere" / "again")
    assert again.manifest["files"] == artifact.manifest["files"]
    assert {"model.so", "params.bin", "run.py", "run.cc", "Makefile"} <= {one["name"] for one in _files(again)}


def _files(artifact: qgraph.Artifact) -> list[dict[str, str]]:
    files = artifact.manifest["files"]
    return [{"name": name} for name in files] if isinstance(files, dict) else files


def test_the_runner_in_python_needs_only_the_runtime(artifact: qgraph.Artifact, tmp_path: Path):
    x = images(2)
    np.savez(tmp_path / "x.npz", x=x)
    command = [sys.executable, str(artifact.path / "run.py"), "x.npz", "y.npz", "--threads", "1"]
    subprocess.run(command, check=True, cwd=tmp_path)
    with np.load(tmp_path / "y.npz") as found:
        for name, right in zip(("y", "n"), qgraph.open(artifact.path).run(None, {"x": x}), strict=True):
            np.testing.assert_array_equal(found[name], right)
    np.savez(tmp_path / "x.npz", x=x[:, :2])
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: input 'x' is float32[2, 2, 9, 17], not" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None, reason="no C++ compiler here")
def test_the_runner_in_cxx_gives_the_same_bits(artifact: qgraph.Artifact, tmp_path: Path):
    for name in ("run.cc", "signature.h", "Makefile"):
        shutil.copy(artifact.path / name, tmp_path)
    flags = "CXXFLAGS=-O0 -Wall -Werror"
    subprocess.run(["make", "-s", "run", f"PYTHON={sys.executable}", flags], check=True, cwd=tmp_path)
    x = images(3)
    x.tofile(tmp_path / "x.bin")
    environment = {**os.environ, "MODEL_FOLDER": str(artifact.path)}
    done = subprocess.run([tmp_path / "run", "x.bin"], check=True, cwd=tmp_path, capture_output=True, env=environment)
    found = np.frombuffer(done.stdout, np.float32)
    right = qgraph.open(artifact.path).run(None, {"x": x})
    np.testing.assert_array_equal(found, np.concatenate([one.reshape(-1) for one in right]))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("python", ["no-such-python", f"{sys.executable} -S -I"])
def test_without_tvm_the_makefile_says_what_the_runner_wants(artifact: qgraph.Artifact, tmp_path: Path, python: str):
    for name in ("run.cc", "signature.h", "Makefile"):
        shutil.copy(artifact.path / name, tmp_path)
    done = subprocess.run(
        ["make", "-s", "run", f"PYTHON={python}"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode
    assert f"error: the runner wants TVM's headers and runtime, which {python} does not have" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("make") is None, reason="no C++ compiler here")
def test_both_runners_sort(tmp_path: Path):
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        largest (float[2, 9] x) => (float[2, 3] y, int64[2, 3] i) <int64[1] k = {3}> { y, i = TopK (x, k) }
    """)
    made = qgraph.compile(model, TvmCpu(), output=tmp_path / "made").path
    x = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    x.tofile(tmp_path / "x.bin")
    subprocess.run([sys.executable, made / "run.py", "x.npz", "y.npz"], check=True, cwd=tmp_path)
    right = np.sort(x)[:, :-4:-1]
    with np.load(tmp_path / "y.npz") as found:
        np.testing.assert_array_equal(found["y"], right)
    for name in ("run.cc", "signature.h", "Makefile"):
        shutil.copy(made / name, tmp_path)
    subprocess.run(["make", "-s", "run", f"PYTHON={sys.executable}", "CXXFLAGS=-O0"], check=True, cwd=tmp_path)
    environment = {**os.environ, "MODEL_FOLDER": str(made)}
    done = subprocess.run([tmp_path / "run", "x.bin"], check=True, cwd=tmp_path, capture_output=True, env=environment)
    np.testing.assert_array_equal(np.frombuffer(done.stdout[: right.nbytes], np.float32), right.reshape(-1))


def test_sums_for_one_channel_are_not_unrolled_beyond_their_rows(tmp_path: Path):
    """A filter over a long signal: what was unrolled by mistake took minutes to compile."""
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        signal (float[N, 1, 1, 8000] x) => (float[N, 1, 1, 3937] y) {
            c = Conv <strides = [1, 2]> (x, f)
            y = Relu (c)
        }
    """)
    _with_weights(model, {"f": _numbers((1, 1, 1, 128))})
    fused = fused_for_cpu(imported(model).module, cpu_target())
    text = scheduled_float(fused, Lanes(16, 32)).script()
    assert "T.parallel(" in text
    assert max(int(count) for count in re.findall(r"T\.unroll\(T\.int64\((\d+)\)\)", text)) <= 14
    assert is_near(qgraph.compile(model, TvmCpu(), output=tmp_path / "made"))


def test_one_row_spreads_over_threads():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        row (float[1, 256] x) => (float[1, 512] y) { y = MatMul (x, w) }
    """)
    _with_weights(model, {"w": _numbers((256, 512))})
    text = scheduled_float(fused_for_cpu(imported(model).module, cpu_target()), Lanes(16, 32)).script()
    assert "T.parallel(T.int64(16))" in text


def test_slices_of_open_sizes_are_as_large_as_they_are(tmp_path: Path):
    """As tf2onnx writes them: every axis named, and ends that lie far behind."""
    far = 2**31 - 1
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 9] x) => (float[N, 16] y)
        <int64[2] s = {{0, 2}}, int64[2] e = {{{far}, {far}}}, int64[2] a = {{0, 1}}, int64[4] p = {{0, 0, 0, 2}}> {{
            t = Slice (x, s, e, a)
            u = Pad (t, p)
            y = Concat <axis = 1> (u, t)
        }}
    """)
    made = qgraph.compile(model, TvmCpu(), output=tmp_path / "made").path
    x = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    right = np.concatenate([x[:, 2:], np.zeros((5, 2), np.float32), x[:, 2:]], 1)
    np.testing.assert_array_equal(qgraph.open(made).run(None, {"x": x})[0], right)


def test_a_recurrent_layer_of_open_length_is_refused_with_the_flag_that_helps(tmp_path: Path):
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[T, 1, 4] x) => (float[T, 1, 1, 3] y) { y = RNN <hidden_size = 3> (x, w, r) }
    """)
    _with_weights(model, {"w": _numbers((1, 3, 4)), "r": _numbers((1, 3, 3))})
    with pytest.raises(UserError, match=r"Apache TVM has no RNN\. Sizes .* are open: .*--shape x=1,1,4"):
        qgraph.compile(model, TvmCpu(), output=tmp_path / "open")
    assert is_near(qgraph.compile(model, TvmCpu(), output=tmp_path / "fixed", shapes={"x": (5, 1, 4)}))


def test_a_gate_that_spreads_behind_its_product_has_a_gpu_schedule(tmp_path: Path):
    """TVM's rule for products stops with an error there."""
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 24, 1, 1] x, float[N, 96, 4, 4] image) => (float[N, 96, 4, 4] y) {
            c = Conv (x, w, b)
            gate = HardSigmoid (c)
            y = Mul (image, gate)
        }
    """)
    _with_weights(model, {"w": _numbers((96, 24, 1, 1)), "b": _numbers((96,))})
    made = qgraph.compile(model, TvmMetal(), output=tmp_path / "gpu")
    assert not list(check_kernels((made.path / "source" / "kernels.metal").read_text(), TvmMetal.limits))
    assert is_near(made)


def test_weights_of_few_bits_stay_small(artifact: qgraph.Artifact, tmp_path: Path):
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        product (float[N, 256] x) => (float[N, 128] y) { y = MatMul (x, w) }
    """)
    _with_weights(model, {"w": _numbers((256, 128))})
    made = qgraph.compile(model, TvmCpu(), output=tmp_path / "low", passes="rtn{bits=4,group=32,min_elements=0}")
    assert (made.path / "params.bin").stat().st_size < 256 * 128 * 4 / 5  # 4 bits, and two floats for each 32 of them
    assert made.manifest["verification"]["outputs"][0]["sqnr_db"] > 15


def test_tuning_keeps_its_log_and_the_log_gives_the_same_code(tmp_path: Path):
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        product (float[12, 32] x) => (float[12, 32] y) { y = MatMul (x, w) }
    """)
    _with_weights(model, {"w": _numbers((32, 32))})
    tuned = qgraph.compile(model, TvmCpu(trials=3), output=tmp_path / "tuned")
    log = tuned.path / "tuning"
    assert len((log / "database_tuning_record.json").read_text().splitlines()) == 3
    again = qgraph.compile(model, TvmCpu(log=str(log)), output=tmp_path / "again")
    assert (again.path / "model.so").read_bytes() == (tuned.path / "model.so").read_bytes()
    with pytest.raises(UserError, match=r"log=.* is no folder of a tuning"):
        qgraph.compile(model, TvmCpu(log=str(tmp_path)), output=tmp_path / "none")


def test_code_for_another_processor_is_objects_and_a_stand_in(artifact: qgraph.Artifact, tmp_path: Path):
    target = TvmCpu(triple="aarch64-linux-gnu", cpu="cortex-a55+dotprod")
    made = qgraph.compile(artifact.path.parent / "network.onnx", target, output=tmp_path / "arm")
    header = (made.path / "lib0.o").read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert struct.unpack("<H", header[18:20]) == (_AARCH64,)
    assert "not run on aarch64-linux-gnu" in made.manifest["stand_in"]
    assert not (made.path / "model.so").exists()
    x = images(2)
    np.testing.assert_allclose(qgraph.open(made.path).run(None, {"x": x})[0], expected(artifact, x)[0], atol=1e-5)
    with pytest.raises(UserError, match="measures on this machine"):
        qgraph.compile(
            artifact.path.parent / "network.onnx", TvmCpu(triple="aarch64-linux-gnu", trials=1), output=tmp_path / "no"
        )


@pytest.mark.parametrize("target", [TvmCuda(arch="sm_90"), TvmMetal()], ids=lambda one: one.name)
def test_code_for_gpus_comes_out_and_is_verified_beside(artifact: qgraph.Artifact, tmp_path: Path, target: TvmCuda):
    if target.kind == "cuda" and shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    made = qgraph.compile(artifact.path.parent / "network.onnx", target, output=tmp_path / "gpu")
    source = (made.path / "source" / f"kernels.{target.suffix}").read_text()
    assert not list(check_kernels(source, target.limits))
    assert json.loads((made.path / "model.json").read_text())["device"] == target.kind
    if target.stand_in():
        assert f"not run on a device of {target.kind}" in made.manifest["stand_in"]
    assert made.manifest["verification"]["outputs"][0]["sqnr_db"] > 90


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[4] x) => (float[4] y, float[4] y) { y = Exp (x) }", "'y': it is an output 2 times"),
        ("(float[2, 2] x) => (float y) { y = Det (x) }", "tvm-cpu cannot run this model: .*Det"),
        (
            "(float[N] x) => (float[M] y) { n = NonZero (x) i = Squeeze (n) y = Gather (x, i) }",
            "'NonZero->n': NonZero runs in TVM's Python package, which is not part of its runtime",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_a_reason(tmp_path: Path, text: str, reason: str):
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    with pytest.raises(UserError, match=reason):
        qgraph.compile(model, TvmCpu(), output=tmp_path / "refused")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (TvmCpu(triple="bogus-foo"), "LLVM knows no machine 'bogus-foo': write a triple such as"),
        (TvmCpu(cpu="pentium-99"), "LLVM knows no processor 'pentium-99'"),
        (TvmCuda(arch="ampere"), "arch=ampere: a GPU is called sm_80"),
    ],
)
def test_machines_that_are_not_known(tmp_path: Path, target: TvmCpu, message: str):
    with pytest.raises(UserError, match=message):
        qgraph.compile(network(), target, output=tmp_path / "none")


def test_fewer_trials_than_none_are_refused():
    with pytest.raises(ValueError, match="trials is -3, but must be 0 or more"):
        TvmCpu(trials=-3)


def test_kernels_that_do_not_fit_are_told():
    kernel = """
extern "C" __global__ void __launch_bounds__(64) fits(float* x) { __shared__ float s[16]; x[threadIdx.x] = s[0]; }
extern "C" __global__ void __launch_bounds__(2048) wide(float* x) { x[threadIdx.x] = 0; }
extern "C" __global__ void __launch_bounds__(1) serial(float* x) { __shared__ float s[20000]; x[0] = s[0]; }
"""
    assert list(check_kernels(kernel, Limits(1024, 49152))) == [
        "wide wants 2048 threads of a block, of 1024",
        "serial is not spread over threads",
        "serial shares 80000 bytes, of 49152",
    ]
    assert list(check_kernels("", Limits(1, 1))) == ["there are no kernels"]


@pytest.mark.parametrize(
    ("channels", "tile", "rows"), [(64, 32, 14), (16, 16, 14), (48, 16, 14), (1000, 40, 9), (21, 21, 14), (127, 1, 14)]
)
def test_tiles_divide_the_channels_and_fit_the_registers(channels: int, tile: int, rows: int):
    lanes = Lanes(16, 32)
    assert lanes.tile(channels) == tile
    assert lanes.rows(tile) == rows
    assert channels % tile == 0
    assert -(-tile // lanes.floats) * (rows + 1) < lanes.registers
