"""The integers that stand for tensors in `full-qdq`: who shares them, in how many bits, and over which range."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qgraph.numerics.quantize import scale_and_zero_point
from qgraph.numerics.schemes import Scheme

__all__ = ["Options", "Stand", "parameters", "scheme_of"]

_LEAST_SCALE = float(np.finfo(np.float32).tiny)
_WIDE_LIMIT = 32767


class Options(Protocol):
    """The options of `full-qdq`."""

    @property
    def activations(self) -> str: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def weights(self) -> str: ...
    @property
    def per_channel(self) -> bool: ...
    @property
    def scales(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def wide(self) -> str: ...
    @property
    def wide_weights(self) -> str: ...
    @property
    def sqnr(self) -> float: ...


@dataclasses.dataclass(eq=False)
class Stand:
    """The integers that stand for a group of tensors.

    Attributes:
        members: the tensors, which share scale and zero point.
        wide: int16 rather than 8 bits.
        layers_wide: linear layers read the 16 bits too, in two halves.
        low: the range that is represented.
        high: see `low`.
        fixed: the range is known by what makes the tensors, and not by calibration.
        headroom: how much further 16 bits reach than the range.
    """

    members: list[ir.Value] = dataclasses.field(default_factory=list)
    wide: bool = False
    layers_wide: bool = False
    low: float = 0.0
    high: float = 0.0
    fixed: bool = False
    headroom: float = 1.0


def scheme_of(options: Options) -> Scheme:
    """Return the scheme of 8-bit activations."""
    return Scheme(signed=options.activations == "int8", symmetric=options.symmetric)


def parameters(stand: Stand, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Return scale (float32) and zero point of a group, both scalars."""
    if stand.wide:
        reach = max(abs(stand.low), abs(stand.high)) * stand.headroom
        # What was zero throughout says nothing of its range; a huge one would drown what is added to it.
        scale = np.float32(max((reach or 1.0) / _WIDE_LIMIT, _LEAST_SCALE))
        return np.asarray(_rounded(scale, options)), np.asarray(0, np.int16)
    scheme = scheme_of(options)
    exact = scale_and_zero_point(stand.low, stand.high, scheme)
    if options.scales == "any":
        return exact
    scale = _rounded(np.float32(exact.scale), options)
    if options.symmetric:
        return np.asarray(scale), exact.zero_point
    middle = (scheme.qmin - min(stand.low, 0.0) / float(scale) + scheme.qmax - max(stand.high, 0.0) / float(scale)) / 2
    return np.asarray(scale), np.asarray(np.clip(np.rint(middle), scheme.qmin, scheme.qmax)).astype(scheme.dtype)


def _rounded(scale: np.float32, options: Options) -> np.float32:
    """Return the scale, or the next power of two that is not below it."""
    return scale if options.scales == "any" else np.float32(2.0 ** math.ceil(math.log2(float(scale))))
