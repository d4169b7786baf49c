"""Large constants: folded as a whole when the model does not grow, and computed only when the file is written."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.passes import FoldConstants
from qgraph.pipeline import Pipeline

WEIGHT = np.random.default_rng(0).normal(size=(256, 768)).astype(np.float32)


def model_of(text: str, **weights: np.ndarray) -> ir.Model:
    """Return a model whose initializers `weights` are too large for text."""
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[value.name or ""], name=value.name)
        model.graph.register_initializer(value)
    return model


SPLIT = """g (float[n,256] x, float[256,768] w) => (float[n,256] y)
<int64[1] c0 = {0}, int64[1] c1 = {256}, int64[1] c2 = {512}, int64[1] c3 = {768}, int64[1] a = {1}> {
    q = Slice (w, c0, c1, a) k = Slice (w, c1, c2, a) v = Slice (w, c2, c3, a) kt = Transpose (k)
    p = MatMul (x, q) r = MatMul (p, kt) y = MatMul (r, v)
}"""


def test_the_parts_of_a_weight_replace_it():
    model = model_of(SPLIT, w=WEIGHT)
    before = qgraph.ir.weight_bytes(model)
    report = Pipeline([FoldConstants(), *Pipeline.parse("remove-unused")]).run(model)
    assert [node.op_type for node in model.graph] == ["MatMul"] * 3
    assert qgraph.ir.weight_bytes(model) <= before
    assert report.parts[0].changed == 4
    parts = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert all(isinstance(tensor, ir.LazyTensor) for tensor in parts.values()), "computed while the file is written"
    np.testing.assert_array_equal(parts["kt"].numpy(), WEIGHT[:, 256:512].T)
    np.testing.assert_array_equal(parts["v"].numpy(), WEIGHT[:, 512:])


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("it is read elsewhere", "y1 = Transpose (w) y2 = MatMul (x, w) y = MatMul (y2, y1)"),
        (
            "twice as many bytes",
            "d = Cast <to = 11> (w) e = Cast <to = 11> (x) f = MatMul (e, d) y = Cast <to = 1> (f)",
        ),
        ("an operator that repeats", "d = Concat <axis = 1> (w, w) y = MatMul (x, d)"),
    ],
)
def test_what_would_make_the_file_larger_stays(why: str, text: str):
    model = model_of(f"g (float[n,256] x, float[256,768] w) => (float[n,m] y) {{ {text} }}", w=WEIGHT)
    assert Pipeline([FoldConstants()]).run(model).changed == 0, why


def test_a_small_result_of_a_large_constant_is_computed_at_once():
    model = model_of("g (float[n,3] x, float[256,768] w) => (float[n,3] y) <int64[1] i = {7}, int64[1] j = {0},"
                     " int64[1] k = {3}> { r = Gather (w, i) s = Slice (r, j, k, z) y = Add (x, s) }"
                     .replace("<int64[1] i", "<int64[1] z = {1}, int64[1] i"), w=WEIGHT)  # fmt: skip
    Pipeline([FoldConstants()]).run(model)
    np.testing.assert_array_equal(qgraph.ir.constant(model.graph.initializers["s"]), WEIGHT[7:8, :3])


def test_many_results_together_are_bounded():
    lines = [f"t{i} = Tile (w, r) x{i + 1} = Add (x{i}, t{i})" for i in range(40)]
    head = "g (float[64,256] x0, float[16,256] w) => (float[64,256] y) <int64[2] r = {4,1}>"
    text = f"{head} {{ {chr(32).join(lines)} y = Abs (x40) }}"
    model = model_of(text, w=WEIGHT[:16, :256].copy())
    before = qgraph.ir.weight_bytes(model)
    Pipeline([FoldConstants()]).run(model)
    assert qgraph.ir.weight_bytes(model) - before <= 16 * FoldConstants().max_bytes
