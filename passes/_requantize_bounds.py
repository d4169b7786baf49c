"""Integers of weights at which no input whatsoever leads an accumulator beyond int32.

For each output the sum of |w| times the reach of the inputs, and the bias, are added up; where they could leave int32,
the weights of that output are halved until they cannot, and the pass names the layer.

A weight of 16 bits is cut into two of 8, with an accumulator each:

    w = 256 w1 + w2,    x w = 256 (x w1 + (x w2) / 256)

The quotient is rounded to a step of the first accumulator, which is finer than any result: sums of products with w1
lie far beyond the 16 bits that they are rounded to at last.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qgraph.passes._requantize_writer import LIMIT, Target, UnfitError, Writer, along

__all__ = ["SPLIT", "Rest", "bounded", "bounded_halves"]

SPLIT = 256
"""What the upper half of 16 bits is worth in units of the lower one."""
_BIAS_BITS = 24
_LEAST_INT8, _LARGEST_INT8 = -128, 127
_LARGEST_IN_HALVES = _LARGEST_INT8 * SPLIT + _LARGEST_INT8
_MOST_REST = 2
"""Units of the upper half that the rest of one weight stays below, however often the upper half was halved."""


@dataclasses.dataclass(frozen=True)
class Rest:
    """The lower half of a weight of 16 bits.

    Attributes:
        weight: int64, as the node lays it out; fits int8.
        scale: what one unit of its accumulator is worth, (outputs,).
    """

    weight: np.ndarray
    scale: np.ndarray


def bounded(
    writer: Writer,
    part: str,
    weight: np.ndarray,
    axis: int,
    bias: np.ndarray,
    scale: np.ndarray,
    source: Target,
    taken: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weight, bias (integers) and scale at which no input leads beyond int32.

    Args:
        writer: takes the remark if weights had to lose bits.
        part: what that remark calls the layer.
        weight: int64.
        axis: that of its outputs.
        bias: in units of the accumulator, () or (outputs,).
        scale: what one of these is worth, () or (outputs,).
        source: what the layer reads.
        taken: units of the accumulator to leave for something else.
    """
    others = tuple(one for one in range(weight.ndim) if one != axis % weight.ndim)
    reach = _reach(source)
    outputs = weight.shape[axis]
    scale = np.array(np.broadcast_to(scale, (outputs,)))
    real_bias = np.array(np.broadcast_to(bias * np.broadcast_to(scale, bias.shape or (outputs,)), (outputs,)))
    integers = weight
    halved = np.zeros(outputs, bool)
    scale = _fine_enough(scale, real_bias, np.abs(weight).sum(axis=others) == 0)
    while True:
        rounded = np.rint(real_bias / scale)
        bound = np.abs(integers).sum(axis=others) * float(reach) + np.abs(rounded)
        beyond = bound > LIMIT - taken
        if not beyond.any():
            break
        halved |= beyond
        scale = np.where(beyond, scale * 2, scale)
        integers = np.where(along(beyond, axis, weight.ndim), np.rint(integers / 2).astype(np.int64), integers)
    if halved.any():
        count = f"{int(halved.sum())} of {outputs} outputs"
        writer.remark(f"{part}: {count} could leave int32, so that their weights have fewer bits")
    return integers, rounded.astype(np.int64), scale


def bounded_halves(
    writer: Writer, part: str, weight: np.ndarray, axis: int, bias: np.ndarray, scale: np.ndarray, source: Target
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Rest]:
    """Return the upper half of a weight of 16 bits, bias and scale as `bounded` does, and the lower half.

    Raises:
        UnfitError: an output has so many weights that their rests alone could leave int32.
    """
    if np.abs(weight).max() > _LARGEST_IN_HALVES:
        weight, scale, bias = np.rint(weight / 2).astype(np.int64), scale * 2, bias / 2
    taps = weight.size // weight.shape[axis]
    taken = _MOST_REST * taps * _reach(source) + 1
    if taken > LIMIT // 2:
        raise UnfitError(f"each output has {taps} weights of 16 bits, too many for int32: use 8 bits")
    upper = (weight + SPLIT // 2) // SPLIT
    upper, rounded, step = bounded(writer, part, upper, axis, bias / SPLIT, scale * SPLIT, source, taken)
    scale = np.broadcast_to(scale, step.shape)
    rest = np.rint(weight - upper * along(step / scale, axis, weight.ndim)).astype(np.int64)
    others = tuple(one for one in range(weight.ndim) if one != axis % weight.ndim)
    highest, lowest = rest.max(axis=others), rest.min(axis=others)
    doublings = np.maximum(_doublings(highest, _LARGEST_INT8), _doublings(-lowest, -_LEAST_INT8))
    lower = np.rint(rest / along(np.exp2(doublings), axis, weight.ndim)).astype(np.int64)
    nothing = np.zeros(())
    lower, _, fine = bounded(writer, f"{part}, lower halves", lower, axis, nothing, scale * np.exp2(doublings), source)
    return upper, rounded, step, Rest(lower, fine)


def _doublings(largest: np.ndarray, limit: int) -> np.ndarray:
    """Return how often to double a step so that integers up to `largest` become some up to `limit`."""
    return np.asarray(np.ceil(np.log2(np.maximum(largest / limit, 1.0))))


def _reach(source: Target) -> int:
    """Return the largest distance from the zero point, for 16 bits that of what their halves add up to at most."""
    return source.reach + (SPLIT if source.dtype is ir.DataType.INT16 else 0)


def _fine_enough(scale: np.ndarray, bias: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Return scales at which no bias is lost where all weights are zero: their own scale says nothing then."""
    lost = empty & (np.rint(bias / scale) * scale != bias)
    exponents = np.ceil(np.log2(np.abs(bias), where=lost, out=np.zeros_like(bias)))
    return np.asarray(np.where(lost, np.exp2(exponents - _BIAS_BITS), scale))
