"""Verification against slow loops, and every case that has no plain figure."""

import json
import math

import numpy as np
import pytest

from qgraph.errors import UserError
from qgraph.pipeline import PassError
from qgraph.runtime.figures import Verification
from qgraph.runtime.metrics import ErrorSums, round_figure
from qgraph.runtime.tolerances import parse_tolerance
from qgraph.runtime.verification import verify


class Recorded:
    """A session that gives prepared outputs, one list for each feed."""

    def __init__(self, *outputs, names=("y",)):
        self.outputs = outputs
        self.names = names

    def get_outputs(self):
        return [type("Argument", (), {"name": name}) for name in self.names]

    def run(self, output_names, feeds):
        return list(self.outputs[int(feeds["number"][0])])


class Failing:
    def run(self, output_names, feeds):
        raise RuntimeError("bad shape\nand more")


def feeds(count, batch=1):
    return [{"number": np.full(batch, i)} for i in range(count)]


def compare(source, result, *, batch=1, labels=None, names=("y",)):
    return verify(
        Recorded(*source, names=names), Recorded(*result, names=names), feeds(len(source), batch), labels=labels
    )


def pair(shape=(4, 5), samples=3, noise=0.05, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    source = [random.normal(size=shape).astype(dtype) for _ in range(samples)]
    return [[a] for a in source], [[(a + noise * random.normal(size=shape)).astype(dtype)] for a in source]


def slow_figures(source, result):
    signal = noise = power = product = largest = 0.0
    for (a,), (b,) in zip(source, result, strict=True):
        for x, y in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True):
            signal += x * x
            power += y * y
            product += x * y
            noise += (x - y) ** 2
            largest = max(largest, abs(x - y))
    return 10 * math.log10(signal / noise), product / math.sqrt(signal * power), largest


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("noise", [0.3, 0.01])
def test_figures_equal_those_of_a_slow_loop(dtype, noise):
    source, result = pair(noise=noise, dtype=dtype)
    (output,) = compare(source, result, batch=4).outputs
    sqnr, cosine, largest = slow_figures(source, result)
    assert output.sqnr_db == pytest.approx(sqnr, rel=6e-4)
    assert output.cosine == pytest.approx(cosine, abs=6e-7)
    assert output.max_abs_error == pytest.approx(largest, rel=6e-4)
    assert output.values == 60
    assert output.dtype == np.dtype(dtype).name


def test_sums_are_over_all_samples_and_pieces_do_not_matter(monkeypatch):
    source, result = pair(shape=(7, 11), samples=1)
    whole = ErrorSums()
    whole.add(source[0][0], result[0][0])
    monkeypatch.setattr("qgraph.runtime.metrics._PIECE", 10)
    pieces = ErrorSums()
    pieces.add(source[0][0], result[0][0])
    assert pieces.sqnr_db == whole.sqnr_db
    assert pieces.values == whole.values == 77


def test_equal_outputs_are_exact():
    source, _ = pair()
    (output,) = compare(source, source).outputs
    assert output.exact
    assert (output.sqnr_db, output.cosine, output.max_abs_error) == (math.inf, 1.0, 0.0)


def test_a_zero_signal_has_no_sqnr_and_meets_no_bound_on_it():
    verification = compare([[np.zeros((2, 3), np.float32)]], [[np.full((2, 3), 0.5, np.float32)]])
    (output,) = verification.outputs
    assert (output.sqnr_db, output.cosine, output.max_abs_error) == (None, None, 0.5)
    assert verification.meets({"sqnr": 1.0})
    assert verification.meets({"max_abs": 0.5}) == []


def test_values_that_become_nan_are_counted_and_fail_without_any_tolerance():
    a, b = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    b[0, 0], b[1, 1] = np.nan, np.inf
    verification = compare([[a]], [[b]])
    (output,) = verification.outputs
    assert (output.broken, output.excluded, output.exact) == (2, 2, False)
    assert output.sqnr_db == math.inf
    (failure,) = verification.meets({})
    assert "2 NaN or infinite" in failure
    assert "became NaN" in verification.summary()


def test_infinities_on_both_sides_are_left_out_and_no_fault():
    a = np.array([[1.0, -np.inf, 2.0]], np.float32)
    b = np.array([[1.0, -np.inf, 2.1]], np.float32)
    verification = compare([[a]], [[b]])
    (output,) = verification.outputs
    assert (output.broken, output.excluded) == (0, 1)
    assert output.sqnr_db == pytest.approx(10 * math.log10(5 / 0.1**2), abs=0.01)
    assert verification.meets({"sqnr": 20.0}) == []


def test_nothing_finite_gives_no_figure():
    nothing = np.full((1, 2), np.nan, np.float32)
    verification = compare([[nothing]], [[nothing]])
    assert verification.outputs[0].sqnr_db is None
    assert verification.outputs[0].max_abs_error is None
    assert verification.meets({"sqnr": 1.0}) == ["sqnr cannot be computed for any output"]
    for tolerances in ({}, {"top1": 0.5}):
        assert any("nothing was proven" in one or "cannot be computed" in one for one in verification.meets(tolerances))


def test_integers_and_booleans_are_compared_for_equality():
    a = [np.array([1, 2, 3, 4]), np.array([True, False])]
    b = [np.array([1, 2, 3, 5]), np.array([True, False])]
    numbers, flags = compare([a], [b], names=("classes", "flags")).outputs
    assert (numbers.match, numbers.sqnr_db, numbers.exact) == (0.75, None, False)
    assert (flags.match, flags.exact) == (1.0, True)


def test_text_and_sequences_are_not_compared_and_said_so():
    outputs = [np.array(["a", "b"], dtype=object), [np.ones(2)], [{1: 0.5}]]
    text, sequence, maps = compare([outputs], [outputs], names=("t", "s", "m")).outputs
    assert text.remark == "not compared: text"
    assert sequence.remark == maps.remark == "not compared: a sequence"
    assert not text.exact


def test_shapes_that_differ_are_told_and_prove_nothing():
    a, b = np.ones((3, 4), np.float32), np.ones((2, 4), np.float32)
    verification = compare([[a], [a]], [[a], [b]])
    assert "shapes differ ([3, 4] and [2, 4])" in verification.outputs[0].remark
    assert verification.meets({}) == []
    assert "proves nothing" in verification.meets({"sqnr": 1.0})[0]


def test_top1_agreement_only_for_what_looks_like_class_scores():
    a = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]], np.float32)
    b = np.array([[1.0, 3.0, 2.0], [3.0, 1.0, 2.0]], np.float32)
    scores, spatial, single, words, hidden = compare(
        [[a, a[:, :, None, None], a[:, :1], a[None], a[None]]],
        [[b, b[:, :, None, None], b[:, :1], b[None], b[None]]],
        batch=2,
        names=("scores", "map", "single", "logits", "hidden"),
    ).outputs
    assert scores.top1_agreement == spatial.top1_agreement == words.top1_agreement == 0.5
    assert single.top1_agreement is None
    assert hidden.top1_agreement is None


def scored():
    """Eight samples of three classes, in feeds of two; the source is right on 6, the result on 5."""
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    right_before, right_after = [1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 0, 1, 1, 0]

    def outputs(right):
        scores = np.zeros((8, 3), np.float32)
        for row, (label, good) in enumerate(zip(labels, right, strict=True)):
            scores[row, label if good else (label + 1) % 3] = 1
        return [[scores[i : i + 2]] for i in range(0, 8, 2)]

    return outputs(right_before), outputs(right_after), labels


def test_accuracy_before_and_after_with_labels():
    source, result, labels = scored()
    verification = compare(source, result, batch=2, labels=labels)
    assert (verification.samples, verification.labelled) == (8, 8)
    assert (verification.accuracy_before, verification.accuracy_after) == (0.75, 0.625)
    assert verification.meets({"top1": 0.125}) == []
    assert verification.meets({"top1": 0.12}) == ["top-1 accuracy loses 12.50%, more than 12.00%"]
    assert "accuracy 75.00% -> 62.50%" in verification.summary()


def test_negative_labels_are_ignored():
    source, result, labels = scored()
    labels[6:] = -1
    verification = compare(source, result, batch=2, labels=labels)
    assert (verification.labelled, verification.accuracy_before) == (6, 1.0)


def test_labels_of_positions_score_the_last_axis():
    a = np.eye(4, dtype=np.float32)[None]
    verification = compare([[a]], [[a]], labels=np.array([[0, 1, 2, 0]]), names=("output",))
    assert (verification.labelled, verification.accuracy_before) == (4, 0.75)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(7, np.int64), "7 labels for 8 samples"),
        (np.zeros(8, np.float32), "integer array, not float32"),
        (np.full(8, 3), "go up to 3"),
        (np.zeros((8, 2), np.int64), "no output holds class scores"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    source, result, _ = scored()
    with pytest.raises(UserError, match=message):
        compare(source, result, batch=2, labels=labels)


def test_agreement_loss_counts_when_there_are_no_labels():
    source, result, _ = scored()
    verification = compare(source, result, batch=2)
    assert verification.accuracy_before is None
    agreement = verification.outputs[0].top1_agreement
    assert agreement == 0.625
    assert verification.meets({"top1": 0.375}) == []
    assert "top-1 agreement loses 37.50%" in verification.meets({"top1": 0.37})[0]


def test_every_failed_bound_is_told_with_its_output():
    source, result = pair(noise=0.3)
    verification = compare(source, result, batch=4)
    output = verification.outputs[0]
    failures = verification.meets({"sqnr": 60.0, "cosine": 0.9999, "max_abs": 1e-3})
    assert len(failures) == 3
    assert all("output 'y'" in failure for failure in failures)
    assert verification.meets({"sqnr": output.sqnr_db, "cosine": output.cosine, "max_abs": output.max_abs_error}) == []


def test_the_worst_of_several_outputs_is_summed_up():
    good_source, good = pair(noise=0.001)
    bad_source, bad = pair(noise=0.5, seed=1)
    verification = compare(
        [a + b for a, b in zip(good_source, bad_source, strict=True)],
        [a + b for a, b in zip(good, bad, strict=True)],
        names=("good", "bad"),
    )
    assert verification.worst.name == "bad"
    assert "worst output: bad" in verification.summary()


def test_json_round_trip_is_strict_json_and_repeats_to_the_byte():
    source, result = pair()
    source.append([np.zeros((4, 5), np.float32)])
    result.append([np.zeros((4, 5), np.float32)])
    texts = {json.dumps(compare(source, result).to_json(), allow_nan=False) for _ in range(3)}
    assert len(texts) == 1
    exact = compare(source, source)
    for verification in (compare(source, result), exact):
        document = json.loads(json.dumps(verification.to_json(), allow_nan=False))
        assert Verification.from_json({**document, "data": "held-back samples"}) == verification
    assert exact.to_json()["outputs"][0]["exact"] is True
    broken = compare([[np.ones((1, 2), np.float32)]], [[np.array([[1, np.nan]], np.float32)]])
    assert broken.to_json()["outputs"][0]["exact"] is False
    assert Verification.from_json(broken.to_json()) == broken


def test_progress_is_told_for_every_sample():
    source, result = pair(samples=3)
    calls = []
    verify(Recorded(*source), Recorded(*result), feeds(3), progress=lambda *call: calls.append(call))
    assert calls == [("verify", 1, 3), ("verify", 2, 3), ("verify", 3, 3)]


def test_faults_are_told_apart():
    source, _ = pair(samples=1)
    with pytest.raises(UserError, match="no samples"):
        verify(Recorded(), Recorded(), [])
    with pytest.raises(UserError, match=r"cannot run sample 0: bad shape$"):
        verify(Failing(), Recorded(*source), feeds(1))
    with pytest.raises(PassError, match=r"fails on sample 0, which its source runs: bad shape$"):
        verify(Recorded(*source), Failing(), feeds(1))
    with pytest.raises(PassError, match="has 2 outputs, its source 1"):
        verify(Recorded(*source), Recorded(source[0] * 2), feeds(1))


def test_rounding_keeps_significant_digits():
    assert round_figure(31.23456789) == 31.235
    assert round_figure(0.000123456, 3) == 0.000123
    assert round_figure(math.inf) == math.inf
    assert round_figure(0.0) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sqnr=30", ("sqnr", 30.0)),
        (" SQNR = 30.5 ", ("sqnr", 30.5)),
        ("cosine=0.999", ("cosine", 0.999)),
        ("max-abs=1e-3", ("max_abs", 1e-3)),
        ("top1=0.5%", ("top1", 0.005)),
        ("top1=0.005", ("top1", 0.005)),
        ("top1=100%", ("top1", 1.0)),
        ("top1=0", ("top1", 0.0)),
    ],
)
def test_tolerances_parse(text, expected):
    metric, bound = parse_tolerance(text)
    assert (metric, bound) == (expected[0], pytest.approx(expected[1]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sqnr", "METRIC=VALUE"),
        ("snqr=30", "Did you mean 'sqnr'?"),
        ("=3", "no tolerance ''"),
        ("sqnr=loud", "'loud' is no number"),
        ("sqnr=30%", "'30%' is no number"),
        ("sqnr=nan", "no finite number"),
        ("sqnr=inf", "no finite number"),
        ("cosine=1.5", "outside -1 to 1"),
        ("max_abs=-1", "negative"),
        ("top1=-0.5%", "negative"),
        ("top1=1", "write top1=1%"),
        ("top1=2", "write top1=2%"),
        ("top1=", "is no number"),
    ],
)
def test_bad_tolerances_are_refused_with_help(text, message):
    with pytest.raises(UserError) as refused:
        parse_tolerance(text)
    assert message in str(refused.value)


def test_an_unknown_metric_is_refused_when_checking_too():
    source, result = pair()
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        compare(source, result).meets({"cosin": 0.9})


def test_padding_stays_out_of_the_figures():
    random = np.random.default_rng(2)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    source = random.normal(size=(2, 3, 4)).astype(np.float32)
    result = source + np.float32(0.01)
    spoiled = np.where(mask[..., None] == 0, np.float32(9), result)
    masked = {"number": np.zeros(2, int), "attention_mask": mask}

    found = verify(Recorded([source]), Recorded([spoiled]), [masked]).outputs[0]
    kept = verify(Recorded([source[mask != 0]]), Recorded([result[mask != 0]]), feeds(1)).outputs[0]
    assert (found.sqnr_db, found.cosine, found.max_abs_error) == (kept.sqnr_db, kept.cosine, kept.max_abs_error)
    # A mask of another shape says nothing about an output, nor does one with two masks to choose from.
    for others in ({"attention_mask": mask[:, :2]}, {"attention_mask": mask, "other_mask": mask}):
        unmasked = verify(Recorded([source]), Recorded([spoiled]), [{"number": np.zeros(2, int), **others}]).outputs[0]
        assert unmasked.max_abs_error > 5
