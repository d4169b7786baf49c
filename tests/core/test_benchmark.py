"""Timing on a clock that the test turns, so that every figure is known."""

import functools
import json

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.errors import UserError
from qgraph.runtime.benchmark import Benchmark, compare, machine, peak_memory
from qgraph.runtime.session import open_session


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Timed:
    """Takes `seconds` for each row; every so many runs, one is disturbed."""

    def __init__(self, clock, seconds, log, name, every):
        self.clock, self.seconds, self.log, self.name, self.every, self.runs = clock, seconds, log, name, every, 0

    def run(self, output_names, feeds):
        self.runs += 1
        self.log.append(self.name)
        disturbed = 5 if self.runs % self.every == 0 else 1
        self.clock.now += self.seconds * len(feeds["x"]) * disturbed
        return []


def setup(before=0.010, after=0.004, every=4):
    clock, log = Clock(), []
    times = {"before": before, "after": after}
    return clock, log, {name: Timed(clock, seconds, log, name, every) for name, seconds in times.items()}


def feeds(*rows):
    return [{"x": np.zeros((count, 2), np.float32)} for count in rows]


def test_the_least_time_of_each_feed_and_the_median_over_feeds():
    clock, _, candidates = setup()
    timed = compare(candidates, feeds(1, 2, 4), seconds=10, clock=clock)
    assert timed["before"].feeds == pytest.approx((0.010, 0.020, 0.040))
    assert timed["before"].seconds == pytest.approx(0.020)
    assert timed["before"].rows_per_second == pytest.approx(7 / 0.070)
    assert timed.ratio("before", "after") == pytest.approx(2.5)
    assert timed.batch == "2 x 2"


def test_candidates_take_turns_and_the_order_turns_too():
    clock, log, candidates = setup()
    compare(candidates, feeds(1), seconds=10, rounds=2, clock=clock)
    assert log == ["before", "after"] * 2 + ["before", "after", "after", "before"]


def test_the_time_allowed_bounds_the_whole():
    clock, _, candidates = setup()
    compare(candidates, feeds(*[1] * 1000), seconds=1.0, clock=clock)
    assert clock.now < 2.5


def test_a_model_slower_than_the_time_allowed_is_still_run_once():
    clock, _, candidates = setup(before=100, after=50)
    timed = compare(candidates, feeds(1, 1), seconds=0.5, clock=clock)
    assert timed.rounds == 1
    assert len(timed["before"].feeds) == 1
    assert timed["after"].seconds > 0


def test_few_feeds_are_spread_over_all():
    clock, _, candidates = setup(before=0.1, after=0.1, every=100)
    timed = compare(candidates, feeds(1, 1, 1, 2, 3, 3, 3, 3), seconds=1.3, clock=clock)
    assert timed["before"].feeds == pytest.approx((0.1, 0.3))


def test_json_round_trip():
    clock, _, candidates = setup()
    timed = compare(candidates, feeds(1, 2), seconds=1, threads=2, clock=clock).with_memory({"before": 10})
    document = json.loads(json.dumps(timed.to_json(), allow_nan=False))
    assert Benchmark.from_json(document) == timed
    assert document["candidates"][1]["times_faster"] == pytest.approx(2.5)
    assert document["machine"]["cores"] >= 1
    assert document["threads"] == 2
    assert [one["peak_bytes"] for one in document["candidates"]] == [10, None]


def test_the_batch_is_described_by_one_shape_where_all_inputs_share_it():
    clock, _, candidates = setup()
    feed = {"x": np.zeros((8, 32)), "mask": np.zeros((8, 32))}
    assert compare(candidates, [feed], seconds=1, clock=clock).batch == "8 x 32"
    feed = {"x": np.zeros((1, 576)), "rate": np.zeros(())}
    assert compare(candidates, [feed], seconds=1, clock=clock).batch == "x 1 x 576, rate scalar"
    feed = {"x": np.zeros((1, 4)), **{f"past.{number}": np.zeros((1, 2, 0, 8)) for number in range(6)}}
    told = "x 1 x 4, past.0 1 x 2 x 0 x 8, past.1 1 x 2 x 0 x 8 and 4 more inputs"
    assert compare(candidates, [feed], seconds=1, clock=clock).batch == told


def test_nothing_to_time_is_refused():
    clock, _, candidates = setup()
    with pytest.raises(UserError, match="nothing to time"):
        compare(candidates, [], clock=clock)
    with pytest.raises(UserError, match="nothing to time"):
        compare({}, feeds(1), clock=clock)


class Failing:
    def run(self, output_names, feeds):
        raise ValueError("no such input")


def test_a_session_that_refuses_the_feed_is_named():
    with pytest.raises(UserError, match="'after' cannot run the feed: no such input"):
        compare({"after": Failing()}, feeds(1))


def test_the_machine_is_described():
    here = machine()
    assert here.cpu
    assert here.runtime.startswith("onnxruntime ")


def product(rows):
    x = ir.val("x", ir.DataType.FLOAT, [1, rows])
    weight = ir.val("w", const_value=ir.tensor(np.ones((rows, 1024), np.float32), name="w"))
    node = ir.node("MatMul", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def test_peak_memory_grows_with_the_weights(tmp_path):
    peaks = []
    for rows in (16, 16384):
        path = tmp_path / f"{rows}.onnx"
        qgraph.ir.save(product(rows), path)
        feed = {"x": np.ones((1, rows), np.float32)}
        peaks.append(peak_memory(functools.partial(open_session, path, threads=1), feed))
    if None in peaks:
        pytest.skip("this system does not tell a process's peak memory")
    assert peaks[1] - peaks[0] > 50e6  # the weights alone are 67 MB


def test_a_child_that_fails_gives_no_figure():
    assert peak_memory(functools.partial(int, "no number"), {}) is None
