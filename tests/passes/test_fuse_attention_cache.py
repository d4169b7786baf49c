"""fuse-attention with a cache of keys and values, against a loop over heads and queries, and on whole decoders."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.models import decoder
from qgraph.passes.fuse_attention import FuseAttention
from qgraph.pipeline import Context, Pipeline
from qgraph.runtime.session import open_session
from qgraph.targets.base import cleaned_up

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from hugging_face import DEFAULTS, folder, random_weights

GOLDEN = Path(__file__).resolve().parent.parent / "golden/fuse-attention"
CASES = {
    name: (GOLDEN / f"{name}.onnxtxt").read_text().partition("\n---\n")[0] for name in ("cached", "cached_stacked")
}
HEADS, GROUPS, SIZE = 4, 2, 2
FEEDS = {
    "one row": (1, 1, 6, [0]),
    "several rows": (1, 3, 6, [0]),
    "an empty cache": (1, 4, 0, [0]),
    "one row and an empty cache": (1, 1, 0, [0]),
    "samples that begin later": (3, 2, 5, [0, 3, 4]),
    "rows that see nothing": (2, 3, 2, [5, 4]),
}
"""Samples, new rows, rows of the cache, and where each sample begins; what stands before is masked."""


def feeds_of(samples: int, rows: int, past: int, first: list[int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    angles = random.uniform(0, 6, (samples, rows, SIZE // 2))
    shapes = {
        "q": (samples, rows, HEADS * SIZE),
        "k": (samples, rows, GROUPS * SIZE),
        "v": (samples, rows, GROUPS * SIZE),
        "past_k": (samples, GROUPS, past, SIZE),
        "past_v": (samples, GROUPS, past, SIZE),
    }
    feeds = {name: random.normal(size=shape) for name, shape in shapes.items()} | {
        "cos": np.cos(angles),
        "sin": np.sin(angles),
    }
    return {name: array.astype(np.float32) for name, array in feeds.items()} | {"first": np.array(first)}


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn [rows, size] by the angles of each row."""
    half = x.shape[-1] // 2
    low, high = x[:, :half], x[:, half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def attention(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return result, keys and values in float64, one query of one head after the other."""
    feeds = {name: array.astype(np.float64) for name, array in feeds.items()}
    samples, rows, _ = feeds["q"].shape
    past = feeds["past_k"].shape[2]
    y = np.zeros((samples, rows, HEADS * SIZE))
    keys, values = (np.zeros((samples, GROUPS, past + rows, SIZE)) for _ in range(2))
    for sample in range(samples):
        cos, sin = feeds["cos"][sample], feeds["sin"][sample]
        for group in range(GROUPS):
            part = slice(group * SIZE, (group + 1) * SIZE)
            new = rotated(feeds["k"][sample, :, part], cos, sin)
            keys[sample, group] = np.concatenate([feeds["past_k"][sample, group], new])
            values[sample, group] = np.concatenate([feeds["past_v"][sample, group], feeds["v"][sample, :, part]])
        for head in range(HEADS):
            part, group = slice(head * SIZE, (head + 1) * SIZE), head // (HEADS // GROUPS)
            queries = rotated(feeds["q"][sample, :, part], cos, sin)
            for row in range(rows):
                seen = [at for at in range(past + rows) if feeds["first"][sample] <= at <= past + row]
                scores = np.array([0.5 * queries[row] @ keys[sample, group, at] for at in seen])
                # The lowest float in every place is a constant: such a row attends to all keys evenly.
                weights = np.exp(scores - scores.max()) if seen else np.ones(past + rows)
                among = values[sample, group, seen] if seen else values[sample, group]
                y[sample, row, part] = weights / weights.sum() @ among
    return [y, keys, values]


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return open_session(ir.to_proto(model).SerializeToString(), threads=1).run(None, feeds)


@pytest.mark.parametrize("sizes", FEEDS)
@pytest.mark.parametrize("name", CASES)
def test_it_attends_to_the_cache_as_a_loop_does(name: str, sizes: str):
    model = ir.from_onnx_text(CASES[name])
    feeds = feeds_of(*FEEDS[sizes])
    before = run(model, feeds)
    assert Pipeline([FuseAttention()]).run(model).parts[0].changed == 1
    onnx.checker.check_model(ir.to_proto(model))
    for one, plain, exact in zip(run(model, feeds), before, attention(feeds), strict=True):
        np.testing.assert_allclose(plain, exact, rtol=0, atol=2e-6)
        np.testing.assert_allclose(one, exact, rtol=0, atol=2e-6)


def test_names_types_and_shapes_of_the_outputs_stay():
    model = ir.from_onnx_text(CASES["cached"])
    before = [(value.name, value.type, value.shape) for value in model.graph.outputs]
    Pipeline([FuseAttention()]).run(model)
    assert [(value.name, value.type, value.shape) for value in model.graph.outputs] == before
    assert "Concat" not in {node.op_type for node in model.graph}


def test_keys_that_somebody_else_reads_are_still_made_for_them():
    text = CASES["cached"].replace("present_v)\n<", "present_v, int64[4] size)\n<")
    text = text.replace("ku = Unsqueeze", "size = Shape (present_k)\n ku = Unsqueeze")
    model = ir.from_onnx_text(text)
    feeds = feeds_of(2, 3, 4, [0, 1])
    before = run(model, feeds)
    assert Pipeline([FuseAttention()]).run(model).parts[0].changed == 1
    assert qgraph.ir.check(model) is None
    assert [value.name for value in model.graph.outputs] == ["y", "present_k", "present_v", "size"]
    for one, other in zip(run(model, feeds), before, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_a_cache_that_is_extended_outside_of_a_branch_stays():
    """What the branch would make of it cannot be an output of the graph around it."""
    head, body = CASES["cached"].split("    kT = Transpose")
    head = head.replace("past_v) =>", "past_v, bool yes) =>")
    inner = f"    kT = Transpose{body.strip().removesuffix('}')}".replace("y = Reshape", "y1 = Reshape")
    branch = f"then_branch = a () => (float[batch, seq, 8] y1) {{ {inner} }}"
    other = "else_branch = b () => (float[batch, seq, 8] y2) { y2 = Identity (q) }"
    model = ir.from_onnx_text(f"{head} y = If (yes) <{branch}, {other}> }}")
    report = Pipeline([FuseAttention()]).run(model).parts[0]
    assert (report.changed, [one.reason for one in report.skipped]) == (
        0,
        ["it is in a subgraph, and its cache is extended outside"],
    )


def test_a_cache_that_is_no_output_goes_with_its_concatenation():
    model = ir.from_onnx_text(CASES["cached"].replace(", float[batch, 2, total, 2] present_v)\n<", ")\n<"))
    feeds = feeds_of(2, 3, 4, [0, 1])
    before = run(model, feeds)
    assert Pipeline([FuseAttention()]).run(model).parts[0].changed == 1
    assert "Concat" not in {node.op_type for node in model.graph}
    for one, other in zip(run(model, feeds), before, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("cached", "(past_k, kr)", "(past_k, scaled_k)", "the cache of its keys is not [batch, heads, rows, size]"),
        ("cached", "(past_k, kr)", "(kr, past_k)", "its keys are not split into heads"),
        ("cached", "(present_v, two)", "(vt, two)", "only its keys, or only its values, come from a cache"),
        ("cached_stacked", "(weights, present_v)", "(weights, odd_v)", "its values are not split into heads"),
        ("cached_stacked", "below = Reshape (qr, groups)", "below = Reshape (other, groups)", "its queries are not"),
    ],
)
def test_other_caches_stay_and_say_why(name: str, old: str, new: str, reason: str):
    text = CASES[name]
    assert old in text
    before = {
        "scaled_k": "scaled_k = Mul (kr, half)",
        "(vt, two)": "",
        "odd_v": "odd_v = Neg (present_v)",
        "other": "other = Neg (qr)",
    }
    extra = next((line for word, line in before.items() if word in new), "")
    line = next(line for line in text.splitlines() if old in line)
    model = ir.from_onnx_text(text.replace(line, f"{extra}\n{line.replace(old, new)}"))
    untouched = ir.to_onnx_text(model)
    report = FuseAttention().apply(model, Context())
    assert report.changed == 0
    assert [reason in skipped.reason for skipped in report.skipped] == [True]
    assert ir.to_onnx_text(model) == untouched


def test_heads_that_lie_otherwise_for_values_stay():
    text = CASES["cached_stacked"].replace("int64[4] groups =", "int64[4] whole = {0, 1, -1, 0}, int64[4] groups =")
    model = ir.from_onnx_text(text.replace("(probabilities, groups)", "(probabilities, whole)"))
    report = FuseAttention().apply(model, Context())
    reason = "heads that share keys lie otherwise for the keys than for the values"
    assert [one.reason for one in report.skipped] == [reason]


@pytest.mark.parametrize(("most", "fused"), [(0, 1), (1, 0), (2, 1)])
def test_heads_below_one_another_may_be_faster(most: int, fused: int):
    model = ir.from_onnx_text(CASES["cached_stacked"])
    report = FuseAttention(stacked_heads=most).apply(model, Context())
    assert report.changed == fused
    assert [skipped.reason for skipped in report.skipped] == [
        "its 2 heads on one key of the cache multiply faster below one another"
    ] * (1 - fused)


@pytest.mark.parametrize("name", CASES)
def test_heads_that_share_keys_may_be_left(name: str):
    report = FuseAttention(grouped=False).apply(ir.from_onnx_text(CASES[name]), Context())
    assert [one.reason for one in report.skipped] == ["its 4 query heads share 2 of keys, which is left alone as asked"]


def exported(work: Path, **config: Any) -> Path:
    whole = {"model_type": "llama", **DEFAULTS, **config}
    decoder.export(folder(work / "checkpoint", whole, random_weights(whole)), work / "model.onnx")
    return work / "model.onnx"


@pytest.mark.parametrize("config", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}], ids=str)
def test_exported_decoders_are_fused_and_compute_the_same(tmp_path: Path, config: dict[str, Any]):
    path = exported(tmp_path, **config)
    source, model = qgraph.ir.load(path), qgraph.ir.load(path)
    (cleaned_up() + Pipeline.parse("fuse-norms,fuse-rotary,fuse-attention,remove-unused")).run(model)
    count = Counter(node.op_type for node in qgraph.ir.walk(model))
    assert (count["Attention"], count["Softmax"], count["RotaryEmbedding"]) == (2, 0, 4)
    random = np.random.default_rng(0)
    for samples, rows, past, first in FEEDS.values():
        mask = np.array([[int(at >= one) for at in range(past + rows)] for one in first])
        shape = (samples, config.get("num_key_value_heads", 2), past, 8)
        feeds = {"input_ids": random.integers(0, 64, (samples, rows)), "attention_mask": mask} | {
            value.name: random.normal(size=shape).astype(np.float32)
            for value in source.graph.inputs
            if value.name.startswith("past_key_values")
        }
        for one, other in zip(run(model, feeds), run(source, feeds), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
