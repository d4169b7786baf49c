"""A graph is cut into its repeated blocks, and calibration block by block sees what the whole model would."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qgraph.analysis import probes
from qgraph.analysis.block_stream import BlockStream
from qgraph.analysis.blocks import segments
from qgraph.analysis.linear_layers import LinearLayer, linear_layers
from qgraph.analysis.segment_runs import CarriedValues
from qgraph.errors import UserError
from qgraph.models import pydoc_decoder
from qgraph.pipeline import Context

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
CHAIN = """g (float[n, 8] x, float[8, 8] a, float[8, 12] b, float[12, 8] c, float[8, 4] d) => (float[n, 4] y)
{
    one = MatMul (x, a)
    two = Relu (one)
    wide = MatMul (two, b)
    back = MatMul (wide, c)
    sum = Add (back, two)
    y = MatMul (sum, d)
}"""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def chain() -> ir.Model:
    model = ir.from_onnx_text(f"{HEAD}\n{CHAIN}")
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.tensor(normal(*value.shape.numpy()), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


@pytest.fixture(scope="module")
def decoder() -> ir.Model:
    return pydoc_decoder.build()


@pytest.fixture(scope="module")
def context() -> Context:
    ids = np.random.default_rng(0).integers(0, 256, (3, 24))
    return Context(calibration=[{"input_ids": row[None]} for row in ids], threads=1)


def inputs_of(
    model: ir.Model, context: Context, layers: list[LinearLayer], **weights: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """Run the whole model, with other weights, and return what goes into the layers."""
    copy = model.clone()
    for name, array in weights.items():
        copy.graph.initializers[name].const_value = ir.tensor(array, name=name)
    names = sorted({str(layer.x.name) for layer in layers})
    probe = probes.Probe(copy, probes.raw_outputs(names), frozenset(next(iter(context.samples("test")))), threads=1)
    return [dict(zip(names, probe.run(feed), strict=True)) for feed in context.samples("test")]


def test_a_decoder_is_cut_into_its_layers(decoder: ir.Model) -> None:
    found = segments(decoder)
    assert found.repeats == 4
    assert [one.repeat for one in found.chain] == [None, 0, 1, 2, 3, None]
    blocks = found.chain[1:5]
    assert all(len(one.gives) == 1 for one in blocks)
    assert all(len(one.reads) == 4 for one in blocks)  # the residual stream, the mask, cosines and sines
    assert blocks[1].reads[0] is blocks[0].gives[0]
    assert sum(len(one.nodes) for one in found.chain) <= len(decoder.graph)


def test_without_a_repetition_the_weights_of_a_slice_are_bounded() -> None:
    model = chain()
    assert segments(model).repeats == 0
    assert len(segments(model).chain) == 1
    pieces = segments(model, Context(calibration_memory=8 * 16 * 4 + 1)).chain
    assert [one.nodes[0].outputs[0].name for one in pieces] == ["one", "wide", "back"]
    assert [value.name for value in pieces[1].reads] == ["two"]
    assert [[value.name for value in one.gives] for one in pieces] == [["two"], ["wide"], []]


@pytest.mark.parametrize("sequential", ["layer", "block"])
def test_unchanged_layers_see_what_they_see_in_the_whole_model(
    decoder: ir.Model, context: Context, sequential: str
) -> None:
    layers = [one for one in linear_layers(decoder).layers if one.kind == "linear"]
    expected = inputs_of(decoder, context, layers)
    stream = BlockStream(decoder, context, layers, who="test", sequential=sequential, originals=True)
    seen = set()
    for stage in stream.stages():
        for number, rows in enumerate(stage.rows()):
            for x, one in rows.items():
                seen.add(x.name)
                whole = expected[number][str(x.name)]
                np.testing.assert_allclose(one.changed, whole.reshape(one.changed.shape), atol=1e-4)
                np.testing.assert_array_equal(one.changed, one.original)
    assert seen == set(expected[0])
    assert stream.count == (17 if sequential == "layer" else 5)


def test_a_change_is_seen_by_all_that_follow_and_by_nothing_before(decoder: ir.Model, context: Context) -> None:
    layers = [one for one in linear_layers(decoder).layers if one.kind == "linear"]
    target = next(one for one in layers if "layers.1" in one.name and "down" in one.name)
    after = layers[layers.index(target) + 1 :]
    matrix = target.matrix() * 0.5
    changed = inputs_of(decoder, context, layers, **{str(target.weight.name): matrix.T})
    plain = inputs_of(decoder, context, layers)
    following = {one.x.name for one in after}
    for stage in BlockStream(decoder, context, layers, who="test", originals=True).stages():
        for number, rows in enumerate(stage.rows()):
            for x, one in rows.items():
                want = (changed if x.name in following else plain)[number][str(x.name)]
                np.testing.assert_allclose(one.changed, want.reshape(one.changed.shape), atol=2e-3)
                want = plain[number][str(x.name)]
                np.testing.assert_allclose(one.original, want.reshape(one.changed.shape), atol=1e-4)
        if any(target in group for group in stage.layers.values()):
            stage.change(target.weight, matrix)
    np.testing.assert_array_equal(target.matrix() * 0.5, matrix)


def test_activations_that_do_not_fit_are_spilled_and_removed(
    decoder: ir.Model, context: Context, tmp_path: Path
) -> None:
    layers = linear_layers(decoder).layers
    small = dataclasses.replace(context, calibration_memory=1 << 16, work_folder=tmp_path, _analyses={})
    spilled = 0
    for one, other in zip(
        BlockStream(decoder, small, layers, who="test").stages(),
        BlockStream(decoder, context, layers, who="test").stages(),
        strict=False,
    ):
        spilled = max(spilled, len(list(tmp_path.rglob("*.npy"))))
        for rows, expected in zip(one.rows(), other.rows(), strict=True):
            for mine, theirs in zip(rows.values(), expected.values(), strict=True):
                np.testing.assert_allclose(mine.changed, theirs.changed, atol=1e-4)
    assert spilled > 0
    assert not list(tmp_path.rglob("*.npy"))


def test_progress_ends_at_its_total(context: Context, decoder: ir.Model) -> None:
    told: list[tuple[int, int]] = []
    watched = dataclasses.replace(context, progress=lambda step, done, total: told.append((done, total)), _analyses={})
    for stage in BlockStream(decoder, watched, linear_layers(decoder).layers, who="test").stages():
        for _ in stage.rows():
            pass
    assert told[-1][0] == told[-1][1] == len(told) - 1


def test_what_is_not_finite_is_told_with_the_sample_and_the_layer() -> None:
    model = chain()
    feeds = [{"x": normal(2, 8)}, {"x": np.full((2, 8), np.nan, np.float32)}]
    stream = BlockStream(model, Context(calibration=feeds), linear_layers(model).layers, who="test")
    with pytest.raises(UserError, match="sample 1: what goes into 'MatMul->one' holds NaN"):
        list(next(iter(stream.stages())).rows())


def test_what_is_too_large_to_be_squared_is_told_with_the_sample_and_the_layer() -> None:
    model = chain()
    feeds = [{"x": normal(2, 8)}, {"x": np.full((2, 8), -1e25, np.float32)}]
    stream = BlockStream(model, Context(calibration=feeds), linear_layers(model).layers, who="test")
    with pytest.raises(UserError, match=r"sample 1: what goes into 'MatMul->one' reaches 1e\+25"):
        list(next(iter(stream.stages())).rows())


@pytest.mark.parametrize("array", [normal(2, 8).astype(ml_dtypes.bfloat16), np.zeros((0, 3), np.float32)])
def test_values_of_any_type_and_size_are_carried(tmp_path: Path, array: np.ndarray) -> None:
    value = ir.Value(name="x")
    store = CarriedValues(tmp_path, 1 << 10)
    store.put(value, 0, array)
    store.put(value, 1, array.copy())
    assert store.get(value, 1) is array  # the same on both samples


def test_no_samples_are_an_error_of_the_user() -> None:
    model = chain()
    for feeds in (None, []):
        with pytest.raises(UserError, match="calibration"):
            next(iter(BlockStream(model, Context(calibration=feeds), linear_layers(model).layers, who="x").stages()))
