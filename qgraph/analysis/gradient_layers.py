"""Gradients of products, normalizations and attention.

C = A B                  dA = dC B^T, dB = A^T dC, summed over what was broadcast
y = softmax(x)           dx = y (g - sum g y)
y = (x - mean) * inv     dx = inv (g - mean g - y mean(g y)), with inv = 1 / sqrt(var + epsilon)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.analysis.gradient_tape import Attribute, Call, Rule, Tape, UncoveredError

__all__ = ["LAYERS"]


# --- products ---------------------------------------------------------------------------------------------------------


def _swap(tape: Tape, value: ir.Value, rank: int) -> ir.Value:
    """Return the transposed matrices of a stack."""
    return tape.transpose(value, [*range(rank - 2), rank - 1, rank - 2])


def _matmul(of: Call) -> dict[int, ir.Value]:
    tape, a, b = of.tape, of.x(0), of.x(1)
    ranks = tape.rank(a), tape.rank(b)
    if min(ranks) < 2:
        raise UncoveredError("it multiplies a vector")
    found = {}
    if 0 in of.wanted:
        found[0] = _reduce_stack(tape, tape.op("MatMul", of.g, _swap(tape, b, ranks[1])), a, b)
    if 1 in of.wanted and ranks[1] == 2 and ranks[0] > 2:
        # Rows of all matrices together: one product, and nothing to sum up.
        rows = [
            tape.reshape(one, tape.joined(tape.ints([-1]), tape.size(of_rows, -1)))
            for one, of_rows in ((a, a), (of.g, of.y))
        ]
        found[1] = tape.op("MatMul", _swap(tape, rows[0], 2), rows[1])
    elif 1 in of.wanted:
        found[1] = _reduce_stack(tape, tape.op("MatMul", _swap(tape, a, ranks[0]), of.g), b, a)
    return found


def _reduce_stack(tape: Tape, cotangent: ir.Value, x: ir.Value, other: ir.Value) -> ir.Value:
    """Sum over the axes in front of the matrices along which x was broadcast to the other factor."""
    own, others = tape.dims(x), tape.dims(other)
    assert own is not None
    assert others is not None
    if own[:-2] == others[:-2] or len(others) == 2:
        return cotangent
    return tape.reduce_to(cotangent, x, cotangent)


def _gemm(of: Call) -> dict[int, ir.Value]:
    tape, a, b, g = of.tape, of.x(0), of.x(1), of.g
    flip_a, flip_b, alpha = of.integer("transA", 0), of.integer("transB", 0), of.real("alpha", 1.0)
    found = {}
    if 0 in of.wanted:
        pair = (b, g) if flip_a else (g, b)
        flips: dict[str, Attribute] = {"transA": flip_b, "transB": 1} if flip_a else {"transA": 0, "transB": 1 - flip_b}
        found[0] = tape.op("Gemm", *pair, None, alpha=alpha, attributes=flips)
    if 1 in of.wanted:
        pair = (g, a) if flip_b else (a, g)
        flips = {"transA": 1, "transB": flip_a} if flip_b else {"transA": 1 - flip_a, "transB": 0}
        found[1] = tape.op("Gemm", *pair, None, alpha=alpha, attributes=flips)
    if 2 in of.wanted:
        found[2] = tape.reduce_to(tape.scale(g, of.real("beta", 1.0)), of.x(2), of.y)
    return found


# --- normalizations ---------------------------------------------------------------------------------------------------


def _softmax(of: Call) -> dict[int, ir.Value]:
    return {0: _softmax_of(of.tape, of.g, of.y, of.integer("axis", -1))}


def _softmax_of(tape: Tape, g: ir.Value, y: ir.Value, axis: int) -> ir.Value:
    return tape.mul(y, tape.sub(g, tape.sum(tape.mul(g, y), [axis])))


def _log_softmax(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    total = tape.sum(of.g, [of.integer("axis", -1)])
    return {0: tape.sub(of.g, tape.mul(tape.op("Exp", of.y), total))}


def _channels(tape: Tape, value: ir.Value, rank: int) -> ir.Value:
    """Return one number a channel, in a shape that broadcasts against [N, C, ...]."""
    return tape.reshape(value, [1, -1, *[1] * (rank - 2)])


def _batch_normalization(of: Call) -> dict[int, ir.Value]:
    """The inference form: a scale and an offset for each channel."""
    if of.integer("training_mode", 0):
        raise UncoveredError("it is in training mode")
    tape, g, rank = of.tape, of.g, of.tape.rank(of.x())
    scale, mean, variance = of.x(1), of.x(3), of.x(4)
    inverse = tape.op("Reciprocal", tape.op("Sqrt", tape.plus(variance, of.real("epsilon", 1e-5))))
    others = [0, *range(2, rank)]
    found = {}
    if 0 in of.wanted:
        found[0] = tape.mul(g, _channels(tape, tape.mul(scale, inverse), rank))
    summed = tape.sum(g, others, keep=False) if of.wanted & {2, 3} else None
    if of.wanted & {1, 4}:
        centred = tape.sub(of.x(), _channels(tape, mean, rank))
        moment = tape.mul(tape.sum(tape.mul(g, centred), others, keep=False), inverse)
        found[1] = moment
        found[4] = tape.scale(tape.mul(tape.mul(moment, scale), tape.mul(inverse, inverse)), -0.5)
    if summed is not None:
        found[2] = summed
        found[3] = tape.op("Neg", tape.mul(summed, tape.mul(scale, inverse)))
    return found


def _normalized(
    tape: Tape, x: ir.Value, axes: Sequence[int], epsilon: float, *, centre: bool = True
) -> tuple[ir.Value, ir.Value]:
    """Return (x - mean) * inv and inv over axes."""
    centred = tape.sub(x, tape.mean(x, axes)) if centre else x
    variance = tape.mean(tape.mul(centred, centred), axes)
    inverse = tape.op("Reciprocal", tape.op("Sqrt", tape.plus(variance, epsilon)))
    return tape.mul(centred, inverse), inverse


def _normalized_gradient(
    tape: Tape, g: ir.Value, normal: ir.Value, inverse: ir.Value, axes: Sequence[int], *, centre: bool = True
) -> ir.Value:
    projected = tape.mul(normal, tape.mean(tape.mul(g, normal), axes))
    rest = tape.sub(tape.sub(g, tape.mean(g, axes)) if centre else g, projected)
    return tape.mul(inverse, rest)


def _scaled(of: Call, axes: Sequence[int], epsilon: float, *, centre: bool) -> dict[int, ir.Value]:
    """Normalize over axes, multiply by input 1, add input 2."""
    tape, x, scale = of.tape, of.x(), of.x(1)
    normal, inverse = _normalized(tape, x, axes, epsilon, centre=centre)
    inner = _normalized_gradient(tape, tape.mul(of.g, scale), normal, inverse, axes, centre=centre)
    found = {0: inner}
    if 1 in of.wanted:
        found[1] = tape.reduce_to(tape.mul(of.g, normal), scale, of.y)
    if 2 in of.wanted:
        found[2] = tape.reduce_to(of.g, of.x(2), of.y)
    return found


def _last_axes(of: Call) -> list[int]:
    axis = of.integer("axis", -1)
    return list(range(axis, 0)) if axis < 0 else list(range(axis, of.tape.rank(of.x())))


def _layer_normalization(of: Call) -> dict[int, ir.Value]:
    return _scaled(of, _last_axes(of), of.real("epsilon", 1e-5), centre=True)


def _rms_normalization(of: Call) -> dict[int, ir.Value]:
    return _scaled(of, _last_axes(of), of.real("epsilon", 1e-5), centre=False)


def _instance_normalization(of: Call) -> dict[int, ir.Value]:
    tape, rank = of.tape, of.tape.rank(of.x())
    axes = list(range(2, rank))
    normal, inverse = _normalized(tape, of.x(), axes, of.real("epsilon", 1e-5))
    scaled = tape.mul(of.g, _channels(tape, of.x(1), rank))
    return {
        0: _normalized_gradient(tape, scaled, normal, inverse, axes),
        1: tape.sum(tape.mul(of.g, normal), [0, *axes], keep=False),
        2: tape.sum(of.g, [0, *axes], keep=False),
    }


def _group_normalization(of: Call) -> dict[int, ir.Value]:
    """Each group of channels is normalized as a whole; scale and bias are one number a channel (opset 21)."""
    tape, rank = of.tape, of.tape.rank(of.x())
    if tape.opset < 21:
        raise UncoveredError("GroupNormalization before opset 21 scales by groups")
    groups, shape = [0, of.integer("num_groups", 1), -1], tape.shape(of.x())
    normal, inverse = _normalized(tape, tape.reshape(of.x(), groups), [2], of.real("epsilon", 1e-5))
    scaled = tape.reshape(tape.mul(of.g, _channels(tape, of.x(1), rank)), groups)
    others = [0, *range(2, rank)]
    return {
        0: tape.reshape(_normalized_gradient(tape, scaled, normal, inverse, [2]), shape),
        1: tape.sum(tape.mul(of.g, tape.reshape(normal, shape)), others, keep=False),
        2: tape.sum(of.g, others, keep=False),
    }


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(of: Call) -> dict[int, ir.Value]:
    """Y = softmax(s Q K^T + mask) V, written out; several query heads may share one of K and V."""
    if any(of.optional(index) is not None for index in range(4, 7)) or of.wanted - {0, 1, 2, 3}:
        raise UncoveredError("an Attention with a cache of keys and values")
    tape = of.tape
    heads = _Heads(of)
    q, k, v = (heads.split(index) for index in range(3))
    scale = of.real("scale", 0.0)
    factor = tape.number(scale, q) if scale else heads.default_scale(q)
    scores = tape.mul(tape.op("MatMul", q, _swap(tape, k, 5)), factor)
    cap = of.real("softcap", 0.0)
    bent = tape.op("Tanh", tape.scale(scores, 1 / cap)) if cap else None
    masked = heads.masked(tape.scale(bent, cap) if bent is not None else scores)
    p = tape.op("Softmax", masked, axis=-1)
    g = heads.split_output(of.g)
    dp = tape.op("MatMul", g, _swap(tape, v, 5))
    inner = _softmax_of(tape, dp, p, -1)
    found = {}
    if 3 in of.wanted:
        found[3] = heads.mask_gradient(inner)
    if bent is not None:
        inner = tape.mul(inner, tape.sub(tape.number(1.0, bent), tape.mul(bent, bent)))
    inner = tape.mul(inner, factor)
    found[0] = heads.joined(0, tape.op("MatMul", inner, k))
    found[1] = heads.joined(1, tape.sum(tape.op("MatMul", _swap(tape, inner, 5), q), [2]))
    found[2] = heads.joined(2, tape.sum(tape.op("MatMul", _swap(tape, p, 5), g), [2]))
    return found


class _Heads:
    """Brings Q, K, V [B, H, S, D] or [B, S, H D] into [B, heads of K, queries a head of K, S, D], and back."""

    def __init__(self, of: Call) -> None:
        self.of, self.tape = of, of.tape
        self.flat = self.tape.rank(of.x(0)) == 3
        if self.flat:
            shared = of.integer("kv_num_heads", 0)
            self.counts = (of.integer("q_num_heads", 0), shared, shared)
        else:
            sizes = [dims[1] if (dims := self.tape.dims(of.x(index))) else None for index in range(3)]
            self.counts = tuple(size if isinstance(size, int) else 0 for size in sizes)  # type: ignore[assignment]
        if not all(self.counts):
            raise UncoveredError("the number of heads is not known")

    def split(self, index: int) -> ir.Value:
        return self._split(self.of.x(index), self.counts[index], 1 if index else self._queries())

    def split_output(self, g: ir.Value) -> ir.Value:
        return self._split(g, self.counts[0], self._queries())

    def _queries(self) -> int:
        return self.counts[0] // self.counts[1]

    def _split(self, value: ir.Value, heads: int, queries: int) -> ir.Value:
        tape = self.tape
        if self.flat:
            value = tape.transpose(tape.reshape(value, [0, 0, heads, -1]), [0, 2, 1, 3])
        shape = tape.op("Shape", value, dtype=ir.DataType.INT64)
        tail = tape.op("Slice", shape, tape.ints([2]), tape.ints([4]))
        batch = tape.op("Slice", shape, tape.ints([0]), tape.ints([1]))
        return tape.reshape(value, tape.joined(batch, tape.ints([heads // queries, queries]), tail))

    def joined(self, index: int, value: ir.Value) -> ir.Value:
        tape = self.tape
        if not self.flat:
            return tape.reshape(value, tape.shape(self.of.x(index)))
        shape = tape.op("Shape", value, dtype=ir.DataType.INT64)
        tail = tape.op("Slice", shape, tape.ints([3]), tape.ints([5]))
        batch = tape.op("Slice", shape, tape.ints([0]), tape.ints([1]))
        four = tape.reshape(value, tape.joined(batch, tape.ints([-1]), tail))
        return tape.reshape(tape.transpose(four, [0, 2, 1, 3]), tape.shape(self.of.x(index)))

    def default_scale(self, q: ir.Value) -> ir.Value:
        tape = self.tape
        width = tape.op("Gather", tape.op("Shape", q, dtype=ir.DataType.INT64), tape.ints([-1]))
        real = tape.op("Cast", width, dtype=tape.dtype(q), to=int(tape.dtype(q)))
        return tape.op("Reciprocal", tape.op("Sqrt", real))

    def masked(self, scores: ir.Value) -> ir.Value:
        tape, mask = self.tape, self.of.optional(3)
        least = tape.number(-math.inf, scores)
        if mask is not None:
            five = tape.op("Unsqueeze", mask, tape.ints([2])) if tape.rank(mask) == 4 else mask
            if tape.rank(mask) == 4 and self.counts[0] != self.counts[1]:
                raise UncoveredError("an Attention with a mask for each of several heads that share keys")
            if tape.dtype(mask) == ir.DataType.BOOL:
                zero = tape.number(0.0, scores)
                five = tape.op("Where", five, zero, least, dtype=tape.dtype(scores))
            scores = tape.add(scores, five)
        if self.of.integer("is_causal", 0):
            shape = tape.op("Shape", scores, dtype=ir.DataType.INT64)
            square = tape.op("Slice", shape, tape.ints([3]), tape.ints([5]))
            full = tape.expand_to(least, square)
            scores = tape.add(scores, tape.op("Trilu", full, tape.constant(np.asarray(1, np.int64)), upper=1))
        return scores

    def mask_gradient(self, inner: ir.Value) -> ir.Value:
        tape, mask = self.tape, self.of.x(3)
        if tape.rank(mask) > 3:
            inner = tape.sum(inner, [2], keep=False)
        return tape.reduce_to(inner, mask, inner)


LAYERS: Mapping[str, Rule] = {
    "Attention": _attention,
    "BatchNormalization": _batch_normalization,
    "Gemm": _gemm,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "RMSNormalization": _rms_normalization,
    "Softmax": _softmax,
}
