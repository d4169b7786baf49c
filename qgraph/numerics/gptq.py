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
    rows = transposed(weight, dtype)
    hessian, dead = _alive(hessian)
    sequence = np.argsort(-hessian.diagonal(), kind="stable") if order == "activation" else np.arange(inputs)
    triangle = factorize(hessian[np.ix_(sequence, sequence)], damping, dtype)
    layer = _Layer(rows[sequence], sequence, triangle, Rounder(scheme, rows.shape, dtype), block)
    second = dataclasses.replace(layer, rounder=Rounder(scheme, rows.shape, dtype)) if clip == "mse" else None
    if order == "none" and scheme.format not in _WHOLE_TENSOR:
        layer.round_by_groups("minmax", hessian.diagonal())
        if second is not None:
            second.round_by_groups("mse", hessian.diagonal())
    else:
        targets = layer.round(_parameters(rows, scheme, "minmax"))
        if second is not None:
            second.round(_parameters(targets, scheme, "mse"))
    if second is not None:
        layer.keep_better(second)
    error = np.empty_like(layer.error)
    error[sequence] = layer.error
    cost = float(layer.cost.sum())
    added = triangle.damping * float(np.mean(hessian.diagonal()))
    if refine:
        damped: np.ndarray = hessian.astype(dtype)
        damped[np.diag_indices(inputs)] += dtype(added)
        cost -= refine_groups(layer.rounder, rows, error, damped, refine)
    squares = np.einsum("ij,ij->i", error, error, dtype=np.float64)
    undamped = cost - float(squares @ (added + np.where(dead, hessian.diagonal(), 0.0)))
    return GptqResult(
        layer.rounder.result(), max(undamped, 0.0), triangle.damping, triangle.retries, int(np.count_nonzero(dead))
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
        if zero_point is not None:
            zero_point[part] = zeros

    each(compute, range(0, outputs, _OUTPUTS))
    return scale, zero_point


@dataclasses.dataclass
class _Layer:
    """A weight matrix [K, N] in the order in which its inputs are rounded, and what is known of its errors."""

    rows: np.ndarray
    sequence: np.ndarray
    triangle: Triangle
    rounder: Rounder
    block: int
    error: np.ndarray = dataclasses.field(init=False)
    cost: np.ndarray = dataclasses.field(init=False)

    def round(self, parameters: tuple[np.ndarray, np.ndarray | None]) -> np.ndarray:
        """Round with given parameters; return the targets [K, N] that were rounded, in their own order."""
        self.rounder.put(slice(None), *parameters)
        work = self._visited()
        result = np.empty_like(work)
        result[self.sequence] = work
        return result

    def keep_better(self, other: _Layer) -> None:
        """Take over another rounding of the same matrix for the outputs whose error it makes smaller."""
        better = other.cost < self.cost
        self.rounder.keep(other.rounder, better)
        np.copyto(self.error, other.error, where=better)
        np.copyto(self.cost, other.cost, where=better)

    def round_by_groups(self, clip: Method, diagonal: np.ndarray) -> None:
        """Round in the inputs' own order; a group's parameters come from its weights as they are when it is reached."""
        importance = np.maximum(diagonal, _LEAST_IMPORTANCE * diagonal.mean()) if clip == "mse" else None
        scheme, size = self.rounder.grid.scheme, self.rounder.group

        def begin(start: int, stop: int, weights: np.ndarray) -> None:
            group = start // size
            part = None if importance is None else importance[start:stop]
            self.rounder.put(
                slice(group, group + 1), *group_parameters(weights.T, scheme, method=clip, importance=part)
            )

        self._visited(begin)

    def _visited(self, begin: Begin | None = None) -> np.ndarray:
        work = self.rows.copy()
        self.error = np.empty_like(work)

        def choose(index: int, target: np.ndarray, error: np.ndarray) -> None:
            np.subtract(self.rows[index], self.rounder.round(int(self.sequence[index]), target), out=error)

        span = self.rounder.group if begin is not None else 0
        visit(work, self.triangle.lower, self.error, choose, block=self.block, begin=begin, span=span)
        pivots = self.triangle.pivots.astype(work.dtype)
        self.cost = np.zeros(work.shape[1])
        for start in range(0, len(work), BLOCK):
            part = slice(start, start + BLOCK)
            missed = work[part] - self.rows[part]
            missed += self.error[part]
            self.cost += pivots[part] @ np.square(missed, out=missed)
        return work
