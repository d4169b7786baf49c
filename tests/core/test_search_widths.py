"""The search among weights of 4 and of 8 bits: how many nodes need the 8, found with few candidates."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph.analysis.quantization_sensitivity import Sensitivities, TensorSensitivity
from qgraph.errors import ToleranceError
from qgraph.pipeline import Context
from qgraph.report.ladder import Rung
from qgraph.search_ranking import between, elements_of, is_far, is_luck, near_enough, saves_little, worst_nodes

WIDTHS = (8, 16, 64, 64, 256, 32)
OUTLIER = 12.0
SPOILT = 3


def network() -> ir.Model:
    """Return x [N, 8] -> a chain of Conv 1x1 of growing size -> y [N, 32].

    In the first three, which are small, every filter has a weight `OUTLIER` times the others, on a channel that is next
    to nothing.
    """
    random = np.random.default_rng(7)
    stored, nodes = [], []
    value = x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", WIDTHS[0], 4, 4]))
    for number, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        weight = random.standard_normal((outputs, inputs, 1, 1)).astype(np.float32) / math.sqrt(inputs)
        bias = (0.1 * random.standard_normal(outputs)).astype(np.float32)
        if number < SPOILT:
            weight[:, 0] = OUTLIER / math.sqrt(inputs)
        if number < SPOILT - 1:  # the channel that the next layer reads by its outliers
            weight[0], bias[0] = 0, 0.01
        for name, array in ((f"w{number}", weight), (f"b{number}", bias)):
            stored.append(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        nodes.append(ir.node("Conv", [value, *stored[-2:]], name=f"conv{number}"))
        nodes[-1].outputs[0].name = f"c{number}"
        nodes.append(ir.node("Relu", [nodes[-1].outputs[0]], name=f"relu{number}"))
        value = nodes[-1].outputs[0]
        value.name = f"r{number}"
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", WIDTHS[-1], 4, 4])
    graph = ir.Graph([x], [value], nodes=nodes, initializers=stored, opset_imports={"": 21}, name="chain")
    return ir.Model(graph, ir_version=10, producer_name="tests")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    random = np.random.default_rng(8)
    x = np.abs(random.standard_normal((40, WIDTHS[0], 4, 4))).astype(np.float32)
    x[:, 0] = 0.01
    np.savez(tmp_path / "samples.npz", x=x)
    return tmp_path / "samples.npz"


def compiled(samples: Path, name: str, **settings) -> tuple[qgraph.Artifact, list[Rung]]:
    rungs: list[Rung] = []
    arguments = {"passes": "qdq{weights=int4}", "calibration": samples, "context": Context(threads=1)}
    arguments |= {"on_rung": rungs.append, **settings}
    return qgraph.compile(network(), "cpu-int8", output=samples.parent / name, **arguments), rungs


def test_what_is_far_away_goes_straight_to_8_bits_for_some(samples: Path) -> None:
    whole, _ = compiled(samples, "int8", passes="qdq")
    small, first = compiled(samples, "int4", tolerance={"sqnr": -40.0})
    bound = 19.0
    artifact, rungs = compiled(samples, "searched", tolerance={"sqnr": bound})
    assert first[0].figures["sqnr"] < bound - 15
    assert artifact.verified
    assert [rung.name for rung in rungs[:2]] == ["as the target does it", "5 nodes in 8 bits"]
    assert all(rung.name.endswith("in 8 bits") for rung in rungs[1:])  # no step for the rounding was worth a try
    assert len(rungs) <= 5
    chosen = next(one for one in json.loads((artifact.path / "bench.json").read_text())["search"] if one["chosen"])
    assert chosen["figures"]["sqnr"] >= bound
    sizes = [(one.path / "model.onnx").stat().st_size for one in (small, artifact, whole)]
    assert sizes[0] < sizes[1] < sizes[2]
    again, none = compiled(
        samples, "again", passes=None, recipe=artifact.path / "recipe.toml", tolerance={"sqnr": bound}
    )
    assert not none
    for name in ("model.onnx", "recipe.toml"):
        assert (artifact.path / name).read_bytes() == (again.path / name).read_bytes()


def test_where_8_bits_do_not_do_either_the_ladder_is_climbed(samples: Path) -> None:
    with pytest.raises(ToleranceError, match=r"Tried: 5 nodes in 8 bits, .*bias correction"):
        compiled(samples, "never", tolerance={"sqnr": 150.0})


def test_where_next_to_nothing_can_stay_in_4_bits_the_ladder_is_climbed_besides(samples: Path) -> None:
    bound = 26.0  # which the last layers, that hold most weights, do not meet in 4 bits
    artifact, rungs = compiled(samples, "besides", tolerance={"sqnr": bound})
    assert artifact.verified
    assert [rung.name for rung in rungs[:2]] == ["as the target does it", "5 nodes in 8 bits"]
    assert "equalization" in [rung.name for rung in rungs]
    chosen = next(one for one in json.loads((artifact.path / "bench.json").read_text())["search"] if one["chosen"])
    assert chosen["figures"]["sqnr"] >= bound


def test_nodes_are_ranked_by_what_each_element_does() -> None:
    powers = {"large": 0.5, "middle": 0.2, "small": 0.1}
    tensors = tuple(
        TensorSensitivity(f"{node}_w", "weight", (node,), 4, 20.0, -10 * math.log10(power), power / 0.8, "gradient")
        for node, power in powers.items()
    )
    found = Sensitivities(4, tensors, 1.0)
    elements = {"large": 1000, "middle": 100, "small": 10}
    assert worst_nodes(found, "int8") == ["large", "middle", "small"]
    assert worst_nodes(found, "int8", elements) == ["small", "middle", "large"]
    assert worst_nodes(found, "float", elements) == ["large", "middle", "small"]


def test_elements_are_those_of_the_weights() -> None:
    model = network()
    tensors = (
        TensorSensitivity("w1", "weight", ("conv1",), 4, 20.0, 10.0, 0.5, "gradient"),
        TensorSensitivity("r0", "activation", ("conv1",), 8, 20.0, 10.0, 0.5, "gradient"),
    )
    assert elements_of(model, Sensitivities(4, tensors, 1.0)) == {"conv1": 16 * 64}
    assert elements_of(model, None) == {}


def test_the_number_of_nodes_is_parted_by_their_elements() -> None:
    nodes, elements = list("abcde"), {"a": 1, "b": 1, "c": 2, "d": 40, "e": 100}
    assert between(nodes, elements, 0, 5) == 4
    assert between(nodes, elements, 0, 4) == 3
    assert between(nodes, elements, 2, 4) == 3
    assert not near_enough(nodes, elements, 0, 4)
    assert near_enough(nodes, elements, 0, 3)  # 4 of 144
    assert near_enough(nodes, elements, 4, 5)  # nothing between


def test_how_far_rounding_reaches() -> None:
    assert is_far(20.0, 4.0, math.inf)
    assert not is_far(20.0, 6.0, math.inf)
    assert is_far(None, -4.0, 21.6)
    assert not is_far(None, 8.0, 21.6)


def test_a_loss_smaller_than_one_sample_is_not_told_by_luck() -> None:
    assert is_luck({"top1": 0.005}, 20, 12.0, 21.6)
    assert not is_luck({"top1": 0.005}, 20, 17.6, 21.6)  # as near as 8 bits are
    assert not is_luck({"top1": 0.005}, 400, 12.0, 21.6)  # enough samples
    assert not is_luck({"cosine": 0.99}, 20, 12.0, 21.6)


def test_what_is_left_in_4_bits_may_be_little() -> None:
    elements = {"a": 10, "b": 30, "c": 60}
    assert not saves_little(list(elements), elements, 2)
    assert saves_little(["c", "b", "a"], elements, 2)
