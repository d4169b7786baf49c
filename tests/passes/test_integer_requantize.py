"""`integer-requantize` behind `full-qdq`: every form of a unit in integers, against the quantized floats it stands for.

Each case is a float graph of `integer_forms.txt`. Its integer graph is run in ONNX Runtime and by the definitions,
which must agree to the bit, and compared with the QDQ graph in ONNX Runtime without its rewriting: one step of the
output's scale at most, unless `BOUNDS` says otherwise and why.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from integer_compilation import (
    Compiled,
    assert_reference_agrees,
    check_golden,
    compiled,
    feeds,
    graph,
    in_onnxruntime,
    output_scale,
    steps_apart,
)

from qgraph.analysis.integer_units import MOVERS, Form, integer_units
from qgraph.errors import UserError
from qgraph.pipeline import Pipeline
from qgraph.targets.integer import Integer


def read_cases() -> dict[str, dict[str, str]]:
    """Return the graphs of `integer_forms.txt`, where they stand as `--- group: name`, by group and name."""
    groups: dict[str, dict[str, str]] = {}
    text = (Path(__file__).parent / "integer_forms.txt").read_text(encoding="utf-8")
    for part in text.split("--- ")[1:]:
        head, _, body = part.partition("\n")
        group, _, name = head.partition(": ")
        groups.setdefault(group, {})[name] = body
    return groups


GROUPS = read_cases()
CASES = {name: text for group in GROUPS.values() for name, text in group.items()}
OPSETS = {"RMSNormalization": 23}


GOLDEN = Path(__file__).parent.parent / "golden" / "integer-requantize"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.onnxtxt")), ids=lambda path: path.stem)
def test_golden(path: Path):
    model, report = check_golden(path, "integer-requantize")
    assert Integer().check(model) == []
    assert bool(report.parts[-1].skipped) == (path.stem == "boundary")
    if path.stem != "boundary":
        for seed in range(2):
            assert_reference_agrees(model, feeds(model, seed, batch=3))


def case_graph(case: str) -> ir.Model:
    return graph(CASES[case], OPSETS.get(case, 21))


CHAINS = {"attention", "attention where", "around a layer", "function of a layer", "root mean square", "two layers"}
"""Several roundings one behind the other: what one is off the next ones carry on."""
BOUNDS = {
    # The result has 16 bits, and the bias is rounded to the accumulator's step, which is that of 8-bit factors.
    **dict.fromkeys(GROUPS["layer"], 2.0),
    **dict.fromkeys(("matmul scaled", "matmul negated"), 2.0),
    # Normalized numbers have 15 bits less half of those of the length, and their gains 15.
    **dict.fromkeys(("LayerNormalization", "LayerNormalization without bias", "RMSNormalization"), 2.0),
}
"""Steps of the output's scale, where 16 bits are finer than what is computed with; elsewhere, and at 8 bits, 1."""
SLACK = 0.01
"""Of a step: outputs are float32."""


def assert_near(case: str, options: str, rounding: str, seed: int = 100) -> None:
    model = case_graph(case)
    one = compiled(model, options, rounding)
    assert Integer().check(one.integer) == [], case
    assert not any(part.skipped for report in one.reports for part in report.parts), case
    onnx.checker.check_model(ir.to_proto(one.integer), full_check=True)
    signature = [[(v.name, v.dtype) for v in m.graph.outputs] for m in (model, one.integer)]
    assert signature[0] == signature[1], case
    inputs = feeds(model, seed)
    off = steps_apart(one, inputs)
    if case in CHAINS:
        largest = max(np.abs(array).max() for array in in_onnxruntime(one.quantized, inputs))
        scale = min(output_scale(value) for value in one.integer.graph.outputs)
        assert off * scale <= 0.05 * largest, case
    else:
        bound = BOUNDS.get(case, 1.0) if "wide=none" not in options else 1.0
        assert off <= bound + SLACK, f"{case}: {off} steps"


@pytest.mark.parametrize("case", CASES)
def test_every_form(case: str):
    assert_near(case, "", "half-up")


OPTIONS = {
    "8 bits": ("wide=none", "half-up"),
    "signed": ("activations=int8,wide=none", "gemmlowp"),
    "symmetric": ("activations=int8,symmetric=true,wide=none", "half-even"),
    "symmetric without sign": ("symmetric=true,sqnr=0.0", "half-up"),
    "powers of two": ("scales=pow2,wide=none", "half-up"),
    "4-bit weights of one scale": ("weights=int4,per_channel=false,wide=none", "half-up"),
    "gemmlowp": ("activations=int8", "gemmlowp"),
    "half-even": ("per_channel=false", "half-even"),
    "weights in two halves": ("wide_weights=all", "half-up"),
    "weights in two halves, gemmlowp": ("wide_weights=all,wide=none,scales=pow2", "gemmlowp"),
}


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, number: int):
    """Every option meets a part of every kind of case, each another one."""
    first = (list(OPTIONS).index(name) + number * 4) % 16
    for case in list(CASES)[first::16]:
        assert_near(case, *OPTIONS[name])


def test_every_form_is_tried():
    units = [unit for case in CASES for unit in integer_units(case_graph(case).graph).units]
    assert {unit.form for unit in units} == set(Form)
    assert {unit.main.op_type for unit in units if unit.form is Form.MOVE} | {"Identity"} == MOVERS


ROUNDED_BIAS = {case for case, text in GROUPS["layer"].items() if " b" in text or "alpha" in text} | {
    "matmul scaled",
    "matmul negated",
}
OWN_ROUNDING = {"Pow", "LayerNormalization", "LayerNormalization without bias", "RMSNormalization", "root mean square"}
OWN_ROUNDING |= {case for case in CASES if case.startswith(("Softmax", "attention", "quotient"))}
EXACT = [case for case in CASES if case not in ROUNDED_BIAS | OWN_ROUNDING | {"clip with one bound"}]


@pytest.mark.parametrize("number", range(4))
def test_powers_of_two_are_exact(number: int):
    """Where floats are exact too and ties go to even, there is no difference at all.

    Left out: biases, which are rounded to the accumulator's step, and what divides or interpolates.
    """
    for index, case in enumerate(EXACT[number::4]):
        one = compiled(case_graph(case), "scales=pow2" + (",wide=none" if index % 2 else ""), "half-even")
        assert steps_apart(one, feeds(one.floating, 7)) == 0, case


# --- graphs that were quantized elsewhere -----------------------------------------------------------------------------

FOREIGN = (
    '<ir_version: 10, opset_import: ["" : 21]>\ng (float[2,8] x) => (float[2,4] y)\n'
    "<float s = {{0.05}}, {kind} z = {{{zero}}}, uint8 v = {{128}}, float u = {{0.1}}>\n"
    "{{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = DequantizeLinear{weight}"
    " [layer] m = MatMul(d, e) o = QuantizeLinear(m, u, v) y = DequantizeLinear(o, u, v) }}"
)


def foreign(weight: str, kind: str = "uint8", zero: int = 120, **constants: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(FOREIGN.format(weight=weight, kind=kind, zero=zero))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    model = ir.from_proto(proto)
    Pipeline.parse("infer-shapes").run(model)
    return model


CODES = np.random.default_rng(0).integers(-100, 100, (8, 4))
SCALES = np.linspace(0.01, 0.02, 4, dtype=np.float32)
READ = {
    "zero points of weights": foreign(
        "<axis=1>(w, t, p)", w=(CODES // 2 + 128).astype(np.uint8), t=SCALES, p=np.full(4, 128, np.uint8)
    ),
    "one scale": foreign("(w, t)", w=CODES.astype(np.int8), t=np.float32(0.02)),
    "16-bit inputs": foreign("<axis=1>(w, t)", "int16", 0, w=CODES.astype(np.int8), t=SCALES),
    "more than 8 bits less the zero point": foreign(
        "(w, t, p)", w=(CODES + 128).astype(np.uint8), t=np.float32(0.02), p=np.uint8(0)
    ),
    "16-bit weights": foreign("<axis=1>(w, t)", w=(CODES * 327).astype(np.int16), t=SCALES / 256),
    "16-bit weights, every bit": foreign("<axis=1>(w, t)", w=np.full((8, 4), -32768, np.int16), t=SCALES / 256),
    "signed inputs": foreign("<axis=-1>(w, t)", "int8", -5, w=CODES.astype(np.int8), t=SCALES),
}  # fmt: skip
LEFT = {
    "scales along the inputs": foreign("<axis=0>(w, t)", w=CODES.astype(np.int8), t=np.ones(8, np.float32)),
    "a scale for every group": foreign(
        "<axis=0, block_size=4>(w, t)", w=CODES.astype(np.int8), t=np.ones((2, 4), np.float32)
    ),
}


@pytest.mark.parametrize("case", READ)
def test_other_quantized_graphs(case: str):
    quantized = READ[case]
    integer = quantized.clone()
    report = Pipeline.parse("integer-requantize").run(integer)
    assert Integer().check(integer) == []
    inputs = {"x": np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32) * 3}
    assert steps_apart(Compiled(quantized, quantized, integer, (report,)), inputs) <= 1 + SLACK


@pytest.mark.parametrize("reason", LEFT)
def test_what_other_graphs_hold_that_has_no_form(reason: str):
    model = LEFT[reason].clone()
    (part,) = Pipeline.parse("integer-requantize").run(model).parts
    (skipped,) = part.skipped
    assert skipped.node == "layer"
    assert reason in skipped.reason
    with pytest.raises(UserError, match="'layer' stays in float"):
        Pipeline.parse("integer-requantize{strict=true}").run(LEFT[reason].clone())
