"""fuse-attention against golden text and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from golden_rewrites import as_written

import qgraph.ir
from qgraph.passes.fuse_attention import FuseAttention
from qgraph.pipeline import Context, Pipeline, Report

GOLDEN = Path(__file__).resolve().parent.parent / "golden/fuse-attention"
CASES = {path.stem: path.read_text().partition("\n---\n") for path in sorted(GOLDEN.glob("*.onnxtxt"))}
ALONE = [name for name in CASES if not name.startswith("cached")]
"""Those without a cache; test_fuse_attention_cache.py runs the others."""
BATCH, SEQ = 2, 5
LOWEST = float(np.finfo(np.float32).min)


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return outputs(model, feeds)[0]


def fuse(model: ir.Model) -> Report:
    return Pipeline([FuseAttention()]).run(model).parts[0]


def feeds_of(model: ir.Model, *, masked_row: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {"batch": BATCH, "seq": SEQ}
    shapes = {value.name: [sizes.get(str(dim), dim) for dim in value.shape] for value in model.graph.inputs}
    feeds = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if name != "keep"}
    names = {value.name for value in model.graph.inputs}
    keep = random.random((BATCH, 1, SEQ, SEQ)) < 0.7
    keep[..., 0] = True
    if masked_row:
        keep[0, 0, 2] = False
    if "keep" in names:
        feeds["keep"] = keep
    if "mask" in names:
        rows = slice(1) if shapes["mask"][2] == 1 else slice(None)
        feeds["mask"] = np.where(keep[:, :, rows], 0.0, LOWEST).astype(np.float32)
    return {name: array for name, array in feeds.items() if name in names}


def attention(feeds: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Two heads of four, in float64, by a loop."""
    result = np.empty((BATCH, SEQ, 8))
    for head in range(2):
        q, k, v = (feeds[name][..., 4 * head : 4 * head + 4].astype(np.float64) for name in "qkv")
        scores = q @ k.transpose(0, 2, 1) * 0.5 + mask[:, 0]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result[..., 4 * head : 4 * head + 4] = weights / weights.sum(-1, keepdims=True) @ v
    return result


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_as_written(name: str):
    model, report = as_written(GOLDEN / f"{name}.onnxtxt", fuse)
    assert (report.changed, list(report.skipped)) == (1, [])
    assert model.graph.opset_imports[""] == 23


@pytest.mark.parametrize("name", ALONE)
def test_the_same_is_computed(name: str):
    model = ir.from_onnx_text(CASES[name][0])
    feeds = feeds_of(model)
    before = run(model, feeds)
    fuse(model)
    onnx.checker.check_model(ir.to_proto(model))
    after = run(model, feeds)
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6)
    if {"q", "k", "v"} <= set(feeds) and "cos" not in feeds:
        mask = feeds["mask"] if "mask" in feeds else np.where(feeds["keep"], 0.0, LOWEST)
        np.testing.assert_allclose(after, attention(feeds, mask), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        (
            "grouped_rotated",
            "vu = Unsqueeze (vt, two)",
            "w = RotaryEmbedding (vt, cos, sin)\n vu = Unsqueeze (w, two)",
            "rotated",
        ),
        ("packed", "perm = [2, 0, 3, 1, 4]", "perm = [2, 0, 1, 3, 4]", "its queries are not split"),
        ("packed", "int64[5] split = {0, 0, 3, 2, 4}", "int64[5] split = {0, 0, 2, 3, 4}", "its queries are not split"),
    ],
)
def test_other_ways_to_share_and_pack_heads_stay(name: str, old: str, new: str, reason: str):
    text = CASES[name][0]
    assert old in text
    model = ir.from_onnx_text(text.replace(old, new))
    report = FuseAttention().apply(model, Context())
    assert report.changed == 0
    assert [reason in skipped.reason for skipped in report.skipped] == [True]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("sdpa_guarded", "", ""),
        ("sdpa_guarded", "{-inf}", "{-3.4028234663852886e38}"),
        ("sdpa_guarded", "{-inf}", "{-10000.0}"),
        ("eager_scaled_scores", "mask)", "mask)"),
    ],
)
def test_a_query_whose_every_key_is_masked_gets_what_it_got(name: str, old: str, new: str):
    model = ir.from_onnx_text(CASES[name][0].replace(old, new))
    feeds = feeds_of(model, masked_row=True)
    if "mask" in feeds:
        feeds["mask"][0] = LOWEST
    before = run(model, feeds)
    assert fuse(model).changed == 1
    np.testing.assert_allclose(run(model, feeds), before, rtol=0, atol=2e-6)


def test_blocks_with_other_numbers_of_queries_each_get_a_mask_for_theirs():
    """As where a decoder and an encoder look at the encoder's rows."""
    head = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[batch, rows, 4] x, float[batch, queries, 4] z, float[batch, 1, 1, rows] mask)
      => (float[batch, rows, 4] a_y, float[batch, queries, 4] b_y)
    <int64[4] split = {0, 0, 2, 2}, int64[3] join = {0, 0, 4}> {"""
    block = """
    @q4 = Reshape (SOURCE, split)
    @k4 = Reshape (x, split)
    @v4 = Reshape (x, split)
    @qt = Transpose <perm = [0, 2, 1, 3]> (@q4)
    @kt = Transpose <perm = [0, 2, 3, 1]> (@k4)
    @vt = Transpose <perm = [0, 2, 1, 3]> (@v4)
    @product = MatMul (@qt, @kt)
    @masked = Add (@product, mask)
    @probabilities = Softmax <axis = -1> (@masked)
    @context = MatMul (@probabilities, @vt)
    @back = Transpose <perm = [0, 2, 1, 3]> (@context)
    @y = Reshape (@back, join)"""
    blocks = [block.replace("@", name).replace("SOURCE", source) for name, source in (("a_", "x"), ("b_", "z"))]
    model = ir.from_onnx_text(f"{head}{''.join(blocks)} }}")
    random = np.random.default_rng(0)
    shapes = {"x": (2, 5, 4), "z": (2, 3, 4), "mask": (2, 1, 1, 5)}
    feeds = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    before = outputs(model, feeds)
    assert fuse(model).changed == 2
    for one, other in zip(outputs(model, feeds), before, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("product = MatMul (qt, kt)", "product = Sub (qt, kt)", "not a product of queries and keys"),
        ("k4 = Reshape (k, split)", "k0 = Reshape (k, split)\n k4 = Neg (k0)", "its keys are not split"),
        ("perm = [0, 2, 3, 1]> (k4)", "perm = [0, 2, 1, 3]> (k4)", "not laid out"),
        ("back = Transpose <perm = [0, 2, 1, 3]> (context)", "back = Neg (context)", "its heads are not joined"),
        ("float[batch, 1, 1, seq] mask", "float[batch, seq, 1] mask", "its mask 'mask' is not"),
        ("half = {0.5}", "half = {-0.5}", "multiplied by -0.5"),
        (
            "back = Transpose",
            "more = ReduceSum (probabilities)\n context2 = Add (context, more)\n back = Transpose",
            "used elsewhere too",
        ),
    ],
)
def test_what_does_not_fit_stays_and_says_why(old: str, new: str, reason: str):
    text = CASES["eager_scaled_scores"][0]
    assert old in text
    model = ir.from_onnx_text(text.replace(old, new))
    before = ir.to_onnx_text(model)
    report = FuseAttention().apply(model, Context())
    assert report.changed == 0
    assert [reason in skipped.reason for skipped in report.skipped] == [True]
    assert ir.to_onnx_text(model) == before


@pytest.mark.parametrize("opset", [13, 18, 20])
def test_a_model_of_an_earlier_opset_is_raised_where_there_is_something_to_fuse(opset: int):
    model = ir.from_onnx_text(CASES["eager_scaled_scores"][0].replace('"" : 21', f'"" : {opset}'))
    feeds = feeds_of(model)
    before = run(model, feeds)
    assert fuse(model).changed == 1
    assert model.graph.opset_imports[""] == 23
    np.testing.assert_allclose(run(model, feeds), before, rtol=0, atol=2e-6)


def test_a_softmax_that_weighs_nothing_is_not_spoken_of():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2, 3] x) => (float[2, 3] y) { y = Softmax (x) }'
    )
    report = fuse(model)
    assert (report.changed, list(report.skipped)) == (0, [])


def test_blocks_that_share_a_mask_share_what_is_made_of_it():
    text = CASES["eager_scaled_scores"][0]
    head, body = text.split("\n{\n")
    body = body.rsplit("}", 1)[0]
    twice = body.replace("y = Reshape", "y1 = Reshape")
    second = body
    for name in ("q4", "k4", "v4", "qt", "kt", "vt", "product", "scaled", "masked", "probabilities", "context", "back"):
        second = second.replace(f"{name} ", f"{name}b ").replace(f"({name},", f"({name}b,")
        second = second.replace(f"({name})", f"({name}b)").replace(f", {name})", f", {name}b)")
    second = second.replace("Reshape (q,", "Reshape (y1,")
    model = ir.from_onnx_text(f"{head}\n{{\n{twice}{second}}}")
    feeds = feeds_of(model)
    before = run(model, feeds)
    assert fuse(model).changed == 2
    assert sum(node.op_type == "Expand" for node in model.graph) == 1
    assert qgraph.ir.check(model) is None
    np.testing.assert_allclose(run(model, feeds), before, rtol=0, atol=2e-6)
