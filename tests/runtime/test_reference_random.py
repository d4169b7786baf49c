"""Property test: 1200 random integer models give the same integers in the reference and in ONNX Runtime."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from integer_models import random_integer_feeds, random_integer_model

import qgraph.ir
from qgraph.analysis.integer_functions import FUNCTIONS
from qgraph.runtime.reference import ReferenceSession
from qgraph.runtime.session import open_session

MODELS = 100
BARE = 0.6
"""Accumulators that are compared as they are: Requantize is in every model all the same, and costs most of the time."""


@pytest.mark.parametrize("chunk", range(12))
def test_random_models(chunk: int):
    for seed in range(chunk * MODELS, (chunk + 1) * MODELS):
        model = random_integer_model(seed, bare=BARE)
        # With its own fusions, and as the model stands, which is opened faster.
        session = open_session(ir.to_proto(model).SerializeToString(), threads=1, optimise=seed % 4 == 0)
        reference = ReferenceSession(model)
        for feed_seed in range(2):
            feeds = random_integer_feeds(model, feed_seed)
            for value, found, expected in zip(
                model.graph.outputs, reference.run(None, feeds), session.run(None, feeds), strict=True
            ):
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape), f"seed {seed}: {value.name}"
                np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed}: {value.name}")


def test_models_are_valid_and_as_announced():
    counts: Counter[str] = Counter()
    values: Counter[int] = Counter()
    for seed in range(100):
        model = random_integer_model(seed)
        assert qgraph.ir.check(model) is None
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        assert ir.to_proto(model).SerializeToString() == ir.to_proto(random_integer_model(seed)).SerializeToString()
        counts.update(node.op_type for node in qgraph.ir.walk(model))
        trace = ReferenceSession(model).trace(random_integer_feeds(model, seed))
        for node in model.graph:
            for output in node.outputs:
                assert trace[output.name].shape == tuple(output.shape.numpy())
                assert trace[output.name].dtype == output.dtype.numpy()
            output = node.outputs[0]
            if node.op_type == "Requantize" and output.dtype != ir.DataType.INT32:
                values.update(trace[output.name].reshape(-1).tolist())
    assert counts.keys() >= {*FUNCTIONS, "ConvInteger", "MatMulInteger", "MaxPool"} - {"IntegerSqrt", "RoundedDivide"}
    assert len(values) > 1000
    assert values.most_common(1)[0][1] < values.total() / 4
