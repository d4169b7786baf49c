"""Property test: random float networks become integers that ONNX Runtime and the definitions agree on to the bit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from float_networks import random_network
from integer_compilation import assert_reference_agrees, feeds

import qgraph.ir
from qgraph.analysis.integer_units import Form, integer_units
from qgraph.pipeline import Context, Pipeline
from qgraph.targets.integer import Integer

NETWORKS = 20
OPTIONS = ("", "wide=none", "activations=int8", "symmetric=true,sqnr=0.0", "scales=pow2", "weights=int4,sqnr=0.0")
ROUNDINGS = ("half-up", "gemmlowp", "half-even")


def network(seed: int) -> ir.Model:
    model = random_network(seed)
    Pipeline.parse("remove-unused").run(model)
    return model


@pytest.mark.parametrize("chunk", range(10))
def test_random_networks(chunk: int):
    for seed in range(chunk * NETWORKS, (chunk + 1) * NETWORKS):
        model = network(seed)
        samples = [feeds(model, one) for one in range(2)]
        options, rounding = OPTIONS[seed % len(OPTIONS)], ROUNDINGS[seed // len(OPTIONS) % len(ROUNDINGS)]
        pipelines = [f"full-qdq{{{options}}}", f"integer-requantize{{rounding={rounding}}}"]
        for text in pipelines:
            run(model, text, samples)
            proto = ir.to_proto(model)
            assert run(model, text, samples).changed == 0, f"seed {seed}: {text}"
            assert ir.to_proto(model) == proto, f"seed {seed}: {text}"
        onnx.checker.check_model(proto, full_check=True)
        assert Integer().check(model) == [], f"seed {seed}"
        boundaries = [node for node in model.graph if node.metadata_props]
        for feed in [] if boundaries else [*samples, feeds(model, 99), extremes(model, seed)]:
            assert_reference_agrees(model, feed, f"seed {seed}")
        assert not boundaries, f"seed {seed}: {[dict(node.metadata_props) for node in boundaries]}"


def run(model: ir.Model, text: str, samples: list[dict[str, np.ndarray]]):
    return Pipeline.parse(text).run(model, calibration=samples, context=Context(threads=1)).parts[0]


def extremes(model: ir.Model, seed: int) -> dict[str, np.ndarray]:
    """Return inputs far outside of what was calibrated: every code is the lowest or the highest."""
    random = np.random.default_rng(seed)
    return {
        name: np.sign(random.normal(size=array.shape)).astype(np.float32) * 1e6
        for name, array in feeds(model, 0).items()
    }


def test_networks_are_valid_and_have_every_form():
    forms: Counter[Form] = Counter()
    for seed in range(100):
        model = network(seed)
        assert qgraph.ir.check(model) is None
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        assert ir.to_proto(model).SerializeToString() == ir.to_proto(network(seed)).SerializeToString()
        forms.update(unit.form for unit in integer_units(model.graph).units)
    assert forms.keys() >= set(Form) - {Form.HYPOT, Form.CAST}
