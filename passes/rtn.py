"""Weights in 2 to 8 bits, each rounded to the nearest level of its group.

    y = MatMul(x, W)    =>    y = MatMul(x, DequantizeLinear(Wq, scale, zero_point))        Gemm and Gather likewise
    y = Conv(x, W)      =>    y = Conv(x, DequantizeLinear(Wq, scale))                      where `ops` names Conv

Groups of neighbouring inputs share a scale and, unless `symmetric`, a zero point. `mse` searches those of least
squared error: ranges shrunk step by step, each with the scale that fits its codes best; `minmax` lets no weight
saturate. Convolutions have one scale for each output, of least squared error, and no zero points. No data are needed.
Weights are rounded when the file is written, layer by layer.

It does not fire on weights that are computed, shared with a node that is no linear layer, compressed already, smaller
than `min_elements`, or that `exclude` names; see `qgraph.analysis.linear_layers`. A second run finds nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from qgraph.numerics.weights import QuantizedWeight, WeightScheme, quantize_weight
from qgraph.passes._weight_rounding import PRODUCTS, WeightRounding

__all__ = ["Rtn"]


@dataclass(frozen=True)
class Rtn(WeightRounding):
    """Round weights to the nearest of a few levels, with ranges of least squared error."""

    name: ClassVar[str] = "rtn"
    method: Literal["mse", "minmax"] = field(
        default="mse", metadata={"help": "ranges of least squared error, or full ones"}
    )
    format: Literal["int", "nf4", "fp8e4m3", "fp8e5m2", "mxfp4", "nvfp4", "ternary"] = field(
        default="int", metadata={"help": "integers, or a small float format, which has its own bits"}
    )
    ops: tuple[str, ...] = field(
        default=PRODUCTS, metadata={"help": "operators whose weights to round: Conv, ConvTranspose, Gemm, MatMul"}
    )

    def operators(self) -> tuple[str, ...]:
        """Return the operators whose weights are rounded, besides embedding tables."""
        return self.ops

    def scheme(self, bits: int) -> WeightScheme:
        """Return the scheme of a weight with `bits` bits; ValueError if the options do not go together."""
        return WeightScheme(self.format, bits, self.group, self.symmetric)

    def round(self, weight: np.ndarray, scheme: WeightScheme) -> QuantizedWeight:
        """Round a weight [N, K]."""
        return quantize_weight(weight, scheme, method=self.method)
