"""The passes that give operators another form for the integers to come: golden graphs, and values kept.

A golden file holds a model's text, `---`, and its text after the pass, without the values of constants. Inputs other
than `x` are constants. A first line `# ...` gives the pipeline. QGRAPH_UPDATE_GOLDEN=1 writes the second part anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden_rewrites import is_after, what_to_do, without_values

from qgraph.pipeline import Pipeline

GOLDEN = Path(__file__).parent.parent / "golden"
PASSES = (
    "align-channels",
    "average-pool-to-conv",
    "conv-transpose-to-conv",
    "decompose-norms",
    "decompose-operators",
    "einsum-to-matmul",
    "grid-sample-to-gather",
    "resize-to-matmul",
    "root-magnitudes",
    "unroll-recurrent",
)
FILES = [path for name in PASSES for path in sorted((GOLDEN / name).glob("*"))]


def filled(text: str) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    for value in list(proto.graph.input):
        if value.name != "x":
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            array = generator.normal(size=shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
            proto.graph.input.remove(value)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True))


def run(model: ir.Model) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    shape = [dim if isinstance(dim, int) else 2 for dim in session.get_inputs()[0].shape]
    return session.run(None, {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path: Path) -> None:
    pipeline, text = what_to_do(path, path.parent.name)
    model = filled(text)
    exact = run(model)

    report = Pipeline.parse(pipeline).run(model)

    is_after(path, without_values(model))
    assert (report.changed > 0) == (not path.stem.startswith("not-"))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for one, other in zip(exact, run(model), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())
    assert Pipeline.parse(pipeline).run(model).changed == 0


def test_odd_multiple_is_refused() -> None:
    with pytest.raises(Exception, match="must be a positive multiple of 4"):
        Pipeline.parse("align-channels{depthwise=6}")
