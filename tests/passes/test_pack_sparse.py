"""`pack-sparse`: the same numbers in fewer bytes, which ONNX Runtime unpacks once; the pattern can still be proven."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph.analysis.sparse_weights import ZerosStay, sparse_weights
from qgraph.models import digits_encoder
from qgraph.numerics.sparse_packing import mask_and_values, packed_bytes, with_zeros
from qgraph.numerics.sparsity import Pattern, follows
from qgraph.pipeline import Pipeline, Report

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n,8,6,6] x) => (float[n,10] y)
<float[32,8,3,3] w1 = {0}, float[32,64] w2 = {0}, float[64,10] w3 = {0}> {
    [conv] a = Conv <pads = [1,1,1,1]> (x, w1)
    b = GlobalAveragePool (a)
    c = Flatten (b)
    [product] d = MatMul (c, w2)
    y = MatMul (d, w3)
}
"""


def network(text: str = TEXT) -> ir.Model:
    model = ir.from_onnx_text(text)
    random = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        data = random.normal(size=value.shape.numpy()).astype(np.float32)
        value.const_value = ir.tensor(data, name=name)
    return model


def packed(passes: str) -> tuple[ir.Model, ir.Model, Report]:
    """Return a sparse network, the same packed, and the report."""
    model = network()
    Pipeline.parse(passes).run(model)
    copy = model.clone()
    report = Pipeline.parse("pack-sparse,remove-unused").run(copy).parts[0]
    return model, copy, report


def session(model: ir.Model, optimized: Path | None = None, *, folding: bool = True):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if folding else levels.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


@pytest.mark.parametrize("folding", [True, False])
@pytest.mark.parametrize("passes", ["sparsify", "sparsify{pattern=unstructured,ratio=0.8}", "sparsify,to-fp16"])
def test_outputs_are_the_same_and_the_file_is_smaller(passes: str, folding: bool) -> None:
    dense, copy, report = packed(passes)
    feed = {"x": np.random.default_rng(1).normal(size=(3, 8, 6, 6)).astype(np.float32)}
    before, after = (session(one, folding=folding).run(None, feed)[0] for one in (dense, copy))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert report.changed == 2
    sizes = [len(ir.to_proto(one).SerializeToString()) for one in (dense, copy)]
    assert sizes[1] < (0.5 if "0.8" in passes else 0.8) * sizes[0]
    assert report.figures["bytes_after"] == sum(
        packed_bytes(dense.graph.initializers[name].const_value.numpy()) for name in ("w1", "w2")
    )


def test_the_runtime_unpacks_when_it_loads_and_runs_the_same_operators(tmp_path: Path) -> None:
    dense, copy, _ = packed("sparsify")
    operators = []
    for model in (dense, copy):
        session(model, tmp_path / "optimized.onnx")
        operators.append([node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node])
    assert operators[0] == operators[1]


def test_the_zeros_can_still_be_proven_after_saving(tmp_path: Path) -> None:
    dense, copy, _ = packed("sparsify")
    qgraph.ir.save(copy, tmp_path / "model.onnx")
    loaded = qgraph.ir.load(tmp_path / "model.onnx")
    assert ZerosStay()(loaded) is None
    for one, other in zip(sparse_weights(dense), sparse_weights(loaded), strict=True):
        np.testing.assert_array_equal(one.matrix, other.matrix)
        assert follows(other.matrix, Pattern("neighbours"))
    again = Pipeline.parse("pack-sparse").run(loaded).parts[0]
    assert (again.changed, again.skipped) == (0, [])


def test_zeros_that_are_filled_in_are_noticed_in_a_packed_weight() -> None:
    _, copy, _ = packed("sparsify")
    mask = copy.graph.initializers["w2_mask"]
    mask.const_value = ir.tensor(np.full((256, 1), 255, np.uint8), name=mask.name)
    values = copy.graph.initializers["w2_values"]
    values.const_value = ir.tensor(np.ones(2049, np.float32), name=values.name)
    assert ZerosStay()(copy) == "the weight of 'product' was 2:4, and has lost zeros"


def test_what_gets_no_smaller_stays_and_is_told() -> None:
    dense, copy, report = packed("sparsify{pattern=7:8}")
    assert report.changed == 0
    assert dict(report.skipped)["product"].startswith("packing would not make it smaller: 12 % of its weights")
    assert list(copy.graph.initializers) == list(dense.graph.initializers)
    assert [node.op_type for node in copy.graph] == [node.op_type for node in dense.graph]


def test_quantized_weights_and_old_opsets_are_left_alone() -> None:
    model = network(TEXT.replace(": 20", ": 10"))
    report = Pipeline.parse("sparsify,pack-sparse").run(model).parts[1]
    assert {reason for _, reason in report.skipped} == {
        "unpacking needs opset 11, and the model has 10: put convert-opset before"
    }
    quantized = network()
    Pipeline.parse("sparsify,convert-opset{version=21},rtn{bits=4}").run(quantized)
    assert Pipeline.parse("pack-sparse").run(quantized).parts[0].changed <= 1, "the convolution stays in float"


def test_an_artifact_for_the_cpu_is_smaller(tmp_path: Path) -> None:
    feeds = [{"image": part} for part in np.array_split(digits_encoder.dataset().calibration["image"][:40], 5)]
    sizes = {}
    for passes in ("sparsify", "sparsify{pattern=unstructured,ratio=0.8}", ""):
        made = qgraph.compile(
            digits_encoder.build(),
            "cpu-fp32",
            output=tmp_path / str(len(sizes)),
            calibration=feeds,
            passes=passes or None,
        )
        sizes[passes] = (made.path / "model.onnx").stat().st_size
    assert sizes["sparsify"] < 0.75 * sizes[""]
    assert sizes["sparsify{pattern=unstructured,ratio=0.8}"] < 0.5 * sizes[""]


def test_masks_and_values_against_a_slow_loop() -> None:
    array = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float16)
    array[array < 0.3] = 0
    array[0, 0] = -0.0
    array[0, 1] = np.nan
    mask, values = mask_and_values(array)
    wanted = [index for index, number in enumerate(array.reshape(-1)) if number != 0]
    assert [index for index in range(24) if mask[index // 8, 0] >> (index % 8) & 1] == wanted
    np.testing.assert_array_equal(with_zeros(mask, values, (4, 6)), array)
    assert packed_bytes(array) == mask.nbytes + values.nbytes
    with pytest.raises(ValueError, match="fill no whole bytes"):
        mask_and_values(np.ones((3, 3)))
    with pytest.raises(ValueError, match="are no array of"):
        with_zeros(mask, values[:-1], (4, 6))
