"""Errors layer by layer: matched by name and by metadata, in slices, against direct runs."""

import json
import re

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph.cli_pages import difference_tables
from qgraph.errors import UserError
from qgraph.float_form import float_form
from qgraph.pipeline import Context, Pipeline
from qgraph.runtime import difference as module
from qgraph.runtime import watched_source
from qgraph.runtime.difference import Difference, TensorError, Unmatched, difference
from qgraph.runtime.session import open_session
from qgraph.verbs import diff

SOURCE = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 4] x) => (float[n, 4] y)
<float[1] half = {0.5}> {
    a = Mul(x, half)
    b = Tanh(a)
    c = Shape(b)
    d = Sub(b, half)
    y = Add(d, a)
}"""


def write(tmp_path, name, text):
    path = tmp_path / f"{name}.onnx"
    qgraph.ir.save(ir.from_onnx_text(text), path)
    return path


def rename(old, new, text):
    return re.sub(rf"\b{old}\b", new, text)


def samples(count=3, rows=5):
    random = np.random.default_rng(0)
    return [{"x": random.normal(size=(rows, 4)).astype(np.float32)} for _ in range(count)]


def run_all(path, names, feed):
    """Run a model with inner tensors as outputs, by another road than the code under test."""
    import onnx

    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return open_session(model.SerializeToString(), threads=1).run(None, feed)


def expected_sqnr(source, result, pairs, feeds):
    signal = dict.fromkeys(pairs, 0.0)
    noise = dict.fromkeys(pairs, 0.0)
    for feed in feeds:
        before, after = run_all(source, list(pairs), feed), run_all(result, list(pairs.values()), feed)
        for name, one, two in zip(pairs, before, after, strict=True):
            signal[name] += float(np.sum(one.astype(np.float64) ** 2))
            noise[name] += float(np.sum((one.astype(np.float64) - two) ** 2))
    return {name: 10 * np.log10(signal[name] / noise[name]) for name in pairs if noise[name]}


def test_a_model_beside_itself_is_exact_everywhere(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    found = difference(path, path, samples(), threads=1)
    assert [one.name for one in found.tensors] == ["a", "b", "d", "y"]
    assert all(one.exact and one.sqnr_db is None and one.max_abs_error == 0 for one in found.tensors)
    assert found.unmatched == ()
    assert found.samples == 3


def test_errors_equal_those_of_direct_runs_and_losses_follow_the_graph(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    changed = write(tmp_path, "c", SOURCE.replace("b = Tanh(a)", "s = Softsign(a) b = Tanh(s)"))
    found = difference(path, changed, samples(), threads=1)
    by_name = {one.name: one for one in found.tensors}
    for name, sqnr in expected_sqnr(path, changed, {n: n for n in ("b", "d", "y")}, samples()).items():
        assert by_name[name].sqnr_db == pytest.approx(sqnr, rel=6e-4)
    assert by_name["a"].exact
    assert by_name["b"].loss_db is None  # what it reads is exact
    assert by_name["d"].loss_db == pytest.approx(by_name["b"].sqnr_db - by_name["d"].sqnr_db, abs=0.01)
    assert by_name["y"].loss_db == pytest.approx(by_name["d"].sqnr_db - by_name["y"].sqnr_db, abs=0.01)
    assert by_name["b"].op_type == "Tanh"


def test_a_loss_is_seen_through_tensors_that_the_result_does_not_have(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    changed = write(tmp_path, "c", rename("d", "e", SOURCE.replace("b = Tanh(a)", "b = Softsign(a)")))
    found = difference(path, changed, samples(), threads=1)
    by_name = {one.name: one for one in found.tensors}
    assert [one.name for one in found.unmatched] == ["d"]
    assert by_name["y"].loss_db == pytest.approx(by_name["b"].sqnr_db - by_name["y"].sqnr_db, abs=0.01)


QUANTIZED = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 4] x) => (float[n, 4] y)
<float[1] half = {0.5}, float scale = {0.05}, int8 zero = {0}> {
    a = Mul(x, half)
    b = Tanh(a)
    q = QuantizeLinear(b, scale, zero)
    other = DequantizeLinear(q, scale, zero)
    d = Sub(other, half)
    y = Add(d, a)
}"""


def test_a_quantized_tensor_is_compared_after_dequantization(tmp_path):
    path, quantized = write(tmp_path, "m", SOURCE), write(tmp_path, "q", QUANTIZED)
    found = difference(path, quantized, samples(), threads=1)
    by_name = {one.name: one for one in found.tensors}
    expected = expected_sqnr(path, quantized, {"b": "other"}, samples())
    assert by_name["b"].sqnr_db == pytest.approx(expected["b"], rel=6e-4)
    assert not by_name["b"].exact


def test_metadata_name_the_tensor_that_stands_for_one_of_the_source(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    model = ir.from_onnx_text(rename("b", "renamed", SOURCE))
    next(value for node in model.graph for value in node.outputs if value.name == "renamed").metadata_props[
        "qgraph.source"
    ] = "b"
    qgraph.ir.save(model, tmp_path / "r.onnx")
    found = difference(path, tmp_path / "r.onnx", samples(), threads=1)
    assert [one.name for one in found.tensors] == ["a", "b", "d", "y"]
    assert found.unmatched == ()


def test_one_tensor_of_the_result_may_stand_for_two_of_the_source(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    text = (
        rename("other", "d", QUANTIZED)
        .replace("d = Sub(d, half)", "e = Sub(d, half)")
        .replace("Add(d, a)", "Add(e, a)")
    )
    quantized = write(tmp_path, "q", text)
    found = difference(path, quantized, samples(), threads=1)
    assert [one.name for one in found.tensors] == ["a", "b", "d", "y"]


def test_tensors_without_counterpart_or_of_another_shape_are_listed(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    changed = write(
        tmp_path,
        "c",
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x) => (float[n, 4] y)
        <float[1] half = {0.5}> {
            b = Transpose <perm = [1, 0]> (x)
            y = Mul(x, half)
        }""",
    )
    found = difference(path, changed, samples(), threads=1)
    assert [one.name for one in found.tensors] == ["y"]
    assert found.unmatched == (
        Unmatched("a", "Mul", "the result has no such tensor: fused or removed"),
        Unmatched("d", "Sub", "the result has no such tensor: fused or removed"),
        Unmatched("b", "Tanh", "the result's tensor has another shape or type"),
    )


@pytest.mark.parametrize("memory", [1, 500, 1 << 30])
def test_slices_do_not_change_the_figures(tmp_path, memory):
    path, quantized = write(tmp_path, "m", SOURCE), write(tmp_path, "q", QUANTIZED)
    whole = difference(path, quantized, samples(), threads=1)
    assert difference(path, quantized, samples(), memory=memory, threads=1) == whole


def test_slices_fit_the_bound_for_the_largest_feed(tmp_path, monkeypatch):
    path = write(tmp_path, "m", SOURCE)
    feeds = [*samples(1, rows=2), *samples(1, rows=50), *samples(1, rows=3)]
    held = []
    compare = module._compare

    def watched(pairs, *rest):
        held.append(len(pairs))
        return compare(pairs, *rest)

    monkeypatch.setattr(module, "_compare", watched)
    one_tensor = 2 * 50 * 4 * 4  # both sides, rows, columns, bytes
    difference(path, path, feeds, memory=2 * one_tensor, threads=1)
    assert held == [2, 2]


def test_progress_counts_slices_times_samples(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    calls = []
    difference(path, path, samples(2), memory=1, threads=1, progress=lambda *call: calls.append(call))
    assert calls == [("diff", done, 8) for done in range(1, 9)]


def test_training_dropout_does_not_make_noise(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[n, 4] x) => (float[n, 4] y)
    <float ratio = {0.5}, bool training = {1}> {
        a = Tanh(x)
        b = Dropout(a, ratio, training)
        y = Neg(b)
    }"""
    path = write(tmp_path, "m", text)
    found = difference(path, path, samples(), threads=1)
    assert [one.name for one in found.tensors] == ["a", "b", "y"]
    assert all(one.exact for one in found.tensors)


def test_values_that_become_nan_come_first(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    broken = write(tmp_path, "c", SOURCE.replace("d = Sub(b, half)", "l = Log(b) d = Sub(l, half)"))
    found = difference(path, broken, samples(), threads=1)
    worst = found.worst_first()
    assert {one.name for one in worst[:2]} == {"d", "y"}
    assert all(one.broken for one in worst[:2])
    assert worst[-1].exact


def test_worst_first_orders_by_sqnr_with_exact_ones_last():
    def tensor(name, sqnr=None, **more):
        return TensorError(name, name, "Op", sqnr, **more)

    tensors = (tensor("fine", 40.0), tensor("exact", exact=True), tensor("bad", 3.0), tensor("undefined"))
    assert [one.name for one in Difference(1, tensors).worst_first()] == ["undefined", "bad", "fine", "exact"]


def test_json_round_trip(tmp_path):
    path, quantized = write(tmp_path, "m", SOURCE), write(tmp_path, "q", QUANTIZED)
    found = difference(path, quantized, samples(), threads=1)
    assert Difference.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_the_folder_of_an_artifact_stands_for_its_model(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    folder = tmp_path / "artifact"
    folder.mkdir()
    with pytest.raises(UserError, match=r"holds no model\.onnx"):
        difference(path, folder, samples())
    path.rename(folder / "model.onnx")
    assert difference(folder, folder, samples(), threads=1).tensors


def test_samples_that_do_not_fit_are_the_users_fault(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    with pytest.raises(UserError, match="no samples"):
        difference(path, path, [])
    with pytest.raises(UserError, match="the source cannot run the samples"):
        difference(path, path, [{"z": np.zeros(3, np.float32)}])


def test_a_folded_batch_normalization_is_compared_with_what_it_gave_not_with_what_it_read(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2, 1, 1] x) => (float[n, 2, 1, 1] y)
<float[2, 2, 1, 1] w = {1.0, 2.0, 3.0, 4.0}, float[2] s = {3.0, 2.0}, float[2] b = {5.0, 1.0},
 float[2] m = {0.5, -0.5}, float[2] v = {4.0, 1.0}> {
    c = Conv(x, w)
    normalized = BatchNormalization(c, s, b, m, v)
    y = Relu(normalized)
}"""
    path = write(tmp_path, "m", text)
    model = qgraph.ir.load(path)
    Pipeline.parse("fold-batch-norm").run(model)
    qgraph.ir.save(model, tmp_path / "folded.onnx")
    feeds = [{"x": feed["x"].reshape(-1, 2, 1, 1)} for feed in samples()]
    found = difference(path, tmp_path / "folded.onnx", feeds, threads=1)
    assert [one.name for one in found.tensors] == ["normalized", "y"]
    assert [one.name for one in found.unmatched] == ["c"]
    assert all(one.cosine > 0.999999 for one in found.tensors)


def test_models_with_nothing_in_common_are_told(tmp_path):
    path = write(tmp_path, "m", SOURCE)
    other = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] unrelated) { unrelated = Abs(x) }"""
    with pytest.raises(UserError, match=r"no tensor of .* has its counterpart"):
        difference(path, write(tmp_path, "other", other), samples(), threads=1)


def test_models_in_memory_and_a_look_at_every_tensor(tmp_path):
    path, quantized = write(tmp_path, "m", SOURCE), write(tmp_path, "q", QUANTIZED)
    seen = {}
    models = qgraph.ir.load(path), qgraph.ir.load(quantized)
    texts = [str(model) for model in models]
    found = difference(*models, samples(2), observe=lambda *one: seen.setdefault(one[0], []).append(one[1:]))
    assert found == difference(path, quantized, samples(2))
    assert [str(model) for model in models] == texts
    assert list(seen) == [one.name for one in found.tensors]
    for (before, after), feed in zip(seen["b"], samples(2), strict=True):
        np.testing.assert_allclose(before, np.tanh(feed["x"] * 0.5), rtol=1e-5)
        assert 0 < np.abs(after - before).max() <= 0.0251


@pytest.mark.parametrize(("shape", "stated"), [(["n", 4], True), (["m", 4], False), ([5, 4], True), (None, False)])
def test_sizes_are_read_off_the_shapes_where_they_are_stated(tmp_path, shape, stated):
    model = qgraph.ir.load(write(tmp_path, "m", SOURCE))
    (value,) = (node.outputs[0] for node in model.graph if node.outputs[0].name == "a")
    value.shape = None if shape is None else ir.Shape(shape)
    assert watched_source.stated_size(value, {"n": 5}) == (20 if stated else None)
    assert watched_source.sizes(model, [value], samples(1)[0], 1) == [20]


NETWORK = """<ir_version: 10, opset_import: ["" : 13]>
g (float[n, 4, 6, 6] x, float[4, 4, 3, 3] a, float[4, 4, 3, 3] b) => (float[n, 4, 6, 6] y) {
    [first] h = Conv <pads = [1, 1, 1, 1]> (x, a)
    [relu] r = Relu (h)
    [second] y = Conv <pads = [1, 1, 1, 1]> (r, b)
}"""


def network(path):
    model = ir.from_onnx_text(NETWORK)
    random = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.tensor(random.normal(size=(4, 4, 3, 3)).astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    qgraph.ir.save(model, path)
    return [{"x": random.normal(size=(2, 4, 6, 6)).astype(np.float32)} for _ in range(20)]


def test_diff_tells_what_rounding_does_to_the_outputs(tmp_path):
    feeds = network(tmp_path / "model.onnx")
    made = qgraph.compile(
        tmp_path / "model.onnx", target="cpu-int8", passes="qdq", calibration=feeds, output=tmp_path / "out"
    )
    found = diff(tmp_path / "model.onnx", made.path, feeds, context=Context(threads=1))
    assert not found.no_sensitivities
    rows = {one.tensor: one for one in found.sensitivities.tensors}
    assert {"x", "r", "a", "b"} <= set(rows)
    assert rows["a"].readers == ("first",)
    assert rows["r"].kind == "activation"
    assert all(30 < rows[name].output_sqnr_db < 70 for name in ("x", "r", "a", "b"))
    actual = next(one.sqnr_db for one in found.tensors if one.name == "y")
    assert found.sensitivities.output_sqnr_db == pytest.approx(actual, abs=2)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert Difference.from_json(document) == found
    assert "at the outputs" in str(difference_tables(found)[1])


def test_diff_of_models_from_elsewhere(tmp_path):
    """Without a manifest, the source is the float form, brought to a newer opset."""
    feeds = network(tmp_path / "model.onnx")
    model = qgraph.ir.load(tmp_path / "model.onnx")
    Pipeline.parse("qdq").run(model, calibration=feeds)
    qgraph.ir.save(model, tmp_path / "quantized.onnx")
    found = diff(tmp_path / "model.onnx", tmp_path / "quantized.onnx", feeds)
    assert {one.tensor for one in found.sensitivities.tensors} >= {"x", "r", "a", "b"}


def test_diff_says_why_there_are_no_sensitivities(tmp_path):
    feeds = network(tmp_path / "model.onnx")
    found = diff(tmp_path / "model.onnx", tmp_path / "model.onnx", feeds)
    assert found.sensitivities is None
    assert found.no_sensitivities == "no tensor is quantized by QuantizeLinear or DequantizeLinear"
    assert "no sensitivities: no tensor is quantized" in difference_tables(found)[1].note


def test_the_float_form_is_what_the_passes_had_before_the_first_loss(tmp_path):
    feeds = network(tmp_path / "model.onnx")
    made = qgraph.compile(
        tmp_path / "model.onnx",
        target="cpu-int8",
        passes="mixed-precision{nodes=[second]},qdq",
        calibration=feeds,
        output=tmp_path / "out",
    )
    model, notes = float_form(tmp_path / "model.onnx", made, Context(threads=1, calibration=feeds))
    assert not notes
    assert model.graph.opset_imports[""] == 21
    assert [node.op_type for node in model.graph] == ["Conv", "Relu", "Conv"]
    assert not any(node.metadata_props for node in model.graph)


def test_what_is_moved_as_integers_is_compared_as_what_they_stand_for(tmp_path):
    path = write(
        tmp_path,
        "m",
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x) => (float[n, 4] y) { a = Tanh(x) b = Relu(a) c = Transpose <perm = [1, 0]> (b)
            y = Transpose <perm = [1, 0]> (c) }""",
    )
    # The saturation of uint8 does what Relu did; b is a's name now, and integers are transposed.
    quantized = write(
        tmp_path,
        "q",
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x) => (float[n, 4] y) <float scale = {0.005}, uint8 zero = {0}> {
            b = Tanh(x) q = QuantizeLinear(b, scale, zero) t = Transpose <perm = [1, 0]> (q)
            c = DequantizeLinear(t, scale, zero) y = Transpose <perm = [1, 0]> (c) }""",
    )
    found = difference(path, quantized, samples(), threads=1)
    by_name = {one.name: one for one in found.tensors}
    assert by_name["b"].max_abs_error <= 0.00251
    assert by_name["b"].sqnr_db == by_name["c"].sqnr_db == by_name["y"].sqnr_db
