"""`qgraph compile -t integer`: what is wrong with model, data or options ends in one line that says how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qgraph import cli

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
LAYER = "g (float[N,64] x) => (float[N,12] y) { m = MatMul(x, w) [odd] h = Shrink(m) y = MatMul(h, v) }"
Compile = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def compile_(work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Compile:
    """Return a function that compiles a graph with constants for `integer`: the status and the lines it ends with."""
    monkeypatch.chdir(work)

    def run(text: str, *arguments: str, **constants: np.ndarray) -> tuple[int, list[str]]:
        model = onnx.parser.parse_model(HEAD + text)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
        onnx.save(model, "m.onnx")
        options = [] if "-t" in arguments else ["-t", "integer"]
        status = cli.main(["compile", "m.onnx", *options, "-o", "out", "--force", *arguments])
        out, err = capfd.readouterr()
        assert "a fault of qgraph" not in err
        return status, (err + out).splitlines()

    return run


def weights(*shape: int, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * size).astype(np.float32)


CALIB = ("--calib", "calib.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "static quantization needs calibration data: pass --calib DATA"),
        ((*CALIB, "--strict"), "'odd' stays in float: Shrink has no integer form"),
        (
            (*CALIB, "--emit", "c", "--shape", "x=1,64"),
            "'odd' stays in float: Shrink has no integer form. Without --emit",
        ),
        (
            (*CALIB, "--emit", "so", "--shape", "x=1,64"),
            "'odd' stays in float: Shrink has no integer form. Without --emit",
        ),
        ((*CALIB, "--emit", "wasm"), "--emit wasm: the target integer writes c and so"),
        ((*CALIB, "--emit", "c", "-t", "cpu-int8"), "cpu-int8 writes no code (c): --emit is for the target integer"),
        ((*CALIB, "--strict", "-t", "cpu-int8"), "--strict is for the target integer, and this is cpu-int8"),
        ((*CALIB, "--set", "integer-requantize.rounding=up"), "option 'rounding' of 'integer-requantize' is 'up', but"),
        ((*CALIB, "--set", "full-qdq.scales=odd"), "option 'scales' of 'full-qdq' is 'odd', but"),
        ((*CALIB, "--set", "full-qdq.weights=int2"), "option 'weights' of 'full-qdq' is 'int2', but"),
    ],
)
def test_refused(compile_: Compile, arguments: tuple[str, ...], message: str):
    status, lines = compile_(LAYER, *arguments, w=weights(64, 16), v=weights(16, 12))
    assert status == 2
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]


def test_without_strict_a_boundary_is_told(compile_: Compile, work: Path):
    status, lines = compile_(LAYER, *CALIB, w=weights(64, 16), v=weights(16, 12))
    assert status == 0
    assert any("1 nodes stay in float" in line for line in lines)
    assert "Shrink has no integer form" in (work / "out" / "manifest.json").read_text(encoding="utf-8")


def test_code_of_dynamic_shapes_names_the_input(compile_: Compile):
    status, lines = compile_(
        "g (float[N,64] x) => (float[N,12] y) { y = MatMul(x, w) }", *CALIB, "--emit", "c", w=weights(64, 12)
    )
    assert status == 2
    assert "input 'x' has the shape ['N', '64']" in lines[-1]
    assert "--shape x=1,64" in lines[-1]


def test_half_precision_is_refused(compile_: Compile, work: Path):
    np.savez(work / "half.npz", x=np.zeros((8, 64), np.float16))
    text = "g (float16[N,64] x) => (float16[N,8] y) { y = MatMul(x, w) }"
    status, lines = compile_(text, "--calib", "half.npz", w=weights(64, 12).astype(np.float16))
    assert status == 2
    assert "full-qdq needs it in float32" in lines[-1]


def test_weights_that_are_no_numbers_are_named(compile_: Compile):
    text = "g (float[N,64] x) => (float[N,12] y) { y = MatMul(x, w) }"
    status, lines = compile_(text, *CALIB, w=np.full((64, 12), np.nan, np.float32))
    assert status == 2
    assert "constant in 'w'" in lines[-1]


@pytest.mark.parametrize("size", [1e-43, 1e-38, 1e-20, 1e20, 1e30])
def test_weights_of_any_size_compile(compile_: Compile, size: float):
    """Either integers represent the scales, or the layer is a boundary with a reason."""
    text = "g (float[N,64] x) => (float[N,12] y) { m = MatMul(x, w) [second] n = MatMul(m, v) y = Tanh(n) }"
    status, lines = compile_(text, *CALIB, w=weights(64, 16, size=size), v=weights(16, 12, size=min(1 / size, 1e38)))
    assert status == 0, lines[-1]


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ("g (float[N,64] x) => (float[N,0] y, float[N,64] z) { y = MatMul(x, w) z = Tanh(x) }", {"w": weights(64, 0)}),
        (
            "g (float[N,64] x) => (float[N,0,8] y, float[N,64] z) { r = Reshape(x, s) y = Conv(r, w) z = Tanh(x) }",
            {"w": weights(0, 8, 1), "s": np.array([-1, 8, 8])},
        ),
    ],
)
def test_layers_without_channels_stay_in_float(compile_: Compile, text: str, constants: dict[str, np.ndarray]):
    status, lines = compile_(text, *CALIB, **constants)
    assert status == 0, lines[-1]
    status, lines = compile_(text, *CALIB, "--strict", **constants)
    assert status == 2
    assert "stays in float" in lines[-1]


def test_sums_too_long_for_int32_are_named(compile_: Compile):
    """A product of activations has nothing to halve: it stays in float, and --strict says how long it may be."""
    text = "g (float[1,64] x) => (float[1,1] y) { t = Tile(x, r) u = Transpose(t) [long] y = MatMul(t, u) }"
    status, lines = compile_(text, *CALIB, "--strict", r=np.array([1, 4096]))
    assert status == 2
    assert "'long' stays in float: its sums of 262144 products could leave int32 (at most " in lines[-1]


QUANTIZED = (
    "g (float[N,64] x) => (float[N,12] y) <uint8 z = {128}>\n"
    "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(w, t) [layer] m = MatMul(d, e)"
    " p = QuantizeLinear(m, u, z) y = DequantizeLinear(p, u, z) }"
)


def test_scales_that_no_multiplier_represents_are_named(compile_: Compile):
    codes = np.ones((64, 12), np.int8)
    scales = {name: np.float32(number) for name, number in (("s", 1e4), ("t", 1e4), ("u", 1e-6))}
    passes = ("--passes", "remove-identity", *CALIB)
    status, lines = compile_(QUANTIZED, *passes, "--strict", w=codes, **scales)
    assert status == 2
    assert "'layer' stays in float: " in lines[-1]
    assert "use a coarser scale for its inputs or a finer one for its result" in lines[-1] or "scale" in lines[-1]
    scales |= {"s": np.float32(1e-30), "t": np.float32(1e-30), "u": np.float32(1e30)}
    status, lines = compile_(QUANTIZED, *passes, "--strict", w=codes, **scales)
    assert "'layer'" not in lines[-1], "what is less than half a step is zero, and no problem"


def test_outputs_that_hold_nothing_prove_nothing(compile_: Compile, work: Path):
    np.savez(work / "calib.npz", x=np.zeros((8, 64), np.float32))
    status, lines = compile_("g (float[N,64] x) => (float[N,0] y) { y = MatMul(x, w) }", *CALIB, w=weights(64, 0))
    assert status != 0
    assert "out is not verified: no output holds values that can be compared" in lines[-1]
