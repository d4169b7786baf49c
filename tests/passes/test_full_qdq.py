"""`full-qdq`: golden graphs, what the numbers lose, widths, masks, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.errors import UserError
from qgraph.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parent.parent))
from integer_compilation import check_golden, compiled, feeds, graph, in_onnxruntime

GOLDEN = Path(__file__).parent.parent / "golden" / "full-qdq"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.onnxtxt")), ids=lambda path: path.stem)
def test_golden(path: Path):
    _, report = check_golden(path, "full-qdq")
    (part,) = report.parts
    assert (part.changed > 0) == (not path.stem.startswith("not-")), "cases that stay are called not-..."


def test_scores_keep_their_range_beside_a_mask():
    """What a Where puts in the place of scores must not widen the scale that they share with its result."""
    model = graph(
        "(float[2,4,8] x, bool[2,1,4] c, float[8,8] w) => (float[] y) { q = MatMul(x, w) t = Transpose<perm=[0,2,1]>(q)"
        " s = MatMul(q, t) l = Constant<value_float=-3.4e38>() a = Where(c, s, l) p = Softmax(a) y = MatMul(p, q) }"
    )
    one = compiled(model)
    (scores,) = [node for node in one.quantized.graph if node.op_type == "QuantizeLinear" and node.name == "s_q"]
    assert float(scores.inputs[1].const_value.numpy().item()) < 0.01
    inputs = feeds(model, 3)
    (exact,), (found,) = in_onnxruntime(model, inputs), in_onnxruntime(one.integer, inputs)
    assert np.sqrt(np.mean((exact - found) ** 2)) < 0.05 * np.sqrt(np.mean(exact**2))


def test_a_function_does_not_pass_through_what_is_quantized():
    """A choice between x and a function of it is no function of x alone once the one in between is rounded."""
    model = graph(
        "(float[3,8] x, float[8,4] w) => (float[] y, float[] z) { s = Softplus(x) d = Div(x, s) z = MatMul(d, w)"
        " r = Relu(d) k = Constant<value_float=0.1>() g = Greater(r, k) y = Where(g, r, x) }"
    )
    one = compiled(model)
    assert not any(part.skipped for report in one.reports for part in report.parts)
    again = one.quantized.clone()
    samples = [feeds(model, seed) for seed in range(4)]
    assert Pipeline.parse("full-qdq").run(again, calibration=samples).parts[0].changed == 0


def test_old_opsets_are_refused():
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]>\ng (float[2,4] x) => (float[2,4] y) { y = Relu(x) }'
    )
    with pytest.raises(UserError, match="full-qdq needs opset 21, and the model has 17: put convert-opset before it"):
        Pipeline.parse("full-qdq").run(model, calibration=[{"x": np.zeros((2, 4), np.float32)}])
    with pytest.raises(UserError, match="integer-requantize needs opset 21, and the model has 17"):
        Pipeline.parse("integer-requantize").run(model)
