"""The search: what it tries and takes, on models of which it is known what helps; where it runs; how it ends."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.analysis.quantization_sensitivity import Sensitivities, TensorSensitivity
from qgraph.compiler import Data
from qgraph.errors import SearchInterrupted, ToleranceError, UserError
from qgraph.pipeline import Context, Pipeline
from qgraph.report.ladder import Rung
from qgraph.runtime.recorded import Recorded
from qgraph.runtime.tolerances import parse_budget, parse_tolerance
from qgraph.search_edits import changed, keep_precise, way_name
from qgraph.search_executors import Processes, parse_executor
from qgraph.search_precision import float_sets, wanted_sqnr
from qgraph.search_ranking import first_count, predicted, relevant, worst_nodes
from qgraph.search_workshop import SharingContext
from qgraph.targets.base import Step
from qgraph.targets.cpu_int8 import CpuInt8

CHANNELS = 8
Searched = tuple[qgraph.Artifact, list[Rung]]


def network(spoilt: int = -1) -> ir.Model:
    """Return image [N, 3, 8, 8] -> five Conv and Relu -> scores [N, 10].

    In the layer `spoilt`, every filter has one weight a thousand times larger than the others, for a channel that is
    constant and next to nothing: integers that reach that far leave nothing of the other weights. Equalization mends
    that where a layer comes before it; nothing does for layer 0, but float.
    """
    random = np.random.default_rng(3)
    stored: list[ir.Value] = []
    nodes: list[ir.Node] = []

    def weight(name: str, array: np.ndarray) -> ir.Value:
        stored.append(ir.Value(name=name, const_value=ir.tensor(array.astype(np.float32), name=name)))
        return stored[-1]

    def add(op: str, inputs: list[ir.Value], name: str, **attributes) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes, name=name))
        nodes[-1].outputs[0].name = f"{name}_out"
        return nodes[-1].outputs[0]

    image = ir.Value(name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 3, 8, 8]))
    value, channels = image, 3
    for number in range(5):
        filters = random.standard_normal((CHANNELS, channels, 3, 3)) / math.sqrt(5 * channels)
        bias = random.standard_normal(CHANNELS) * 0.1
        if number == spoilt - 1:
            filters[0], bias[0] = 0, 1e-4
        if number == spoilt:
            filters[:, 0] = 0
            filters[:, 0, 1, 1] = 1000 * np.abs(filters).max()
            bias -= 1e-4 * filters[:, 0, 1, 1]
        convolved = add(
            "Conv", [value, weight(f"w{number}", filters), weight(f"b{number}", bias)], f"conv{number}", pads=[1] * 4
        )
        value, channels = add("Relu", [convolved], f"relu{number}"), CHANNELS
    flat = add("Flatten", [add("GlobalAveragePool", [value], "pool")], "flat")
    last = weight("w", random.standard_normal((CHANNELS, 10))), weight("b", random.standard_normal(10))
    scores = add("Gemm", [flat, *last], "gemm")
    scores.name, scores.type, scores.shape = "scores", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", 10])
    graph = ir.Graph([image], [scores], nodes=nodes, initializers=stored, opset_imports={"": 21}, name="net")
    return ir.Model(graph, ir_version=10, producer_name="tests")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    random = np.random.default_rng(5)
    images = random.standard_normal((40, 3, 8, 8)).astype(np.float32)
    images[:, 0] = 1e-4
    np.savez(tmp_path / "samples.npz", image=images, labels=random.integers(0, 10, 40))
    return tmp_path / "samples.npz"


@pytest.fixture
def search(samples: Path, tmp_path: Path) -> Callable[..., Searched]:
    """Return a function that compiles a network, `qdq` first, into the folder `output`; it gives the ladder too."""

    def run(model: ir.Model | Path, output: str = "out", **settings) -> Searched:
        rungs: list[Rung] = []
        arguments = {"passes": "qdq", "calibration": samples, "context": Context(threads=1), "on_rung": rungs.append}
        artifact = qgraph.compile(model, "cpu-int8", output=tmp_path / output, **{**arguments, **settings})
        return artifact, rungs

    return run


def names(rungs: list[Rung]) -> list[str]:
    return [rung.name for rung in rungs]


def ladder(artifact: qgraph.Artifact) -> list[Rung]:
    return [Rung.from_json(one) for one in json.loads((artifact.path / "bench.json").read_text())["search"]]


# --- what is tried, and taken -----------------------------------------------------------------------------------------


def test_the_first_candidate_that_meets_the_tolerance_ends_the_search(search: Callable[..., Searched]) -> None:
    artifact, rungs = search(network(), tolerance={"sqnr": 15.0})
    assert names(rungs) == ["as the target does it"]
    assert artifact.verified
    plain, _ = search(network(), output="plain")
    assert (artifact.path / "model.onnx").read_bytes() == (plain.path / "model.onnx").read_bytes()


def test_the_step_that_helps_ends_the_search(search: Callable[..., Searched]) -> None:
    artifact, rungs = search(network(spoilt=2), tolerance={"sqnr": 20.0})
    assert artifact.verified
    assert rungs[0].figures["sqnr"] < 10
    assert not rungs[0].met
    assert rungs[-1].name == "equalization"
    assert rungs[-1].met
    assert rungs[-1].figures["sqnr"] >= 20
    assert [one.name for one in ladder(artifact) if one.chosen] == ["equalization"]


def test_what_the_user_sets_is_no_step(search: Callable[..., Searched]) -> None:
    _, rungs = search(network(spoilt=2), tolerance={"sqnr": 20.0}, settings=["qdq.method=minmax"])
    assert not [name for name in names(rungs) if name.startswith("activation ranges")]


def test_the_layer_that_hurts_stays_in_float_and_the_recipe_repeats_that(search: Callable[..., Searched]) -> None:
    artifact, _ = search(network(spoilt=0), tolerance={"sqnr": 25.0})
    assert artifact.verified
    chosen = next(one for one in ladder(artifact) if one.chosen)
    assert chosen.name == "1 node in float"
    assert "nodes=[conv0]" in chosen.pipeline
    assert chosen.seconds is not None
    settings = {"passes": None, "recipe": artifact.path / "recipe.toml", "context": Context()}
    again, rungs = search(network(spoilt=0), output="again", tolerance={"sqnr": 25.0}, **settings)
    assert not rungs
    for name in ("model.onnx", "manifest.json", "recipe.toml"):
        assert (artifact.path / name).read_bytes() == (again.path / name).read_bytes()


def test_what_mends_compares_with_the_same_float_model_in_a_search_and_on_its_own(
    search: Callable[..., Searched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Step("equalization", ("equalize < qdq",)), Step("bias", ("bias-correction{method=full} > qdq",))
    monkeypatch.setattr(CpuInt8, "ladder", lambda self, compress: steps)
    artifact, _ = search(network(2), tolerance={"sqnr": 45.0})
    recipe = artifact.path / "recipe.toml"
    assert all(name in recipe.read_text() for name in ("equalize", "bias-correction"))
    again, _ = search(network(2), output="again", passes=None, recipe=recipe)
    assert (again.path / "model.onnx").read_bytes() == (artifact.path / "model.onnx").read_bytes()


def test_bounds_that_cannot_be_met_keep_the_best_and_name_the_reasons(search: Callable[..., Searched]) -> None:
    bounds = {"tolerance": {"sqnr": 25.0}, "budget": {"size": 9300.0}}  # nothing of conv0 fits into that in float
    with pytest.raises(ToleranceError, match=r"SQNR is .*Tried: .*learned rounding.*Worst: 'conv0'") as caught:
        search(network(spoilt=0), settings=["qdq.method=minmax"], **bounds)
    kept = caught.value.result
    assert not kept.verified
    assert kept.manifest["budget"] == {"size": 9300.0}
    assert (kept.path / "model.onnx").stat().st_size <= 9300
    assert "is outside the tolerance and the budget: " in caught.value.args[0]
    assert caught.value.args[0].endswith("It is kept, marked unverified.")


def test_what_belongs_together_stays_in_float(search: Callable[..., Searched]) -> None:
    artifact, rungs = search(network(spoilt=0), tolerance={"sqnr": 25.0}, settings=("qdq.method=minmax",))

    assert artifact.verified
    assert names(rungs)[-1].endswith(" in float")
    kernels = artifact.manifest["kernels"]["integer"]
    assert kernels["QLinearConv"] >= 3, "the layers that do no harm run in integers"


def test_dynamic_layers_are_held_back_too(search: Callable[..., Searched]) -> None:
    found, rungs = search(
        network(),
        passes="dynamic-int8{min_elements=0}",
        tolerance={"sqnr": 60.0},
        settings=("dynamic-int8.method=mse",),
    )

    assert found.verified
    assert any(name.endswith(" in float") for name in names(rungs))


def test_a_size_that_the_fastest_form_does_not_keep_to_is_met_by_a_smaller_one(search: Callable[..., Searched]) -> None:
    whole, _ = search(network(), "whole", passes='qdq{exclude=["*"]}')
    size = (whole.path / "model.onnx").stat().st_size

    found, rungs = search(network(), passes='qdq{exclude=["*"]}', budget={"size": 0.95 * size})

    assert found.verified
    assert "all that can be in static integers" in names(rungs)


def test_a_recipe_is_taken_as_it_is(search: Callable[..., Searched], tmp_path: Path) -> None:
    (tmp_path / "fixed.toml").write_text('[[pass]]\nname = "qdq"\n')
    with pytest.raises(ToleranceError, match="SQNR is"):
        search(network(spoilt=2), tolerance={"sqnr": 20.0}, passes=None, recipe=tmp_path / "fixed.toml")


def test_a_budget_takes_what_is_most_accurate_within_it(search: Callable[..., Searched]) -> None:
    plain, _ = search(network(), output="plain")
    size = (plain.path / "model.onnx").stat().st_size + 2500.0
    artifact, rungs = search(network(), budget={"size": size}, settings=["qdq.method=minmax"])
    assert (artifact.path / "model.onnx").stat().st_size <= size
    chosen = next(one for one in ladder(artifact) if one.chosen)
    assert "in float" in chosen.name
    assert chosen.figures["sqnr"] > rungs[0].figures["sqnr"]
    assert any(rung.bytes > size for rung in rungs)


# --- where it runs ----------------------------------------------------------------------------------------------------


def test_processes_find_the_same_and_one_that_dies_is_replaced(
    search: Callable[..., Searched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, one = search(network(spoilt=2), output="here", tolerance={"sqnr": 20.0})
    marker = tmp_path / "died"
    dying = (
        "import os, pathlib\nfrom qgraph import search_executors as it\nmake = it.Workshop.make\n"
        f"marker = pathlib.Path({str(marker)!r})\n"
        "def die_once(shop, job):\n"
        "    if job.name == 'equalization' and not marker.exists():\n"
        "        marker.touch()\n        os.kill(os.getpid(), 9)\n"
        "    return make(shop, job)\n"
        "it.Workshop.make = die_once\nit.work()"
    )
    monkeypatch.setattr(Processes, "COMMAND", [sys.executable, "-P", "-c", dying])
    there, other = search(network(spoilt=2), output="there", tolerance={"sqnr": 20.0}, context=Context(threads=2))
    assert marker.exists()
    assert names(one) == names(other)
    assert (here.path / "model.onnx").read_bytes() == (there.path / "model.onnx").read_bytes()


def test_a_worker_that_dies_twice_is_named(search: Callable[..., Searched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "COMMAND", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(ToleranceError, match=r"equalization \(its worker died 2 times \(signal 9\)\)"):
        search(network(spoilt=2), tolerance={"sqnr": 20.0}, context=Context(threads=2))


def test_ray_does_the_same(search: Callable[..., Searched]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    artifact, rungs = search(
        network(spoilt=2), tolerance={"sqnr": 20.0}, context=Context(threads=2), executor="ray://local"
    )
    assert artifact.verified
    assert rungs[-1].name == "equalization"


def test_executors_have_names() -> None:
    assert parse_executor("") is None
    assert parse_executor("ray") == "ray://local"
    assert parse_executor("ray://head:10001") == "ray://head:10001"
    with pytest.raises(UserError, match=r"no executor 'proceses'\. Did you mean 'processes'\?"):
        parse_executor("proceses")


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_an_interruption_keeps_the_best_so_far(search: Callable[..., Searched], tmp_path: Path) -> None:
    def interrupt(rung: Rung) -> None:
        if rung.name == "equalization":
            raise KeyboardInterrupt

    with pytest.raises(SearchInterrupted) as caught:
        search(network(spoilt=2), tolerance={"sqnr": 90.0}, on_rung=interrupt)
    artifact = caught.value.result
    assert not artifact.verified
    assert "equalize" in artifact.manifest["pipeline"]["compress"]
    assert [one.name for one in ladder(artifact) if one.chosen] == ["equalization"]
    assert qgraph.open(artifact.path).session()
    assert not list(tmp_path.glob(".*")) + list(tmp_path.glob("*.work"))


def test_an_interruption_before_anything_is_complete_leaves_nothing(
    search: Callable[..., Searched], tmp_path: Path
) -> None:
    def interrupt(event: object) -> None:
        if getattr(event, "stage", "") == "lower":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        search(network(), tolerance={"sqnr": 90.0}, observer=interrupt)
    assert not isinstance(caught.value, SearchInterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


# --- a measure of one's own -------------------------------------------------------------------------------------------


def test_a_measure_of_ones_own_is_climbed_for(search: Callable[..., Searched], samples: Path) -> None:
    images = np.load(samples)["image"]

    def spread(session) -> float:
        (scores,) = session.run(None, {"image": images})
        return float(scores.std())

    artifact, rungs = search(network(spoilt=2), evaluation=spread, tolerance={"eval_share": 0.02})
    verification = artifact.manifest["verification"]
    assert verification["eval_before"] - verification["eval_after"] <= 0.02 * verification["eval_before"]
    assert rungs[0].figures["eval_share"] > 0.02 >= rungs[-1].figures["eval_share"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda session: 1 / 0, "failed: ZeroDivisionError: division by zero"),
        (lambda session: sys.exit(5), "failed: SystemExit: 5"),
        (lambda session: math.nan, "returned nan, which is no finite number"),
        (lambda session: None, "must return a number, the higher the better, not None: does it lack a return?"),
        (lambda session: "good", "must return a number, the higher the better, not str"),
        (lambda: 1.0, "must take one argument, a session with run(None, feeds): too many positional arguments"),
        ("nowhere:there", "nowhere:there cannot be loaded: No module named 'nowhere'"),
        ("nowhere", "--eval takes MODULE:FUNCTION, not 'nowhere'"),
    ],
)
def test_faults_of_the_measure_are_told(
    search: Callable[..., Searched], tmp_path: Path, function: object, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        search(network(), evaluation=function, tolerance={"eval": 0.1})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_a_bound_on_eval_needs_the_measure(search: Callable[..., Searched]) -> None:
    with pytest.raises(UserError, match="name it with --eval MODULE:FUNCTION"):
        search(network(), tolerance={"eval": 0.1})


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_top1_needs_labels_or_outputs_that_look_like_scores(search: Callable[..., Searched]) -> None:
    model = network()
    image = next(node for node in model.graph if node.name == "relu4").outputs[0]
    model.graph.outputs[:] = [image]
    image.type, image.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", CHANNELS, 8, 8])
    feeds = [{"image": np.zeros((1, 3, 8, 8), np.float32)}] * 2
    events: list[str] = []
    with pytest.raises(
        UserError, match=r"no output looks like class scores .*'relu4_out' float32 \[1, 8, 8, 8\].*--labels"
    ):
        search(model, calibration=feeds, tolerance={"top1": 0.01}, observer=lambda event: events.append(event.stage))
    assert events == ["load"]
    artifact, _ = search(network(), calibration=Data(feeds), tolerance={"top1": 1.0})
    assert artifact.verified


def test_bounds_are_read() -> None:
    assert parse_tolerance("eval=0.01") == ("eval", 0.01)
    assert parse_tolerance("eval=1%") == ("eval_share", 0.01)
    for text, message in {
        "top1=2": "tolerance top1: 2 is no loss below 100%; for percent write top1=2%",
        "top1=200%": "tolerance top1: 200% is no loss below 100%",
        "speed=3": "there is no tolerance 'speed'. There are: sqnr, cosine, max_abs, top1, eval.",
    }.items():
        with pytest.raises(UserError) as caught:
            parse_tolerance(text)
        assert str(caught.value) == message
    assert parse_budget("size=8MB") == ("size", 8e6)
    assert parse_budget("size = 500KiB") == ("size", 512000.0)
    assert parse_budget("latency=0.5x") == ("latency", 0.5)
    assert parse_budget("latency=50%") == ("latency", 0.5)
    for text, message in {
        "sise=8MB": "there is no budget 'sise'. Did you mean 'size'? There are: size, latency.",
        "size": "--budget takes size=BYTES or latency=SHARE, such as size=8MB or latency=0.5x, not 'size'",
        "size=big": "budget size: 'big' is not a size such as 8MB or 500KiB",
        "size=0": "budget size: '0' is not a size such as 8MB or 500KiB",
        "latency=5ms": "budget latency: '5ms' is not a share such as 0.5x or 50%",
    }.items():
        with pytest.raises(UserError) as caught:
            parse_budget(text)
        assert str(caught.value) == message


# --- what is predicted, and shared ------------------------------------------------------------------------------------


def sensitivities(powers: dict[str, float], kind: str = "weight") -> Sensitivities:
    """Return what it would be if the weight (or input) of each node made noise of this power at the outputs."""
    total = sum(powers.values())
    tensors = tuple(
        TensorSensitivity(f"{node}_t", kind, (node,), 4, 20.0, -10 * math.log10(power), power / total, "gradient")
        for node, power in powers.items()
    )
    return Sensitivities(4, tensors, -10 * math.log10(total))


def test_steps_that_mend_no_harm_are_left_out() -> None:
    steps = [Step("one", (), "weights"), Step("two", (), "activations"), Step("three", ())]
    assert [one.name for one in relevant(steps, None)] == ["one", "two", "three"]
    assert [one.name for one in relevant(steps, sensitivities({"a": 1.0}))] == ["one", "three"]
    assert [one.name for one in relevant(steps, sensitivities({"a": 1.0}, "activation"))] == ["two", "three"]


def test_the_first_count_is_as_many_nodes_as_are_predicted_to_do() -> None:
    found = sensitivities({"a": 0.9, "b": 0.09, "c": 0.009, "d": 0.001})
    nodes = worst_nodes(found, "int8")
    assert nodes == ["a", "b", "c", "d"]
    assert predicted(found, nodes[:1], "int8") == pytest.approx(10, abs=0.01)
    # 10 dB between the candidates have brought the loss from 0.4 to 0.04; 20 dB more bring it to 0.0004.
    seen = [(-10.0, 0.4), (0.0, 0.04)]
    assert first_count(found, nodes, "int8", seen, 0.04) == 1
    assert first_count(found, nodes, "int8", seen, 0.004) == 1
    assert first_count(found, nodes, "int8", seen, 0.0005) == 2
    assert first_count(found, nodes, "int8", seen, 0.00005) == 3
    assert first_count(found, nodes, "int8", seen[:1], 0.00005) == 1
    assert first_count(found, nodes, "int8", [(0.0, 0.04), (10.0, 0.04)], 0.00005) == 1
    assert first_count(None, nodes, "int8", seen, 0.004) == 1


def test_ranges_are_shared_as_far_as_nothing_has_changed_a_value() -> None:
    context = SharingContext()
    mark, rounding, smooth = Pipeline.parse("mixed-precision{nodes=[a]},rtn{bits=4},smooth-quant")
    context.follow(smooth)
    shared = context.values
    context.follow(mark)
    assert context.values == shared  # a mark alone changes no range
    context.follow(rounding)
    assert context.values == (*shared, repr(mark), repr(rounding))  # but what heeds it does


def test_a_recorded_source_runs_once() -> None:
    class Session:
        runs = 0

        def run(self, names, feeds):
            self.runs += 1
            return [np.full(4, feeds["x"])]

    feeds = [{"x": np.float32(number)} for number in range(3)]
    source = Session()
    recorded = Recorded(source, len(feeds), room=100)
    for _ in range(2):
        recorded.restart()
        assert [float(recorded.run(None, one)[0][0]) for one in feeds] == [0, 1, 2]
    assert source.runs == 3
    tight = Recorded(Session(), len(feeds), room=20)
    for _ in range(2):
        tight.restart()
        assert [float(tight.run(None, one)[0][0]) for one in feeds] == [0, 1, 2]
    assert tight.session.runs == 6


# --- changes of a pipeline --------------------------------------------------------------------------------------------


def test_changes_of_a_pipeline() -> None:
    base = Pipeline.parse("align-channels,qdq{weights=uint8},dynamic-int8")
    cases = {
        "qdq.method=mse": "align-channels,qdq{weights=uint8,method=mse},dynamic-int8",
        "smooth-quant < qdq": "align-channels,smooth-quant,qdq{weights=uint8},dynamic-int8",
        "rtn{bits=8} > qdq": "align-channels,qdq{weights=uint8},rtn{bits=8},dynamic-int8",
    }
    for way, text in cases.items():
        assert changed(base, way) == Pipeline.parse(text)
    assert changed(Pipeline.parse("rtn{bits=4},qdq"), "rtn{bits=8} < qdq") == Pipeline.parse("rtn{bits=8},qdq")
    assert changed(base, "qdq.weights=uint8") is None
    assert changed(Pipeline.parse("gptq{bits=4},qdq"), "adaround{bits=4} < qdq") == Pipeline.parse(
        "adaround{bits=4},qdq"
    )
    assert changed(Pipeline.parse("gptq{bits=4},qdq"), "smooth-quant < qdq") == Pipeline.parse(
        "smooth-quant,gptq{bits=4},qdq"
    )
    assert changed(base, "smooth-quant < gptq") is None
    assert changed(base, "gptq.bits=8") is None
    precise = keep_precise(Pipeline.parse("smooth-quant,gptq,qdq"), ["/a[0]/Conv"], "float")
    assert precise.to_text() == 'smooth-quant,mixed-precision{nodes=["/a[[]0]/Conv"]},gptq,qdq'


def test_ways_have_names() -> None:
    for step in CpuInt8().ladder(Pipeline.parse("qdq")):
        told = [way_name(step.name, way, step.ways) for way in step.ways]
        assert len(set(told)) == len(told)
        assert all(len(name) < 40 for name in told)


def test_where_to_begin_among_sets_for_float() -> None:
    assert wanted_sqnr([(10.0, 0.1), (20.0, 0.01)], 0.001) == pytest.approx(31.0)
    assert wanted_sqnr([(10.0, 0.1)], 0.005) == pytest.approx(31.0)
    assert wanted_sqnr([(10.0, 0.1)], 0.5) == pytest.approx(11.0)
    assert wanted_sqnr([], 0.5) == 0.0


def test_sets_for_float_grow_and_hold_what_hurts_first(samples: Path) -> None:
    model = network(spoilt=2)
    with np.load(samples) as arrays:
        feeds = [{"image": arrays["image"]}]

    sets = float_sets(model, Context(calibration=feeds), Pipeline.parse("qdq"))

    goals, nodes = zip(*sets, strict=True)
    assert list(goals) == sorted(goals)
    assert [len(one) for one in nodes] == sorted({len(one) for one in nodes})
    assert "conv2" in nodes[0]
