"""GPTQ: round a layer's weights one input after another, while those still to come make up for the error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers". With the
inputs' second moments H, rounding input j by e_j = w_j - q_j moves the best target of input k to
w_k + sum_j<k U[j, k] e_j, where H = U diag(p) U^T with U unit upper triangular. That is the published update without
an inverse (Chee et al. 2023, QuIP, theorem 6): one factorization in place of two and an inversion. The output error
comes out beside it, as sum_k p_k (target_k - q_k)^2.

Order "none" takes the inputs as they come, and each group's scale from its weights as they are when it is reached, as
published. Order "activation" takes the inputs of largest H_kk first, with every group's scale fixed before ("static
groups"), so that the groups need no index.

Weights move far from where they were, and a range that suits the weights need not suit what they become. A search of
ranges is therefore a second visit: with static groups it runs on the targets that the first visit, with full ranges,
has met. Each output keeps the better of its two roundings.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from qgraph.numerics.column_loop import BLOCK, Begin, transposed, visit
from qgraph.numerics.hessian import Hessian, Triangle, factorize, output_error
from qgraph.numerics.products import each, steady
from qgraph.numerics.refinement import refine as refine_groups
from qgraph.numerics.rounding import Rounder
from qgraph.numerics.weights import Method, QuantizedWeight, WeightScheme, group_parameters

__all__ = ["GptqResult", "Hessian", "Order", "gptq", "output_error"]

Order = Literal["none", "activation"]

_LEAST_IMPORTANCE = 1e-3
_OUTPUTS = 512
"""Outputs whose parameters are searched by one thread."""
_WHOLE_TENSOR = ("nvfp4",)
"""Formats whose scales depend on all of the matrix: they cannot be taken group by group."""


@dataclasses.dataclass(frozen=True)
class GptqResult:
    """A rounded layer.

    Attributes:
        quantized: codes, scales and zero points.
        error: tr(E H E^T) of what was lost, the layer's squared output error over the Hessian's samples.
        damping: share of the mean diagonal that was added to the Hessian's diagonal.
        retries: how often the damping had to be raised tenfold.
        dead: inputs that were zero in all samples; they are rounded to nearest.
    """

    quantized: QuantizedWeight
    error: float
    damping: float
    retries: int
    dead: int


@steady()
def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    scheme: WeightScheme,
    *,
    damping: float = 0.01,
    block: int = BLOCK,
    order: Order = "activation",
    clip: Method = "mse",
    refine: int = 1,
) -> GptqResult:
    """Round a weight matrix so that the layer's outputs change least.

    Args:
        weight: [N, K]; worked on in float64 if it is float64, else in float32.
        hessian: [K, K], as `Hessian.matrix`.
        scheme: format, bits and groups; the last group may be shorter.
        damping: share of the mean diagonal that is added to the diagonal; raised tenfold while H does not factorize.
        block: inputs that take in earlier errors in one matrix product; matters for speed only, but for rounding.
        order: see the module.
        clip: "minmax" takes full ranges; "mse" also tries those of least squared error, in a second visit.
        refine: passes that decide every group again, scale included (see `refinement`); 0 is plain GPTQ.

    Raises:
        ValueError: shapes do not fit, a weight or an element of the Hessian is not finite, the Hessian is far from
            positive semidefinite, or an option is unknown.
    """
    inputs = _checked(weight, hessian, order)
    dtype = np.float64 if weight.dtype == np.float64 else np.float32
    hessian, dead = _alive(hessian)
    sequence = np.argsort(-hessian.diagonal(), kind="stable") if order == "activation" else np.arange(inputs)
    triangle = factorize(hessian[np.ix_(sequence, sequence)], damping, dtype)
    layer = _Layer(transposed(weight, dtype), sequence, triangle, scheme, block)
    if order == "none" and scheme.format not in _WHOLE_TENSOR:
        rounder, cost = layer.round_by_groups(clip, hessian.diagonal())
    else:
        rounder, cost = layer.round_with_static_groups(clip)
    total = float(cost.sum())
    error = layer.scratch
    rounder.put_error(layer.rows, error)
    added = triangle.damping * float(np.mean(hessian.diagonal()))
    if refine:
        damped: np.ndarray = hessian.astype(dtype)
        damped[np.diag_indices(inputs)] += dtype(added)
        total -= refine_groups(rounder, layer.rows, error, damped, refine)
    squares = np.einsum("ij,ij->i", error, error, dtype=np.float64)
    undamped = total - float(squares @ (added + np.where(dead, hessian.diagonal(), 0.0)))
    return GptqResult(
        rounder.result(), max(undamped, 0.0), triangle.damping, triangle.retries, int(np.count_nonzero(dead))
    )


def _checked(weight: np.ndarray, hessian: np.ndarray, order: Order) -> int:
    if weight.ndim != 2 or hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(f"a Hessian of shape {hessian.shape} does not fit a weight of shape {weight.shape}")
    if not np.isfinite(hessian).all():
        raise ValueError("the Hessian has an element that is not finite")
    if (hessian.diagonal() < 0).any():
        raise ValueError("the Hessian has a negative diagonal element, which no second moment is")
    if order not in ("none", "activation"):
        raise ValueError(f"the order is 'none' or 'activation', not {order!r}")
    return int(weight.shape[1])


def _alive(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Hessian with a diagonal free of zeros, and which inputs had one: bool [K].

    An input that was always zero is tied to no other; a mean diagonal has it rounded to nearest at little cost to
    the scale of its group.
    """
    dead = hessian.diagonal() == 0
    if not dead.any():
        return hessian, dead
    mended = np.array(hessian)
    mended[dead] = 0
    mended[:, dead] = 0
    mended[dead, dead] = 1.0 if dead.all() else np.mean(hessian.diagonal()[~dead])
    return mended, dead


def _parameters(rows: np.ndarray, scheme: WeightScheme, method: Method) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what `group_parameters` does for a matrix [K, N]; outputs are looked at in parallel."""
    if scheme.format in _WHOLE_TENSOR:
        return group_parameters(rows.T, scheme, method=method)
    inputs, outputs = rows.shape
    scale = np.empty((outputs, scheme.groups(inputs)), np.float32)
    zero_point = np.empty(scale.shape, np.uint8) if scheme.is_integer else None

    def compute(start: int) -> None:
        part = slice(start, start + _OUTPUTS)
        scale[part], zeros = group_parameters(rows[:, part].T, scheme, method=method)
        if zero_point is not None and zeros is not None:
            zero_point[part] = zeros

    each(compute, range(0, outputs, _OUTPUTS))
    return scale, zero_point


class _Layer:
    """A weight matrix [K, N], and the order in which its inputs are rounded.

    Arrays of its size are made once: on many systems the first touch of fresh memory costs as much as the arithmetic.
    """

    def __init__(
        self, rows: np.ndarray, sequence: np.ndarray, triangle: Triangle, scheme: WeightScheme, block: int
    ) -> None:
        self.rows = rows
        self.scratch = np.empty_like(rows)
        self._targets = np.empty_like(rows)
        self._sequence = sequence
        self._triangle = triangle
        self._scheme = scheme
        self._block = block

    def round_with_static_groups(self, clip: Method) -> tuple[Rounder, np.ndarray]:
        """Round with parameters that are fixed before; return the result and what each output costs, [N]."""
        first = self._rounder()
        first.put(slice(None), *_parameters(self.rows, self._scheme, "minmax"))
        cost = self._round(first)
        if clip == "minmax":
            return first, cost
        self.scratch[self._sequence] = self._targets
        second = self._rounder()
        second.put(slice(None), *_parameters(self.scratch, self._scheme, clip))
        return _better(first, cost, second, self._round(second))

    def round_by_groups(self, clip: Method, diagonal: np.ndarray) -> tuple[Rounder, np.ndarray]:
        """Round with parameters from each group's weights as they are when it is reached; return the same."""
        first = self._rounder()
        cost = self._round(first, self._fit_groups(first, "minmax", None))
        if clip == "minmax":
            return first, cost
        second = self._rounder()
        importance = np.maximum(diagonal, _LEAST_IMPORTANCE * diagonal.mean())
        return _better(first, cost, second, self._round(second, self._fit_groups(second, clip, importance)))

    def _rounder(self) -> Rounder:
        return Rounder(self._scheme, self.rows.shape, self.rows.dtype.type)

    def _fit_groups(self, rounder: Rounder, method: Method, importance: np.ndarray | None) -> Begin:
        def begin(start: int, stop: int, weights: np.ndarray) -> None:
            group = start // rounder.group
            part = None if importance is None else importance[start:stop]
            found = group_parameters(weights.T, self._scheme, method=method, importance=part)
            rounder.put(slice(group, group + 1), *found)

        return begin

    def _round(self, rounder: Rounder, begin: Begin | None = None) -> np.ndarray:
        """Round all inputs; return what each output costs, float64 [N]."""
        rows, targets, error, sequence = self.rows, self._targets, self.scratch, self._sequence
        np.take(rows, sequence, axis=0, out=targets, mode="clip")  # the default mode works on a copy

        def choose(index: int, target: np.ndarray, missed: np.ndarray) -> None:
            place = int(sequence[index])
            np.subtract(rows[place], rounder.round(place, target), out=missed)

        span = rounder.group if begin is not None else 0
        visit(targets, self._triangle.lower, error, choose, block=self._block, begin=begin, span=span)
        pivots = self._triangle.pivots.astype(rows.dtype)
        cost = np.zeros(rows.shape[1])
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            missed = targets[part] - rows[sequence[part]]
            missed += error[part]
            cost += pivots[part] @ np.square(missed, out=missed)
        return cost


def _better(
    first: Rounder, first_cost: np.ndarray, second: Rounder, second_cost: np.ndarray
) -> tuple[Rounder, np.ndarray]:
    """Return the better of two roundings for each output."""
    first.keep(second, second_cost < first_cost)
    return first, np.minimum(first_cost, second_cost)
