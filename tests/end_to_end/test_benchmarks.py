"""The benchmark's own measuring: wrong scales or a wrong verdict there would make every figure worthless."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import accuracy
import accuracy_peers
import data
import decode
import integer
import integer_accuracy
import integer_bits
import integer_operators
import integer_subjects
import layout
import lesser_processor
import metrics
import placement
import report
import report_accuracy
import sparsity
import target_table
import timing

from qgraph import capabilities
from qgraph.models import decoder


def test_sqnr_is_twenty_decibels_for_a_tenth_of_noise() -> None:
    signal = np.array([[3.0, -4.0]])
    assert metrics.sqnr_db(signal, signal * 1.1) == pytest.approx(20)
    assert metrics.sqnr_db(signal, signal) == 200
    assert metrics.sqnr_db(signal, signal * np.nan) == float("-inf")


def test_spearman_pairs_first_and_second_sentences() -> None:
    angles = np.array([0.0, 0.0, 0.0, 0.1, 0.5, 1.0])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert metrics.spearman_x100(embeddings, np.array([5, 3, 1])) == pytest.approx(100)
    assert metrics.spearman_x100(embeddings, np.array([1, 3, 5])) == pytest.approx(-100)


def test_mean_pool_leaves_padding_out() -> None:
    hidden = np.array([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    np.testing.assert_allclose(metrics.mean_pool(hidden, np.array([[1, 1, 0]])), [[0.6, 0.8]])


def _box(kind: int, score: float, x: float, size: float = 0.2) -> list[float]:
    return [kind, score, x, 0.1, x + size, 0.1 + size]


def test_average_precision_of_a_perfect_a_missed_and_a_doubled_detection() -> None:
    truth = [np.array([[7, 0.1, 0.1, 0.3, 0.3]]), np.array([[7, 0.5, 0.1, 0.7, 0.3]])]
    perfect = [np.array([_box(7, 0.9, 0.1)]), np.array([_box(7, 0.8, 0.5)])]
    assert metrics.average_precision_50(perfect, truth) == pytest.approx(100)
    missed = [perfect[0], np.zeros((0, 6))]
    assert metrics.average_precision_50(missed, truth) == pytest.approx(100 * 51 / 101)
    doubled = [np.array([_box(7, 0.9, 0.1), _box(7, 0.85, 0.11)]), perfect[1]]
    assert metrics.average_precision_50(doubled, truth) == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    wrong_class = [np.array([_box(8, 0.9, 0.1)]), np.array([_box(8, 0.8, 0.5)])]
    assert metrics.average_precision_50(wrong_class, truth) == 0


def test_detections_are_decoded_and_thinned_out() -> None:
    maps = np.zeros((85, 22, 22), np.float32)
    maps[3:5] = -20
    for column in (3, 4):
        maps[0, 5, column] = 1
        maps[5 + 9, 5, column] = 1 if column == 3 else 0.9
        maps[3:5, 5, column] = 0
    (best,) = metrics.decode_fastestdet(maps)
    np.testing.assert_allclose(best, [9, 1, 3 / 22 - 0.25, 5 / 22 - 0.25, 3 / 22 + 0.25, 5 / 22 + 0.25], atol=1e-6)


class _Sleeper:
    """Takes a given time per run, except that every third run is disturbed."""

    def __init__(self, seconds: float, clock: list[float]) -> None:
        self.seconds, self.clock, self.runs = seconds, clock, 0

    def run(self, names: None, feed: dict) -> None:
        self.runs += 1
        self.clock[0] += self.seconds * (5 if self.runs % 3 == 0 else 1)


def test_the_least_of_the_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    seconds = timing.in_turn({"slow": _Sleeper(0.02, clock), "fast": _Sleeper(0.01, clock)}, [{}, {}])
    assert seconds["slow"] == pytest.approx([0.02, 0.02])
    assert seconds["fast"] == pytest.approx([0.01, 0.01])


def test_a_process_is_measured_without_the_memory_of_its_parent(tmp_path: Path) -> None:
    held = np.ones(40_000_000)
    small = timing.run_process([sys.executable, "-S", "-c", "pass"], tmp_path / "log")
    large = timing.run_process([sys.executable, "-S", "-c", "bytearray(200_000_000)"], tmp_path / "log")
    failing = timing.run_process([sys.executable, "-S", "-c", "raise SystemExit('why')"], tmp_path / "log")
    endless = timing.run_process([sys.executable, "-S", "-c", "while True: pass"], tmp_path / "log", limit=0.5)
    assert small.status == 0
    assert small.peak_mib < held.nbytes / 2**20 / 4
    assert 190 < large.peak_mib < 260
    assert (failing.status, failing.errors) == (1, "why")
    assert endless.status == -9
    assert 0.5 <= endless.seconds < 10


def _results(kind: str, ours: dict, **peers: dict) -> dict:
    base = {"failure": None, "remarks": [], "size_mb": 23.0, "seconds": 10.0, "peak_mib": 400.0}
    tools = {"fp32": {"failure": None, "score": 80.0, "size_mb": 90.0, "speedup": 1.0}}
    tools |= {name.replace("_", "-"): base | one for name, one in peers.items()} | {"qgraph": base | ours}
    return {"models": {"m": {"kind": kind, "metric": "", "tools": tools}}}


def _verdicts(results: dict) -> dict[str, bool]:
    return {row.measure.partition(" (")[0]: row.reached for row in report.rows(results)}


def test_verdicts_on_a_sentence_encoder() -> None:
    peers = {
        "ort_static_minmax": {"score": 40.0, "speedup": 0.5, "seconds": 20.0, "peak_mib": 900.0},
        "ort_dynamic": {"score": 79.8, "speedup": 2.0},
    }
    good = {"score": 79.9, "speedup": 2.4, "size_mb": 23.9}
    assert all(_verdicts(_results("Sentences", good, **peers)).values())
    bad = {"score": 79.8, "speedup": 2.3, "size_mb": 24.1, "seconds": 21.0, "peak_mib": 500.0}
    assert not any(_verdicts(_results("Sentences", bad, **peers)).values())


def test_verdicts_on_a_classifier() -> None:
    peers = {
        "ort_static_minmax": {"score": 79.0, "speedup": 2.0, "peak_mib": 900.0},
        "ort_static_entropy": {"score": 79.5, "speedup": 1.9, "seconds": 90.0},
        "onnxsim_simplify_static": {"score": 81.0, "speedup": 0.9},
    }
    assert all(_verdicts(_results("Classifier", {"score": 79.5, "speedup": 1.97}, **peers)).values())
    bad = {"score": 79.4, "speedup": 1.95, "seconds": 10.1, "peak_mib": 451.0}
    assert not any(_verdicts(_results("Classifier", bad, **peers)).values())


def test_a_failure_is_a_verdict_too() -> None:
    assert _verdicts(_results("Classifier", {"failure": "error: broken"})) == {"compiles": False}


def test_the_readme_gets_the_first_table():
    page = "# Title\n\n## What must be reached\n\n| a |\n|---|\n| 1 |\n\n## Every tool\n\n| b |\n"
    readme = "before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n"
    filled = "before\n<!-- results -->\n| a |\n|---|\n| 1 |\n<!-- end of results -->\nafter\n"
    assert report.with_results(readme, page) == filled
    assert report.with_results(filled, page) == filled


def _accuracy(part: str, kind: str, ours: dict, **peers: dict) -> dict:
    base = {"failure": None, "remarks": [], "sqnr_db": 20.0, "size_mb": 1.0}
    tools = {"fp32": {"failure": None, "score": 80.0 if kind == "Classifier" else None, "speedup": 1.0, "size_mb": 4.0}}
    tools |= {name.replace("_", "-"): base | one for name, one in peers.items()} | {"qgraph": base | ours}
    return {"parts": {part: {"m": {"kind": kind, "metric": "top-1 %", "samples": 400, "tools": tools}}}}


def _accuracy_verdicts(*arguments, **peers) -> list[str]:
    return [row.verdict.strip("*") for row in report_accuracy.rows(_accuracy(*arguments, **peers))]


def test_a_loss_must_be_the_smallest_and_within_its_bound():
    peers = {"nncf": {"score": 79.6, "speedup": 1.5}, "aimet": {"score": 79.0, "speedup": 2.0}}
    peers["ort"] = {"score": 0.0, "failure": "no", "speedup": 9.0}
    assert _accuracy_verdicts("int8", "Classifier", {"score": 79.6, "speedup": 1.97}, **peers) == ["reached"] * 2
    assert _accuracy_verdicts("int8", "Classifier", {"score": 79.5, "speedup": 1.9}, **peers) == ["not reached"] * 2
    collapsed = {"nncf": {"score": 10.0, "speedup": 1.0}}
    assert _accuracy_verdicts("int8", "Classifier", {"score": 79.4, "speedup": 1}, **collapsed)[0] == "not reached"
    assert _accuracy_verdicts("per-tensor", "Classifier", {"score": 79.4}, **collapsed) == ["reached"]
    assert _accuracy_verdicts("per-tensor", "Classifier", {"score": 79.4}) == ["not compared"]
    assert _accuracy_verdicts("per-tensor", "Classifier", {"score": 78.4}) == ["not reached"]


def test_no_loss_is_as_good_as_a_gain_by_chance():
    peers = {"nncf": {"score": 80.5}}
    assert _accuracy_verdicts("per-tensor", "Classifier", {"score": 80.0}, **peers) == ["no loss"]
    assert _accuracy_verdicts("per-tensor", "Classifier", {"score": 79.75}, **peers) == ["not reached"]


def test_chance_is_what_the_changed_predictions_can_do():
    assert report_accuracy.chance({"agreement": 96.0}, 400) == pytest.approx(1.0)
    assert report_accuracy.chance({"agreement": 100.0}, 400) == 0
    assert report_accuracy.chance({}, 400) is None


def test_signals_below_the_bound_must_name_what_stayed_in_float():
    assert _accuracy_verdicts("signals", "Signals", {"sqnr_db": 20.0}) == ["reached"]
    assert _accuracy_verdicts("signals", "Signals", {"sqnr_db": 19.0}) == ["not reached"]
    named = {"sqnr_db": 19.0, "float_nodes": [["conv", "it is excluded"]]}
    assert _accuracy_verdicts("signals", "Signals", named) == ["below, float nodes named".replace(",", "**,")]


def test_rounding_is_compared_in_parameters_a_second():
    peers = {"onnxsim_int4_adaround": {"score": 70.0, "rounding": {"parameters": 600, "seconds": 0.1}}}
    fast = {"score": 79.0, "rounding": {"parameters": 300_000, "seconds": 1.0}}
    assert _accuracy_verdicts("w4a8", "Classifier", fast, **peers) == ["reached"] * 2
    peers["onnxsim_int4_adaround"] |= {"score": 80.0, "aside": "its activations are float"}
    assert _accuracy_verdicts("w4a8", "Classifier", fast, aimet={"score": 78.0}, **peers) == ["reached"] * 2
    assert _accuracy_verdicts("w4a8", "Classifier", fast, **peers) == ["not compared", "reached"]
    slow = fast | {"rounding": {"parameters": 299_000, "seconds": 1.0}}
    assert _accuracy_verdicts("w4a8", "Classifier", slow, **peers) == ["not compared", "not reached"]


def test_every_part_of_the_accuracy_benchmark_names_what_there_is():
    for part in accuracy.PARTS.values():
        assert set(part.models) <= set(data.TASKS)
        assert "qgraph" in part.ours
        for tool in part.peers:
            assert tool in accuracy_peers.TOOLS or accuracy_peers.package_of(tool) is None
            assert tool in accuracy_peers.TOOLS or tool in accuracy_peers.peers.TOOLS
    assert set(accuracy.PARTS) == set(report_accuracy._ROWS) == set(report_accuracy._TITLES)


def test_labels_are_cut_as_the_feeds_are(tmp_path):
    feeds = [{"x": np.zeros((2, 3))}, {"x": np.zeros((1, 3))}]
    accuracy._write(tmp_path / "labelled", feeds, {"labels": np.array([5, 6, 7])})
    found = [dict(np.load(path)) for path in sorted((tmp_path / "labelled").iterdir())]
    assert [one["labels"].tolist() for one in found] == [[5, 6], [7]]
    accuracy._write(tmp_path / "plain", feeds, {})
    first, again = (
        accuracy._digest([tmp_path / "plain" / "0000.npz"]),
        accuracy._digest([tmp_path / "plain" / "0000.npz"]),
    )
    assert first == again != accuracy._digest([tmp_path / "plain" / "0001.npz"])


def test_the_published_loop_of_the_sparsity_benchmark_is_ours_without_the_fit():
    weight, x = sparsity.problem(8, 160)
    hessian = 2 / len(x) * (x.T.astype(np.float64) @ x)
    found = sparsity.sparse_gptq(weight, hessian, sparsity.Pattern("neighbours"), fits=0).weight
    np.testing.assert_allclose(sparsity.published(weight, hessian), found, atol=1e-4)


def test_elements_of_another_type_or_shape_differ() -> None:
    one = np.array([1, 2, 3], np.int8)
    assert integer_bits.differing([one, one], [one, np.array([1, 0, 0], np.int8)]) == 2
    assert integer_bits.differing([one], [one.astype(np.int16)]) == 3
    assert integer_bits.differing([one], [one[None]]) == 3


def _bits(name: str, **changed: object) -> dict:
    row = {f"{runner} differ": 0 for runner in integer.RUNNERS} | {f"{runner} samples": 9 for runner in integer.RUNNERS}
    return {"name": name, "nodes": 4, "boundaries": 0, **row, **changed}


def test_bits_are_only_the_same_where_everything_ran() -> None:
    good = _bits("a")
    assert [one["reached"] for one in integer.bits_claims([good])] == [True] * 4
    wrong, missing = _bits("b", **{"c differ": 1}), _bits("c", **{"tvm differ": None, "tvm samples": None})
    verdicts = [one["reached"] for one in integer.bits_claims([good, wrong, missing, _bits("d", boundaries=2)])]
    assert verdicts == [False, True, False, False]


def _forms(name: str, **scores: float) -> list[dict]:
    names = {"float": "float32", "cpu": "cpu-int8", "qdq": "qdq", "ours": "integer, half-up"}
    return [{"name": name, "form": names[key], "score": one, "sqnr dB": one} for key, one in scores.items()]


def test_integers_may_lose_a_little_against_qdq_or_float() -> None:
    def reached(name: str, ours: float) -> bool:
        (one,) = integer_accuracy.claims(_forms(name, float=82.0, cpu=99.0, qdq=81.0, ours=ours))
        return one["reached"]

    assert (reached("resnet20", 80.7), reached("resnet20", 80.69)) == (True, False)
    assert (reached("silero_vad", 79.0), reached("silero_vad", 78.9)) == (True, False)
    assert (reached("minilm_dynamo_sdpa", 81.0), reached("minilm_dynamo_sdpa", 80.9)) == (True, False)


def test_models_that_did_not_run_stay_as_they_were() -> None:
    before = {"rows": [_bits("digits_cnn"), _bits("mnist", nodes=1)]}
    now = {"rows": [_bits("mnist", nodes=2)], "quick": False}
    merged = integer.merged("bits", before, now)
    assert [(row["name"], row["nodes"]) for row in merged["rows"]] == [("digits_cnn", 4), ("mnist", 2)]
    assert merged["claims"][0]["found"] == "18 samples of 2 models"


def test_sentences_are_cut_and_filled_up() -> None:
    ids = np.arange(1, 5)[None]
    np.testing.assert_array_equal(integer_subjects._of_length(ids, 6), [[1, 2, 3, 4, 0, 0]])
    np.testing.assert_array_equal(integer_subjects._of_length(ids, 2), [[1, 2]])
    assert set(data.TASKS) < set(integer_subjects.SUBJECTS)
    assert set(integer_accuracy.MODELS) < set(integer_subjects.SUBJECTS)


def test_every_operator_is_a_valid_model_that_the_peers_were_asked_about() -> None:
    names = [case.name for case in integer_operators.CASES]
    assert len(set(names)) == len(names)
    assert set(names) >= integer_operators.FINN
    assert set(names) == set(json.loads(integer_operators.PEERS.read_text())["operators"])
    for case in integer_operators.CASES:
        onnx.checker.check_model(case.model(), full_check=True)


def test_what_a_peer_has_and_we_have_not_is_named() -> None:
    columns = {"onnxsim_qdq": True, "onnxsim_bounds": False, "qonnx": True, "finn": False}
    rows = [{"name": "Add", "qgraph": "", **columns}, {"name": "TopK", "qgraph": "no form", **columns}]
    found = integer_operators.claims(rows)
    assert [one["found"] for one in found] == ["1 of 2; not: TopK", "0 of 0", "1 of 2; not: TopK", "0 of 0"]
    assert [one["reached"] for one in found] == [False, True, False, True]
    assert "| TopK | **no**: no form | yes |  | yes |  |" in integer_operators.render(
        {"rows": rows, "claims": found, "versions": {"qonnx": "1"}, "date": "today"}
    )


def test_a_pair_of_model_and_target_is_built_refused_or_built_with_fixed_shapes(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> net (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "net.onnx")
    feeds = [{"x": np.ones((1, 4), np.float32)}] * 5

    def row(target: str) -> target_table.Row:
        return target_table.outcome(tmp_path / "net.onnx", target, tmp_path / target, feeds, {"x": (1, 4)})

    assert row("cpu-fp32") == {
        "outcome": "built",
        "sqnr dB": None,
        "bytes": sum(path.stat().st_size for path in (tmp_path / "cpu-fp32").iterdir() if path.name == "model.onnx"),
        "source bytes": (tmp_path / "net.onnx").stat().st_size,
        "ran on": "",
    }
    assert row("integer{emit=[c]}")["fixed"]
    refused = target_table.outcome(tmp_path / "net.onnx", "cpu-fp33", tmp_path / "none", feeds, {})
    assert refused["outcome"] == "refused"
    assert "cpu-fp33" in refused["reason"]


def test_the_page_of_targets_tells_reasons_once() -> None:
    def row(model: str, target: str, outcome: str, **facts: object) -> dict[str, object]:
        return {"model": model, "target": target, "outcome": outcome, **facts}

    built = {"sqnr dB": 31.4, "ran on": "the CPU provider"}
    rows = [
        row("a", "cpu-int8", "built", **built),
        row("a", "apple-int8", "refused", reason="no kernel", fixed=True),
        row("b", "cpu-int8", "unverified", **{**built, "sqnr dB": None}, reason="outside"),
        row("b", "apple-int8", "refused", reason="no kernel"),
        row("c", "cpu-int8", "crash", reason="Segmentation fault"),
    ]
    page = target_table.render({"rows": rows})
    assert "| a | 31 | a* |\n| b | =? | a |\n| c | CRASH b |  |" in page
    assert page.count("no kernel") == 1


def test_the_page_of_placements_counts_what_differs() -> None:
    counts = {"executed": 10, "told": 8, "kernels": 3, "inserted": 2, "not_run": 0}
    rows = [
        {"model": "a", "target": "cpu-int8", **counts, "arithmetic": {"integer": 3, "none": 7}, "differences": ()},
        {"model": "b", "target": "cpu-int4", **counts, "arithmetic": {"low-bit": 1}, "differences": ["x: Conv ran"]},
    ]
    page = placement.render({"machine": {"processor": "P", "onnxruntime": "1"}, "rows": rows})
    assert "20 nodes ran; **1 were otherwise than expected**" in page
    assert "| a | cpu-int8 | 10 | 8 | 3 | 2 | 0 | 3 | 0 | 0 | 0 |" in page
    assert page.endswith("- b, cpu-int4: x: Conv ran\n")


def test_a_decoder_reads_token_by_token_what_it_reads_at_once(tmp_path: Path) -> None:
    decode.write_checkpoint(tmp_path / "checkpoint", decode.Shape(32, 48, 4, 2, vocabulary=64), layers=2)
    model = tmp_path / "model.onnx"
    decoder.export(tmp_path / "checkpoint", model)
    ids = np.random.default_rng(0).integers(0, 64, (1, 9))
    one = decode.Decoder(model, ids[:, :5])
    for at in range(5, 9):
        logits = one.read(ids[:, at : at + 1])
    np.testing.assert_allclose(logits, decode.Decoder(model, ids).logits, rtol=0, atol=1e-5)
    figures = decode.decode_in_turn({"first": model, "second": model}, 64, prompt=5, tokens=3)
    assert [one["logits_sqnr_db"] for one in figures.values()] == [None, None]


@pytest.mark.parametrize("processor", ["avx2", "avx512"])
def test_the_table_knows_which_sums_saturate_on_lesser_processors(processor: str):
    import onnxruntime

    table = capabilities.table("onnxruntime-cpu")
    if processor not in lesser_processor.processors_here() or onnxruntime.__version__ != table.version:
        pytest.skip("no such processor can be had here, or the table is of another release")
    found = list(lesser_processor.products_of(processor))
    assert [bool(one.saturates) for one in found] == [processor in one.saturates for one in table.products]
    assert sum(bool(one.saturates) for one in found) == 17


def test_a_channel_shuffle_is_the_same_in_both_layouts() -> None:
    first, last = layout.shuffle(4, 6)
    assert first > 0
    assert last > 0
    row = {"model": "m", "convolutions": 3, "transposes": 1, "total": 200, "transposing": 5, "share": 0.025}
    page = layout.render([row], [(4, 6, 1.4, 2.6)])
    assert "| m | 3 | 1 | 200 | 5 | 2.5% |" in page
    assert "| 2 x 4 | 6 x 6 | 1 | 3 |" in page
