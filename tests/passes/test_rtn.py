"""rtn and hqq against golden text, the numerics that they call, and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from golden_rewrites import is_file

import qgraph.ir
from qgraph.analysis.compressed_weights import compressed
from qgraph.errors import UserError
from qgraph.numerics.hqq import hqq
from qgraph.numerics.weights import WeightScheme, quantize_weight
from qgraph.passes._weight_options import set_bits
from qgraph.passes.hqq import Hqq
from qgraph.passes.rtn import Rtn
from qgraph.pipeline import Pass, Pipeline, Report

GOLDEN = Path(__file__).resolve().parent.parent / "golden/rtn/every_kind.onnxtxt"
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
DECODER = """
<ir_version: 10, opset_import: ["" : 21]>
decoder (int64[s] ids) => (float[s,12] logits)
<float[12,K] table = {0}, float[K,40] up = {0}, float[K,40] down = {0}>
{
    words = Gather (table, ids)
    [wide] h = MatMul (words, up)
    a = Tanh (h)
    [narrow] d = Gemm <transB = 1> (a, down)
    turned = Transpose (table)
    [head] logits = MatMul (d, turned)
}
"""


def run(model: ir.Model, one: Pass) -> Report:
    return Pipeline([one]).run(model).parts[0]


def decoder(width: int = 64, dtype: type = np.float32) -> ir.Model:
    """Return a small model with a tied table, a MatMul and a Gemm."""
    text = DECODER.replace("K", str(width))
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        array = random.standard_normal(list(value.shape)).astype(dtype)
        value.const_value = ir.tensor(array, name=name)
    return model


def output(model: ir.Model) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Fused, 4-bit products would round the activations to 8 bits.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.arange(12)})[0]


def reference(model: ir.Model, quantize) -> np.ndarray:
    """The model computed with the weights that `quantize` gives."""
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    table, down = quantize(weights["table"]).dequantize(), quantize(weights["down"]).dequantize()
    up = quantize(weights["up"].T).dequantize().T
    return np.tanh(table @ up) @ down.T @ table.T


@pytest.mark.parametrize(
    ("one", "quantize"),
    [
        (Rtn(), lambda w: quantize_weight(w, WeightScheme())),
        (Rtn(bits=3, group=16, symmetric=True), lambda w: quantize_weight(w, WeightScheme("int", 3, 16, True))),
        (
            Rtn(bits=8, group=0, method="minmax"),
            lambda w: quantize_weight(w, WeightScheme("int", 8, 0), method="minmax"),
        ),
        (Rtn(format="nvfp4"), lambda w: quantize_weight(w, WeightScheme("nvfp4"))),
        (Rtn(format="fp8e4m3", group=0), lambda w: quantize_weight(w, WeightScheme("fp8e4m3", group=0))),
        (Hqq(bits=2, group=16), lambda w: hqq(w, WeightScheme(bits=2, group=16))),
    ],
    ids=["int4", "int3-symmetric", "int8-column", "nvfp4", "fp8e4m3", "hqq2"],
)
def test_the_model_computes_with_the_rounded_weights(one: Pass, quantize):
    model = decoder()
    expected = reference(model, quantize)
    report = run(model, one if one.min_elements == 0 else type(one)(**(vars(one) | {"min_elements": 0})))
    assert report.changed == 4
    assert report.figures["weights"] == 3
    np.testing.assert_allclose(output(model), expected, rtol=1e-3, atol=1e-3)


def test_tied_weights_stay_one_and_a_second_run_finds_nothing():
    model = decoder()
    assert run(model, Rtn(min_elements=0)).changed == 4
    assert len(list(compressed(model))) == 3
    tied = next(weight for weight in compressed(model) if len(weight.readers) == 2)
    assert {node.op_type for node in tied.readers} == {"Gather", "MatMul"}
    again = run(model, Rtn(min_elements=0))
    assert again.changed == 0
    assert "its weight is compressed already" in {skipped.reason for skipped in again.skipped}


def schemes(model: ir.Model) -> dict[str, int]:
    return {weight.name: weight.scheme.bits for weight in compressed(model)}


def test_widths_of_tables_heads_and_noted_layers():
    model = decoder()
    run(model, Rtn(min_elements=0, head_bits=8))
    assert schemes(model) == {"table": 8, "up": 4, "down": 4}
    model = decoder()
    run(model, Rtn(min_elements=0, embedding_bits=6))
    assert schemes(model) == {"table": 6, "up": 4, "down": 4}
    model = decoder()
    set_bits(next(node for node in model.graph if node.name == "wide"), 3, 16)
    set_bits(next(node for node in model.graph if node.name == "head"), 16)
    report = run(model, Hqq(min_elements=0))
    assert schemes(model) == {"up": 3, "down": 4}
    assert {weight.name: weight.scheme.group for weight in compressed(model)} == {"up": 16, "down": 32}
    assert ("head", "it was chosen to stay in float") in report.skipped
    assert all(not node.metadata_props.get("qgraph.bits") for node in model.graph if node.name == "wide")


def test_what_is_left_alone_and_why():
    reasons = dict(run(decoder(), Rtn(min_elements=0, exclude=("narrow", "head"))).skipped)
    assert reasons["narrow"] == "it is excluded"
    assert reasons["head"] == "its weight is shared with 'head', which is excluded"
    reasons = dict(run(decoder(), Rtn(min_elements=0, embeddings=False)).skipped)
    assert reasons["head"] == "it is an embedding table, and embeddings=false; the output layer shares it"
    reasons = dict(run(decoder(), Rtn()).skipped)
    assert reasons["head"] == "its weight has fewer than 1024 elements"


def test_groups_that_do_not_divide_are_told():
    model = decoder(width=72)
    expected = reference(model, lambda w: quantize_weight(w, WeightScheme()))
    report = run(model, Rtn(min_elements=0))
    assert report.notes[0] == "3 weights as int4g32a"
    assert report.notes[-1].startswith("the last group is shorter in ")
    assert "(72 inputs in groups of 32)" in report.notes[-1]
    np.testing.assert_allclose(output(model), expected, rtol=1e-3, atol=1e-3)


def test_weights_are_read_when_the_file_is_written(tmp_path: Path):
    model = decoder()
    qgraph.ir.save(model, tmp_path / "float.onnx", external_above=0)
    texts = []
    for _ in range(2):
        again = qgraph.ir.load(tmp_path / "float.onnx")
        run(again, Rtn(min_elements=0))
        qgraph.ir.save(again, tmp_path / "int.onnx")
        texts.append((tmp_path / "int.onnx").read_bytes())
    assert texts[0] == texts[1]
    loaded = qgraph.ir.load(tmp_path / "int.onnx")
    weight = next(one for one in compressed(loaded) if one.name == "up")
    expected = quantize_weight(model.graph.initializers["up"].const_value.numpy().T, WeightScheme())
    np.testing.assert_array_equal(weight.quantized().dequantize(), expected.dequantize())


@pytest.mark.parametrize("one", [Rtn(min_elements=0), Hqq(min_elements=0)])
def test_a_weight_that_is_no_number_is_named(one: Pass, tmp_path: Path):
    model = decoder()
    array = model.graph.initializers["up"].const_value.numpy().copy()
    array[3, 7] = np.nan
    model.graph.initializers["up"].const_value = ir.tensor(array, name="up")
    run(model, one)
    with pytest.raises(UserError, match=r"the weight 'up' of 'wide' holds nan at \(3, 7\)"):
        qgraph.ir.save(model, tmp_path / "model.onnx")


def test_options_that_do_not_go_together():
    for one, what in (
        (Rtn(bits=7), "not 7"),
        (Rtn(head_bits=1), "not 1"),
        (Rtn(group=-2), "not -2"),
        (Hqq(norm=1.5), "norm=1.5"),
    ):
        with pytest.raises(UserError, match=what):
            run(decoder(), one)
    model = decoder()
    model.graph.opset_imports[""] = 20
    with pytest.raises(UserError, match="convert-opset"):
        run(model, Rtn(min_elements=0))


def test_golden():
    model = ir.from_onnx_text(f"""{HEAD}
kinds (int64[s] ids) => (float[s,2] y, float[s,2] z)
<float[4,8] table = {{0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7, 0, 15, 0, 15, 0, 15, 0, 15, 15, 0, 0, 0, 0,
                      0, 0, 15}},
 float[4,2] w = {{0, 1, 2, 3, -4, -5, 6, 7}}, float[2] b = {{1, 2}}, float[2,4] v = {{7, 5, 3, 1, -1, -3, -5, 7}}>
{{
    words = Gather (table, ids)
    turned = Transpose (table)
    scores = MatMul (words, turned)
    [first] product = MatMul (scores, w)
    y = Add (product, b)
    [second] z = Gemm <transB = 1> (scores, v, b)
    [third] activations = MatMul (product, z)
}}
""")
    before = ir.to_onnx_text(model)
    report = run(model, Rtn(min_elements=0, method="minmax", group=4))
    skipped = "".join(f"# {skipped.node}: {skipped.reason}\n" for skipped in report.skipped)
    notes = "; ".join(report.notes)
    is_file(GOLDEN, f"{before}\n# =>\n\n{ir.to_onnx_text(model)}\n{skipped}# {notes}\n")
