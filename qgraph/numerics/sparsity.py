"""Which weights to set to zero, and how the others make up for them.

Patterns: "2:4" (any n:m) keeps n of every m neighbouring inputs of each output; "unstructured" a share of the whole
matrix; "block" a share of its tiles. Scores tell which weights matter:

    magnitude    |w|
    wanda        |w| * sqrt(H_kk): the weight times the size of its input (Sun et al. 2023, "Wanda"); compared within
                 each output
    sparsegpt    p_k * t_k^2: what leaving input k out costs once those before it are decided and those behind make up
                 for it (Frantar and Alistarh 2023, "SparseGPT", section 3.2)

`sparse_gptq` is the loop of GPTQ (`column_loop`) with another choice of what to do with an input: leave it out, or keep
it. The published loop leaves a weight that it keeps where it then is; here the weights that stay are fitted once more,
all together, which lowers the error further without touching the mask. With a scheme they are then rounded by the same
loop, towards the fitted weights (their error against the original splits into that of the fit and that of rounding),
and decided again group by group (`refinement`), where zeros stay zeros.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

import numpy as np

from qgraph.numerics.column_loop import BLOCK, transposed, visit
from qgraph.numerics.hessian import Triangle, factorize
from qgraph.numerics.products import product, steady
from qgraph.numerics.refinement import refine as refine_groups
from qgraph.numerics.rounding import Rounder
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, group_parameters

__all__ = ["Pattern", "SparseResult", "follows", "mask_of", "parse_pattern", "sparse_gptq"]

_NEIGHBOURS = re.compile(r"(\d+):(\d+)")
_FITS = 24
_ROUNDS = 4
_ENOUGH = 1e-4


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Where zeros may stand.

    Attributes:
        kind: see the module.
        kept: of every `of` neighbouring inputs, for "neighbours".
        of: see `kept`.
        share: of the weights, or blocks, that become zero, for the others.
        block: outputs and inputs of a tile.
    """

    kind: Literal["neighbours", "unstructured", "block"]
    kept: int = 2
    of: int = 4
    share: float = 0.5
    block: tuple[int, int] = (4, 4)

    def __post_init__(self) -> None:
        if self.kind == "neighbours" and not 0 < self.kept < self.of <= 64:
            raise ValueError(f"{self.kept}:{self.of} keeps none or all: write n:m with 0 < n < m, m at most 64")
        if self.kind != "neighbours" and not 0.0 < self.share < 1.0:
            raise ValueError(f"the ratio {self.share:g} is not between 0 and 1: it is the share that becomes zero")

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return self.kept / self.of if self.kind == "neighbours" else 1.0 - self.share

    def fits(self, inputs: int) -> bool:
        """Tell whether a number of inputs can be cut into groups of neighbours, where the pattern has any."""
        return self.kind != "neighbours" or inputs % self.of == 0

    def __str__(self) -> str:
        if self.kind == "neighbours":
            return f"{self.kept}:{self.of}"
        tile = "x".join(map(str, self.block))
        return f"{self.kind} {100 * self.share:g} %" if self.kind == "unstructured" else f"blocks {tile}"


def parse_pattern(text: str, ratio: float) -> Pattern:
    """Read 2:4, n:m, unstructured or block, the last two with a share of zeros.

    Raises:
        ValueError: it is something else.
    """
    match = _NEIGHBOURS.fullmatch(text)
    if match is not None:
        return Pattern("neighbours", int(match[1]), int(match[2]))
    if text == "unstructured":
        return Pattern("unstructured", share=ratio)
    if text == "block":
        return Pattern("block", share=ratio)
    raise ValueError(f"there is no pattern '{text}': write 2:4 (or another n:m), unstructured or block")


def mask_of(scores: np.ndarray, pattern: Pattern, *, by_output: bool = False) -> np.ndarray:
    """Return which weights stay: those of the largest scores; of equal ones, the first.

    Args:
        scores: float [N, K].
        pattern: the last, shorter group of neighbours keeps its share, rounded up.
        by_output: compare within each output only ("unstructured").

    Returns:
        bool [N, K].
    """
    if pattern.kind == "neighbours":
        return _neighbours(scores, pattern.kept, pattern.of)
    if pattern.kind == "block":
        return _blocks(scores, pattern)
    rows = scores if by_output else scores.reshape(1, -1)
    stay = rows.shape[1] - int(pattern.share * rows.shape[1])
    return _largest(rows, stay).reshape(scores.shape)


def _largest(rows: np.ndarray, count: int) -> np.ndarray:
    """Return bool in the shape of `rows` for the `count` largest of each row."""
    order = np.argsort(-rows, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(rows.shape, bool)
    np.put_along_axis(mask, order, values=True, axis=-1)
    return mask


def _neighbours(scores: np.ndarray, kept: int, of: int) -> np.ndarray:
    outputs, inputs = scores.shape
    whole = inputs // of * of
    mask = np.empty(scores.shape, bool)
    mask[:, :whole] = _largest(scores[:, :whole].reshape(outputs, -1, of), kept).reshape(outputs, whole)
    if whole < inputs:
        rest = inputs - whole
        mask[:, whole:] = _largest(scores[:, whole:], -(-rest * kept // of))
    return mask


def _blocks(scores: np.ndarray, pattern: Pattern) -> np.ndarray:
    height, width = pattern.block
    outputs, inputs = scores.shape
    padded = np.zeros((-(-outputs // height) * height, -(-inputs // width) * width))
    padded[:outputs, :inputs] = scores
    tiles = padded.reshape(padded.shape[0] // height, height, -1, width).sum(axis=(1, 3))
    stay = tiles.size - int(pattern.share * tiles.size)
    chosen = _largest(tiles.reshape(1, -1), stay).reshape(tiles.shape)
    return np.repeat(np.repeat(chosen, height, 0), width, 1)[:outputs, :inputs]


def follows(weight: np.ndarray, pattern: Pattern) -> bool:
    """Tell whether a matrix [N, K] has the zeros of an n:m pattern, or at least the share of zeros of another."""
    zeros = weight == 0
    if pattern.kind != "neighbours":
        return bool(zeros.mean() >= pattern.share - 0.01)
    outputs, inputs = weight.shape
    whole = inputs // pattern.of * pattern.of
    groups = (~zeros[:, :whole]).reshape(outputs, -1, pattern.of).sum(axis=2)
    rest = (~zeros[:, whole:]).sum(axis=1)
    return bool((groups <= pattern.kept).all() and (rest <= -(-(inputs - whole) * pattern.kept // pattern.of)).all())


@dataclasses.dataclass(frozen=True)
class SparseResult:
    """A matrix with zeros.

    Attributes:
        weight: float32 [N, K].
        mask: bool [N, K]: what stays.
        quantized: the same rounded, where a scheme was given; `weight` is what it stands for.
    """

    weight: np.ndarray
    mask: np.ndarray
    quantized: QuantizedWeight | None = None


@steady()
def sparse_gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    pattern: Pattern,
    *,
    scheme: WeightScheme | None = None,
    mask: np.ndarray | None = None,
    damping: float = 0.01,
    block: int = BLOCK,
    fits: int = _FITS,
    refine: int = _ROUNDS,
) -> SparseResult:
    """Set weights to zero, one input after another, while those still to come make up for it.

    Args:
        weight: float [N, K].
        hessian: [K, K], as `Hessian.matrix`.
        pattern: of the zeros; tiles are chosen before, by wanda's scores.
        scheme: round what stays to it.
        mask: bool [N, K] of what stays, chosen before; the pattern then only says what it is.
        damping: share of the mean diagonal that is added to the diagonal.
        block: inputs whose zeros are chosen together where the pattern is unstructured, and in one matrix product.
        fits: steps of the last fit of the weights that stay (conjugate gradients); 0 is the published loop.
        refine: rounds of deciding every group of rounded weights again.

    Raises:
        ValueError: the Hessian does not fit, is not finite, or is far from positive semidefinite.
    """
    outputs, inputs = weight.shape
    if hessian.shape != (inputs, inputs) or not np.isfinite(hessian).all():
        raise ValueError(f"a Hessian of shape {hessian.shape} that is finite is needed, [{inputs}, {inputs}]")
    dead = hessian.diagonal() <= 0
    hessian = _alive(hessian, dead)
    triangle = factorize(hessian, damping)
    added = triangle.damping * float(np.mean(hessian.diagonal()))
    if mask is None and pattern.kind == "block":
        mask = mask_of(np.abs(weight) * np.sqrt(hessian.diagonal()), pattern)
    stays = np.ones((inputs, outputs), bool) if mask is None else np.ascontiguousarray(mask.T)
    rows = transposed(weight, np.float32)
    found = np.empty_like(rows)

    def begin(start: int, stop: int, wanted: np.ndarray) -> None:
        scores = np.square(wanted) * triangle.pivots[start:stop, None].astype(np.float32)
        scores[dead[start:stop]] = -1.0
        stays[start:stop] = mask_of(scores.T, pattern).T

    def choose(index: int, target: np.ndarray, missed: np.ndarray) -> None:
        np.multiply(target, stays[index], out=found[index])
        np.subtract(rows[index], found[index], out=missed)

    span = (pattern.of if pattern.kind == "neighbours" else block) if mask is None else 0
    visit(
        rows.copy(), triangle.lower, np.zeros_like(rows), choose, block=block, begin=begin if span else None, span=span
    )
    kept = np.ascontiguousarray(stays.T)
    fitted = _fitted(weight, np.ascontiguousarray(found.T), kept, hessian, added, fits)
    if scheme is None:
        return SparseResult(fitted, kept)
    quantized = _rounded(fitted, stays, hessian + added * np.eye(inputs), triangle, scheme, block, refine)
    return SparseResult(quantized.dequantize(), kept, quantized)


def _rounded(
    weight: np.ndarray,
    stays: np.ndarray,
    hessian: np.ndarray,
    triangle: Triangle,
    scheme: WeightScheme,
    block: int,
    rounds: int,
) -> QuantizedWeight:
    """Round the weights that stay, bool [K, N], towards `weight` [N, K]."""
    rows = transposed(weight, np.float32)
    rounder = Rounder(scheme, rows.shape, np.float32)
    rounder.put(slice(None), *group_parameters(weight, scheme, method="mse"))

    def choose(index: int, target: np.ndarray, missed: np.ndarray) -> None:
        np.subtract(rows[index], rounder.round(index, target * stays[index]), out=missed)

    error = np.zeros_like(rows)
    visit(rows.copy(), triangle.lower, error, choose, block=block)
    if rounds:
        rounder.put_error(rows, error)
        refine_groups(rounder, rows, error, hessian.astype(np.float32), rounds, stays)
    return rounder.result()


def _alive(hessian: np.ndarray, dead: np.ndarray) -> np.ndarray:
    """Return the Hessian with a diagonal free of zeros."""
    if not dead.any():
        return hessian
    mended = np.array(hessian)
    mended[dead] = 0
    mended[:, dead] = 0
    mended[dead, dead] = 1e-6 if dead.all() else 1e-6 * np.mean(hessian.diagonal()[~dead])
    return mended


def _fitted(
    weight: np.ndarray, start: np.ndarray, mask: np.ndarray, hessian: np.ndarray, added: float, steps: int
) -> np.ndarray:
    """Return the weights that stay at the least of tr((W - Q) H (W - Q)^T), every output by conjugate gradients.

    Preconditioned by the diagonal; an output's error never rises. What a step gains less than a ten-thousandth of the
    error is not worth the next.
    """
    moment = hessian.astype(np.float32)
    moment[np.diag_indices(len(moment))] += np.float32(added)
    scale = 1.0 / moment.diagonal()
    found = np.where(mask, start, 0).astype(np.float32)
    residual = np.where(mask, product(weight.astype(np.float32) - found, moment), 0)
    direction = residual * scale
    energy = np.einsum("nk,nk->n", residual, direction, dtype=np.float64)
    first = energy.copy()
    for _ in range(steps):
        if not (energy > _ENOUGH * np.maximum(first, 1e-300)).any():
            break
        image = product(direction, moment)
        curvature = np.einsum("nk,nk->n", direction, image, dtype=np.float64)
        length = np.where(curvature > 0, energy / np.maximum(curvature, 1e-300), 0.0).astype(np.float32)
        found += length[:, None] * direction
        residual -= length[:, None] * np.where(mask, image, 0)
        step = residual * scale
        following = np.einsum("nk,nk->n", residual, step, dtype=np.float64)
        ratio = np.where(energy > 0, following / np.maximum(energy, 1e-300), 0.0).astype(np.float32)
        direction = step + ratio[:, None] * direction
        energy = following
    return found
