"""Real arrays to integers and back, exactly as ONNX QuantizeLinear and DequantizeLinear compute.

    integer = saturate(round_half_even(real / scale) + zero_point)        in float32
    real    = (integer - zero_point) * scale
    float8  = saturate(nearest float8, half to even, of real / scale)

Source: the ONNX operator specification, QuantizeLinear-23 and DequantizeLinear-23. Scales are positive normal float32
numbers; zero is always represented exactly; a block of zeros gets scale 1. NaN and infinite elements are refused.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from qgraph.numerics.schemes import Scheme

__all__ = [
    "Parameters",
    "Quantized",
    "dequantize",
    "minmax_parameters",
    "mse_parameters",
    "quantize",
    "quantize_bias",
    "scale_and_zero_point",
    "weight_scale_for_bias",
]

BIAS_LIMIT = 1 << 30
"""Largest magnitude of an int32 bias: kernels add products to it in int32, which needs room."""

_TINY = float(np.finfo(np.float32).tiny)
_CHUNK = 1 << 15
_LOWEST_CLIP = 0.1
_FREE_BIAS_STEP = 2.0**-23
_MOST_RAISED = 16
"""By how much the largest scale of a float8 tensor may be raised: its own largest numbers then still are normal."""


class Parameters(NamedTuple):
    """Scale (float32) and zero point (the scheme's dtype) of every block, laid out by `Scheme.scale_shape`."""

    scale: np.ndarray
    zero_point: np.ndarray


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Integers in the shape of the array they stand for, with scales and zero points in `Scheme.scale_shape`."""

    values: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    scheme: Scheme


def scale_and_zero_point(low: ArrayLike, high: ArrayLike, scheme: Scheme) -> Parameters:
    """Return scale and zero point that let `scheme` represent low..high (widened to hold zero), elementwise.

    Symmetric schemes get the smallest scale at which neither end saturates. An empty range (zero to zero) gets scale
    1; a range so small that its scale would be denormal gets the least normal scale. Scales of floats are raised to
    the next that float16 holds, from its least normal number on: small floats lose nothing by a little more room.
    Where all of them are so much smaller that the tensor would be rounded away, they stay as they are.

    Args:
        low: real numbers of any shape.
        high: the same shape; not below `low`.
        scheme: its block shape does not matter here.

    Raises:
        ValueError: a bound is not finite, or `low` exceeds `high`.
    """
    lows, highs = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if not (np.isfinite(lows).all() and np.isfinite(highs).all()):
        raise ValueError(f"the range {lows} to {highs} is not finite")
    if (lows > highs).any():
        raise ValueError(f"the range {lows} to {highs} is empty")
    lows, highs = np.minimum(lows, 0.0), np.maximum(highs, 0.0)
    if scheme.symmetric:
        exact = np.maximum(lows / (scheme.qmin - scheme.centre), highs / (scheme.qmax - scheme.centre))
    else:
        exact = (highs - lows) / (scheme.qmax - scheme.qmin)
    scale = np.where(exact == 0.0, 1.0, np.maximum(exact, _TINY)).astype(np.float32)
    if scheme.is_float:
        scale = _held_by_float16(scale)
    if scheme.symmetric:
        zero_point = np.full(scale.shape, scheme.centre)
    else:
        zero_point = np.clip(np.rint(scheme.qmin - lows / scale.astype(np.float64)), scheme.qmin, scheme.qmax)
    return Parameters(scale, zero_point.astype(scheme.dtype))


def _held_by_float16(scale: np.ndarray) -> np.ndarray:
    """Return scales raised to numbers of float16; those beyond its largest stay, and such as it would all destroy."""
    limits = np.finfo(np.float16)
    if scale.max(initial=0.0) * _MOST_RAISED < limits.tiny:
        return scale
    near = np.clip(scale, limits.tiny, limits.max).astype(np.float16)
    with np.errstate(over="ignore"):  # behind the largest is infinity, which is not taken
        above = np.where(near < np.minimum(scale, limits.max), np.nextafter(near, np.float16(np.inf)), near)
    return np.where(scale > limits.max, scale, above.astype(np.float32)).astype(np.float32)


def minmax_parameters(array: np.ndarray, scheme: Scheme) -> Parameters:
    """Return scale and zero point of every block from its least and largest element.

    Args:
        array: real numbers of any shape that suits `scheme.block_shape`; not empty.
        scheme: the integer format and the blocks.

    Raises:
        ValueError: an element is NaN or infinite in float32 (the message gives its index), the array is empty, or the
            block shape does not fit.
    """
    low, high = _block_ranges(_checked(array), scheme)
    return scale_and_zero_point(low, high, scheme)


def mse_parameters(array: np.ndarray, scheme: Scheme) -> Parameters:
    """Return scale and zero point of every block that give the least squared error, by shrinking its range.

    Both ends shrink by the same factor, tried from 1 down to 0.1 in steps of 0.05 and then in steps of 0.01 around the
    best. Errors are summed in float64; of equal ones the wider range wins. Needs one copy of the array.

    Args:
        array: as for `minmax_parameters`.
        scheme: the integer format and the blocks.

    Raises:
        ValueError: as `minmax_parameters`.
    """
    checked = _checked(array)
    low, high = (bound.astype(np.float64) for bound in _block_ranges(checked, scheme))
    rows = _as_rows(checked, scheme)
    flat_low, flat_high = low.reshape(-1), high.reshape(-1)
    coarse = np.linspace(1.0, _LOWEST_CLIP, 19)
    best = _best_factor(rows, flat_low, flat_high, scheme, np.broadcast_to(coarse[:, None], (19, len(rows))))
    fine = np.clip(best + np.linspace(0.04, -0.04, 9)[:, None], _LOWEST_CLIP, 1.0)
    best = _best_factor(rows, flat_low, flat_high, scheme, fine).reshape(low.shape)
    return scale_and_zero_point(low * best, high * best, scheme)


def quantize(array: np.ndarray, scheme: Scheme, parameters: Parameters | None = None) -> Quantized:
    """Quantize a real array.

    Args:
        array: real numbers of any shape that suits `scheme.block_shape`.
        scheme: the integer format and the blocks.
        parameters: scale and zero point, laid out by `scheme.scale_shape`; from the blocks' ranges when None.

    Raises:
        ValueError: an element is NaN or infinite in float32 (the message gives its index), the array is empty, or
            parameters or block shape do not fit.
    """
    checked = _checked(array)
    scale, zero_point = minmax_parameters(checked, scheme) if parameters is None else parameters
    if np.shape(scale) != scheme.scale_shape(checked.shape) or np.shape(zero_point) != np.shape(scale):
        raise ValueError(
            f"scales of shape {np.shape(scale)} and zero points of shape {np.shape(zero_point)} do not fit an array of "
            f"shape {checked.shape}, which needs {scheme.scale_shape(checked.shape)}"
        )
    with np.errstate(over="ignore"):
        work = np.asarray(checked / _spread(np.asarray(scale, np.float32), scheme, checked.shape))
    work = scheme.rounded(work)
    work += _spread(zero_point, scheme, checked.shape).astype(np.float32)
    np.clip(work, scheme.qmin, scheme.qmax, out=work)
    return Quantized(work.astype(scheme.dtype), np.asarray(scale, np.float32), np.asarray(zero_point), scheme)


def dequantize(quantized: Quantized) -> np.ndarray:
    """Return the real numbers (float32) that the integers stand for."""
    values, scheme = quantized.values, quantized.scheme
    work = values.astype(np.float32)
    work -= _spread(quantized.zero_point, scheme, values.shape).astype(np.float32)
    work *= _spread(quantized.scale, scheme, values.shape)
    return work


def weight_scale_for_bias(
    weight_scale: np.ndarray, input_scale: float, bias: np.ndarray, free: np.ndarray | None = None
) -> np.ndarray:
    """Return weight scales raised, where they must be, until the bias fits into int32 at input_scale * weight_scale.

    A channel whose weights are all but zero has a scale so small that its bias would overflow. Such a channel loses
    nothing by a coarser weight scale. The bound leaves half of int32 to the sum of products. Call this before the
    weight is quantized.

    A channel whose weights are zero has scale 1, at which its bias would be rounded to multiples of `input_scale`.
    Name such channels in `free`: they get the scale that keeps their bias to 24 bits.

    Args:
        weight_scale: float32, () or (channels,).
        input_scale: of the activation that the weight is multiplied with.
        bias: real numbers, (channels,).
        free: bool, in the shape of `weight_scale`; none are free when None.

    Returns:
        float32 in the shape of `weight_scale`.

    Raises:
        ValueError: a scale is not positive and finite, or a bias is not finite.
    """
    _require_scales(weight_scale, input_scale)
    largest = np.abs(_checked(bias).astype(np.float64))
    if weight_scale.ndim == 0:
        largest = largest.max(initial=0.0)
    if free is not None:
        fine = np.maximum(largest * _FREE_BIAS_STEP / float(input_scale), _TINY)
        weight_scale = np.where(free & (largest > 0.0), fine, weight_scale).astype(np.float32)
    needed = np.maximum(largest / BIAS_LIMIT, _TINY) / float(input_scale)
    with np.errstate(over="ignore"):
        raised = np.nextafter(needed.astype(np.float32), np.float32(np.inf), dtype=np.float32)
    if not np.isfinite(raised).all():
        raise ValueError(f"no weight scale makes a bias of {np.max(largest)} fit at input scale {input_scale}")
    return np.where(needed > weight_scale, raised, weight_scale).astype(np.float32)


def quantize_bias(bias: np.ndarray, input_scale: float, weight_scale: np.ndarray) -> Quantized:
    """Quantize a bias to int32 at scale input_scale * weight_scale, zero point 0, one scale a channel.

    Args:
        bias: real numbers, (channels,).
        input_scale: of the activation.
        weight_scale: float32, () or (channels,), as `weight_scale_for_bias` returns it.

    Returns:
        int32 values and float32 scales; the scale is () for a weight scale of ().

    Raises:
        ValueError: a scale is not positive and finite, or a bias does not fit: `weight_scale_for_bias` makes it fit.
    """
    _require_scales(weight_scale, input_scale)
    with np.errstate(over="ignore"):
        scale = np.asarray(np.float32(input_scale) * np.asarray(weight_scale, np.float32))
    if (scale < _TINY).any() or not np.isfinite(scale).all():
        raise ValueError(f"the bias's scale {scale.min()} is out of the range of float32")
    with np.errstate(over="ignore"):
        values = np.rint(_checked(bias) / scale).astype(np.float64)
    if (np.abs(values) > BIAS_LIMIT * (1 + 1e-6)).any():
        worst = int(np.argmax(np.abs(values)))
        raise ValueError(f"bias {worst} ({bias[worst]}) does not fit into int32 at its scale")
    scheme = Scheme().per_channel(1, 0) if scale.ndim else Scheme()
    return Quantized(values.astype(np.int32), scale, np.zeros(scale.shape, np.int32), scheme)


def _require_scales(weight_scale: np.ndarray, input_scale: float) -> None:
    scales = np.append(np.ravel(weight_scale), input_scale)
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise ValueError(f"scales must be positive and finite: input {input_scale}, weight {weight_scale}")


def _checked(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        real = np.asarray(array).astype(np.float32, copy=False)
    finite = np.isfinite(real)
    if not finite.all():
        index = tuple(int(entry) for entry in np.argwhere(~finite)[0])
        raise ValueError(f"element {index} is {np.asarray(array)[index]}, which no integer can stand for")
    return real


def _block_ranges(array: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Return least and largest element of every block, laid out by `Scheme.scale_shape`."""
    if array.size == 0:
        raise ValueError(f"an array of shape {array.shape} has no range")
    shape = scheme.scale_shape(array.shape)
    return (
        _reduce_blocks(np.minimum, array, scheme).reshape(shape),
        _reduce_blocks(np.maximum, array, scheme).reshape(shape),
    )


def _reduce_blocks(function: np.ufunc, array: np.ndarray, scheme: Scheme) -> np.ndarray:
    grid = scheme.grid(array.shape)
    whole = tuple(axis for axis, count in enumerate(grid) if count == 1)
    result = function.reduce(array, axis=whole, keepdims=True) if whole else array
    for axis, count in enumerate(grid):
        if 1 < count < array.shape[axis]:
            result = function.reduceat(result, np.arange(count) * scheme.block_shape[axis], axis=axis)
    return np.asarray(result)


def _spread(entries: np.ndarray, scheme: Scheme, shape: tuple[int, ...]) -> np.ndarray:
    """Return scales or zero points in a shape that broadcasts against an array of `shape`."""
    grid = scheme.grid(shape)
    result = np.asarray(entries).reshape(grid)
    for axis, count in enumerate(grid):
        if 1 < count < shape[axis]:
            result = np.repeat(result, scheme.block_shape[axis], axis=axis)
            result = np.take(result, np.arange(shape[axis]), axis=axis)
    return result


def _as_rows(array: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Return the blocks as rows, [blocks, elements]; ragged ones are filled with zeros, which quantize exactly."""
    grid = scheme.grid(array.shape)
    sizes = [
        size if count == 1 else scheme.block_shape[axis]
        for axis, (size, count) in enumerate(zip(array.shape, grid, strict=True))
    ]
    padding = [(0, count * size - given) for count, size, given in zip(grid, sizes, array.shape, strict=True)]
    if any(after for _, after in padding):
        array = np.pad(array, padding)
    split = array.reshape([part for pair in zip(grid, sizes, strict=True) for part in pair])
    order = [*range(0, 2 * len(grid), 2), *range(1, 2 * len(grid), 2)]
    return np.ascontiguousarray(split.transpose(order)).reshape(int(np.prod(grid)), -1)


def _best_factor(
    rows: np.ndarray, low: np.ndarray, high: np.ndarray, scheme: Scheme, factors: np.ndarray
) -> np.ndarray:
    """Return for each row the first of its `factors` [candidates, rows] that gives the least squared error."""
    errors = np.zeros(factors.shape)
    width = min(rows.shape[1], _CHUNK)
    height = max(1, _CHUNK // width)
    candidates = [scale_and_zero_point(low * factor, high * factor, scheme) for factor in factors]
    for top in range(0, len(rows), height):
        part = slice(top, top + height)
        for left in range(0, rows.shape[1], width):
            block = rows[part, left : left + width]
            for number, (scale, zero_point) in enumerate(candidates):
                errors[number, part] += _squared_error(block, scale[part], zero_point[part], scheme)
    best = np.argmin(errors, axis=0)
    return np.asarray(np.take_along_axis(factors, best[None], axis=0)[0])


def _squared_error(rows: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, scheme: Scheme) -> np.ndarray:
    zero = zero_point.astype(np.float32)[:, None]
    with np.errstate(over="ignore"):
        work = rows / scale[:, None]
    work = scheme.rounded(work)
    np.clip(work, scheme.qmin - zero, scheme.qmax - zero, out=work)
    work *= scale[:, None]
    work -= rows
    wide = work.astype(np.float64)
    return np.asarray(np.einsum("ij,ij->i", wide, wide))
