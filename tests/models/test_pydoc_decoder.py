"""The decoder against an independent float64 forward pass, and against the statistics of its own text."""

from collections import Counter

import numpy as np
import pytest

from qgraph import models
from qgraph.errors import UserError
from qgraph.models import checkpoint, corpus
from qgraph.models.pydoc_decoder import SHAPE

# Bits per byte on held-out text, as a share of what the byte frequencies of that text alone give.
LARGEST_SHARE = 0.5


def test_matrix_dimensions_are_multiples_of_256():
    matrices = [array for array in checkpoint.load("pydoc_decoder").parameters.values() if array.ndim == 2]
    assert len(matrices) == 1 + 7 * SHAPE.layers
    assert all(size % 256 == 0 for matrix in matrices for size in matrix.shape)


def test_graph_is_primitive_and_ties_its_embedding(proto):
    graph = proto("pydoc_decoder").graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["MatMul"] == SHAPE.layers * (7 + 2) + 1
    assert counts["Softmax"] == counts["Sigmoid"] == counts["Expand"] / 2 == SHAPE.layers
    assert not {"RotaryEmbedding", "RMSNormalization", "Attention", "GroupQueryAttention"} & counts.keys()
    users = [node.op_type for node in graph.node if "embed_tokens.weight" in node.input]
    assert users == ["Gather", "Transpose"]


def test_onnx_agrees_with_an_independent_forward_pass(run):
    ids = models.dataset("pydoc_decoder").evaluation["input_ids"][:2, :48]
    wanted = np.stack([_forward(sequence) for sequence in ids])
    assert np.abs(wanted).max() > 5
    np.testing.assert_allclose(run("pydoc_decoder", ids), wanted, rtol=0, atol=1e-4)


def test_sequence_length_is_dynamic_and_attention_causal(run):
    ids = corpus.windows(corpus.held_out_text(), SHAPE.max_positions, count=1)
    whole = run("pydoc_decoder", ids)
    assert whole.shape == (1, 512, 256)
    for length in (1, 2, 255):
        np.testing.assert_allclose(run("pydoc_decoder", ids[:, :length]), whole[:, :length], rtol=0, atol=1e-3)


def test_held_out_text_is_well_predicted(run):
    inputs, labels = corpus.next_byte_windows(corpus.held_out_text(), count=48)
    logits = run("pydoc_decoder", inputs).astype(np.float64)
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    bits = float((log_sum - chosen).mean() / np.log(2))
    frequency = np.bincount(labels.ravel()) / labels.size
    order_0 = float(-(frequency[frequency > 0] * np.log2(frequency[frequency > 0])).sum())
    assert bits < LARGEST_SHARE * order_0


def test_split_keeps_training_and_held_out_text_apart():
    training, held_out = corpus.training_text(), corpus.held_out_text()
    assert 0.05 < len(held_out) / len(corpus.text()) < 0.2
    assert not set(held_out.split(b"\n\n")) & set(training.split(b"\n\n"))
    spans = {training[start : start + 64] for start in range(len(training) - 64)}
    shared = sum(held_out[start : start + 64] in spans for start in range(len(held_out) - 64))
    assert shared < 0.05 * len(held_out)


def test_labels_are_the_next_bytes():
    inputs, labels = corpus.next_byte_windows(b"abcdefghijk", length=4)
    assert [bytes(row) for row in inputs.astype(np.uint8)] == [b"abcd", b"efgh"]
    assert [bytes(row) for row in labels.astype(np.uint8)] == [b"bcde", b"fghi"]
    np.testing.assert_array_equal(corpus.windows(b"abcdefghijk", 4), inputs)
    assert corpus.windows(bytes(range(101)), 10, count=4)[:, 0].tolist() == [0, 30, 60, 90]


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="256 bytes"):
        corpus.windows(bytes(256))


def _forward(ids):
    """Llama's forward pass over one sequence in float64, one head and one position at a time; rotation as complex
    multiplication. Shares no code and no formulation with the builder."""
    weights = {key: array.astype(np.float64) for key, array in checkpoint.load("pydoc_decoder").parameters.items()}

    def norm(x, key):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights[key]

    def turn(vector, position):
        angles = position / 10000.0 ** (np.arange(32) / 32)
        turned = (vector[:32] + 1j * vector[32:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag])

    x = weights["embed_tokens.weight"][ids]
    for layer in range(4):
        prefix = f"layers.{layer}."
        h = norm(x, prefix + "input_layernorm.weight")
        q, k, v = (h @ weights[f"{prefix}self_attn.{part}_proj.weight"].T for part in "qkv")
        mixed = np.zeros((len(ids), 512))
        for head in range(8):
            own, shared = slice(64 * head, 64 * head + 64), slice(64 * (head // 2), 64 * (head // 2) + 64)
            keys = np.array([turn(row[shared], position) for position, row in enumerate(k)])
            for position in range(len(ids)):
                scores = keys[: position + 1] @ turn(q[position, own], position) / 8
                share = np.exp(scores - scores.max())
                mixed[position, own] = share / share.sum() @ v[: position + 1, shared]
        x = x + mixed @ weights[prefix + "self_attn.o_proj.weight"].T
        h = norm(x, prefix + "post_attention_layernorm.weight")
        gate = h @ weights[prefix + "mlp.gate_proj.weight"].T
        up = h @ weights[prefix + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    return norm(x, "norm.weight") @ weights["embed_tokens.weight"].T
