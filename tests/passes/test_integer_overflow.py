"""No accumulator overflows for any input: proven by intervals, and tried with the inputs that reach furthest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from float_networks import random_network
from integer_compilation import assert_reference_agrees, compiled
from integer_intervals import Intervals

import qgraph.ir
from qgraph.errors import UserError
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.reference import ReferenceSession

LIMIT = (1 << 31) - 1
OPTIONS = ("", "wide=none", "activations=int8,symmetric=true", "scales=pow2", "wide_weights=all")


@pytest.mark.parametrize("chunk", range(4))
def test_intervals_of_random_networks(chunk: int):
    found = 0
    for seed in range(1000 + chunk * 20, 1020 + chunk * 20):
        model = random_network(seed)
        Pipeline.parse("remove-unused").run(model)
        integer = compiled(model, OPTIONS[seed % len(OPTIONS)], count=2).integer
        Pipeline.parse("infer-shapes").run(integer)
        found += Intervals(integer).accumulators
    assert found > 100


def test_the_proof_finds_what_overflows():
    """The proof is none if it passes a graph that was broken: a weight that is no longer as small as it has to be."""
    model, _ = layer(np.full((600, 2), 127), bits=16)
    Intervals(model)
    stored = next(value for name, value in model.graph.initializers.items() if name.endswith("/weight"))
    stored.const_value = ir.tensor(np.full((600, 2), 127, np.int8), name=stored.name)
    with pytest.raises(AssertionError, match=r"MatMulInteger|Mul|Add"):
        Intervals(model)


def layer(
    weight: np.ndarray, bits: int = 8, bias: float | None = None, stored_as: str = "int8"
) -> tuple[ir.Model, Report]:
    """Return x [1, inputs] times a weight [inputs, outputs] in integers; scales are 1, 1 and 2^20."""
    kind, zero = ("uint8", 100) if bits == 8 else ("int16", 0)
    inputs, outputs = weight.shape
    added, result = ("", "m") if bias is None else ("b = Add(m, c)", "b")
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[1,{inputs}] x) => (float[1,{outputs}] y)\n'
        f"<float s = {{1}}, {kind} z = {{{zero}}}, {stored_as}[1] w = {{0}}, float t = {{1048576}}, int16 o = {{0}},"
        f" float c = {{{bias or 0}}}>\n"
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(w, s)"
        f" [layer] m = MatMul(d, e) {added} r = QuantizeLinear({result}, t, o) y = DequantizeLinear(r, t, o) }}"
    )
    stored = model.graph.initializers["w"]
    stored.const_value, stored.shape = ir.tensor(weight.astype(stored_as), name="w"), ir.Shape(weight.shape)
    report = Pipeline.parse("infer-shapes,integer-requantize").run(model)
    return model, report


def weight_of(model: ir.Model) -> np.ndarray:
    (product, *_) = [node for node in model.graph if node.op_type == "MatMulInteger"]
    return qgraph.ir.constant(product.inputs[1]).astype(np.int64)


def halves_of(model: ir.Model, bits: int) -> list[np.ndarray]:
    """Return the upper and the lower half of a 16-bit weight, each of which reads both halves of 16-bit inputs."""
    found = [node for node in model.graph if node.op_type == "MatMulInteger"]
    return [qgraph.ir.constant(node.inputs[1]).astype(np.int64) for node in found[:: 1 if bits == 8 else 2]]


@pytest.mark.parametrize("seed", range(20))
def test_weights_in_two_halves(seed: int):
    """The halves are the weight where they fit; no input leads beyond int32; the result is the exact one, rounded."""
    random = np.random.default_rng(seed)
    bits = int(random.choice([8, 16]))
    inputs = int(random.choice([3, 200, 508, 2000] if bits == 16 else [3, 5000, 67000]))
    weight = random.integers(-32639, 32640, (inputs, 3))
    weight[:, 0] = 32639 * random.choice([-1, 1], inputs)
    weight[:, 1] = random.integers(-127, 128, inputs)
    bias = float(random.choice([0, 1e9, -3e12]))
    model, report = layer(weight, bits, bias, "int16")
    Pipeline.parse("infer-shapes").run(model)
    Intervals(model)
    upper, lower = halves_of(model, bits)
    lost = any("could leave int32" in note for note in report.parts[-1].notes)
    if not lost:
        np.testing.assert_array_equal(upper * 256 + lower, weight)
    codes = (-100, 155) if bits == 8 else (-32768, 32767)
    for output in range(3):
        for part in (upper, lower):
            for sign in (1, -1):
                x = np.where(sign * part[:, output] > 0, codes[1], codes[0]).astype(np.int64)
                assert np.abs(x @ part).max() <= LIMIT
                (found,) = assert_reference_agrees(model, {"x": x[None].astype(np.float32)})
                exact = (x @ weight + bias) / 2**20
                # Five bits are lost at most, here: a weight is off by half of 32.
                step = 1 + lost * 16 * np.abs(x).sum() / 2**20
                assert np.abs(found[0] / 2**20 - np.clip(exact, -32768, 32767)).max() <= step


def test_more_weights_of_16_bits_than_int32_has_room_for_stay_in_float():
    _, report = layer(np.full((17000, 1), 3000), bits=16, stored_as="int16")
    (skipped,) = report.parts[-1].skipped
    assert skipped.reason == "each output has 17000 weights of 16 bits, too many for int32: use 8 bits"


@pytest.mark.parametrize("seed", range(30))
def test_the_inputs_that_reach_furthest(seed: int):
    random = np.random.default_rng(seed)
    bits = int(random.choice([8, 16]))
    inputs = int(random.choice([3, 200, 515, 700] if bits == 16 else [3, 1000, 67000, 90000]))
    weight = random.integers(-127, 128, (inputs, 3))
    weight[:, 0] = 127 * random.choice([-1, 1], inputs)
    bias = float(random.choice([0, 1e9, -2.1e9, 4e9, -3e12]))
    model, report = layer(weight, bits, bias)
    Pipeline.parse("infer-shapes").run(model)
    Intervals(model)
    stored = weight_of(model)
    codes = (-100, 155) if bits == 8 else (-32768, 32767)
    added = [value for name, value in model.graph.initializers.items() if name.endswith("/bias")]
    offsets = qgraph.ir.constant(added[0]).astype(np.int64).reshape(-1) if added else np.zeros(3, np.int64)
    for output in range(3):
        for sign in (1, -1):
            x = np.where(sign * stored[:, output] > 0, codes[1], codes[0]).astype(np.int64)
            sums = x @ stored + offsets
            assert np.abs(sums).max() <= LIMIT
            assert_reference_agrees(model, {"x": x[None].astype(np.float32)})
    beyond = np.abs(weight).sum(axis=0) * (155 if bits == 8 else 33024) + abs(bias) > LIMIT
    notes = [note for note in report.parts[-1].notes if "could leave int32" in note]
    assert bool(notes) == bool(beyond.any())
    if notes:
        count = f"{beyond.sum()} of 3 outputs"
        assert notes == [f"'layer': {count} could leave int32, so that their weights have fewer bits"]
        assert (np.abs(stored).max(axis=0) < np.abs(weight).max(axis=0))[beyond].all()
    np.testing.assert_array_equal(stored[:, ~beyond], weight[:, ~beyond])


def test_fewer_bits_compute_the_same_within_their_rounding():
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (2000, 4))
    model, _ = layer(weight, bits=16)
    x = random.integers(-30000, 30000, (1, 2000))
    (y,) = ReferenceSession(model).run(None, {"x": x.astype(np.float32)})
    # Each weight is off by half a step of two at most; those errors add up as random numbers do.
    off = np.abs(y - x @ weight)
    assert off.max() < 5 * np.sqrt(2000) * 17000 + (1 << 19)


def test_the_reference_raises_where_something_overflows():
    model, _ = layer(np.full((600, 2), 127), bits=16)
    stored = next(value for name, value in model.graph.initializers.items() if name.endswith("/weight"))
    stored.const_value = ir.tensor(np.full((600, 2), 127, np.int8), name=stored.name)
    with pytest.raises(UserError, match="cannot be computed"):
        ReferenceSession(model).run(None, {"x": np.full((1, 600), 32767, np.float32)})


@pytest.mark.parametrize("bias", [np.nan, np.inf])
def test_a_bias_that_is_no_number_stays_in_float(bias: float):
    source = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[1,2] x) => (float[1,2] y)\n'
        "<float s = {1}, uint8 z = {0}, int8[2,2] w = {1, 2, 3, 4}, float[2] c = {0, 0}>\n"
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear(w, s)"
        " [layer] m = Gemm(d, e, c) r = QuantizeLinear(m, s, z) y = DequantizeLinear(r, s, z) }"
    )
    source.graph.initializers["c"].const_value = ir.tensor(np.array([0, bias], np.float32), name="c")
    (part,) = Pipeline.parse("integer-requantize").run(source).parts
    assert [(one.node, one.reason) for one in part.skipped] == [("layer", "its bias holds NaN or infinity")]
