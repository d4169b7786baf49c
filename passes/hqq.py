"""Weights in 2 to 8 bits whose scales and zero points give up a few outliers for the many (HQQ).

    y = MatMul(x, W)    =>    y = MatMul(x, DequantizeLinear(Wq, scale, zero_point))        Gemm and Gather likewise

Half-quadratic quantization (Badri and Shaji 2023) makes the sum of |error|^p small, p = 0.7, without data; see
`qgraph.numerics.hqq` for what differs from the paper. Weights are rounded when the file is written, layer by layer.

It does not fire on weights that are computed, shared with a node that is no linear layer, compressed already, smaller
than `min_elements`, or that `exclude` names; see `qgraph.analysis.linear_layers`. A second run finds nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qgraph.numerics.hqq import hqq
from qgraph.numerics.weights import QuantizedWeight, WeightScheme
from qgraph.passes._weight_rounding import WeightRounding

__all__ = ["Hqq"]


@dataclass(frozen=True)
class Hqq(WeightRounding):
    """Round weights with scales and zero points fitted to a norm that forgives outliers (HQQ)."""

    name: ClassVar[str] = "hqq"
    norm: float = field(default=0.7, metadata={"help": "the p of the norm |error|^p, above 0 and at most 1"})
    iterations: int = field(default=20, metadata={"help": "most steps of the fit"})

    def scheme(self, bits: int) -> WeightScheme:
        """Return the scheme of a weight with `bits` bits; ValueError if the options do not go together."""
        if not 0 < self.norm <= 1 or self.iterations < 0:
            raise ValueError(f"norm={self.norm} must be above 0 and at most 1, iterations={self.iterations} at least 0")
        return super().scheme(bits)

    def round(self, weight: np.ndarray, scheme: WeightScheme) -> QuantizedWeight:
        """Round a weight [N, K]."""
        return hqq(weight, scheme, iterations=self.iterations, p=self.norm)
