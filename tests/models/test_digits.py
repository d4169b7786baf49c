"""The digit classifiers: their structure and how well they read held-out digits."""

from collections import Counter

import numpy as np
import pytest

from qgraph import models
from qgraph.models import data

LEAST_ACCURACY = {"digits_cnn": 0.985, "digits_encoder": 0.97, "digits_mobilenet": 0.97}


@pytest.mark.parametrize("name", LEAST_ACCURACY)
def test_held_out_accuracy(run, name):
    dataset = models.dataset(name)
    logits = run(name, dataset.evaluation["image"])
    assert (logits.argmax(1) == dataset.labels).mean() >= LEAST_ACCURACY[name]


def test_split_is_fixed_and_covers_all_digits():
    images, labels = data.digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    assert labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    dataset = models.dataset("digits_cnn")
    np.testing.assert_array_equal(dataset.labels, labels[1197:])
    assert np.bincount(dataset.labels, minlength=10).min() >= 40


def test_cnn_has_the_structures_that_passes_look_for(proto):
    graph = proto("digits_cnn").graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts == {
        "Conv": 16,
        "BatchNormalization": 16,
        "Clip": 14,
        "Add": 5,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }
    groups = [attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "group"]
    assert Counter(groups) == {1: 13, 128: 1, 512: 2}


def test_mobilenet_has_the_blocks_of_its_name(proto):
    graph = proto("digits_mobilenet").graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts == {
        "Conv": 32,
        "BatchNormalization": 22,
        "HardSwish": 11,
        "Relu": 10,
        "HardSigmoid": 5,
        "Mul": 5,
        "GlobalAveragePool": 6,
        "Add": 3,
        "Flatten": 1,
        "Gemm": 2,
    }
    groups = [attribute.i for node in graph.node for attribute in node.attribute if attribute.name == "group"]
    assert sorted(group for group in groups if group > 1) == [16, 72, 88, 96, 120, 144, 192]


def test_encoder_attention_is_decomposed(proto):
    counts = Counter(node.op_type for node in proto("digits_encoder").graph.node)
    assert counts["Softmax"] == 3
    assert counts["MatMul"] == 3 * (4 + 2 + 2)
    assert counts["LayerNormalization"] == 7
    assert counts["Erf"] == 3 + 2
    assert not {"Attention", "MultiHeadAttention", "Gelu"} & counts.keys()
