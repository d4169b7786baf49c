"""Weights rounded up or down as is learned from what the layers read, layer after layer (AdaRound).

    y = Conv(x, W)      =>    y = Conv(x, DequantizeLinear(Wq, scale))        MatMul, Gemm and ConvTranspose likewise

For every weight it is learned whether it goes to the integer above or below, with a sigmoid that is driven to 0 or 1,
so that the layer's outputs change least on the calibration samples (Nagel et al. 2020); layers are taken in the order
in which they run, with the inputs that the rounded layers before give them, and aim at what the float model computes.
Each output has one positive scale and no zero point, as integer kernels read them. `refine` then lets single numbers
and scales move further, and takes what error feedback (GPTQ) finds where that is better; `refine=0` is the paper's
method alone. See `qgraph.numerics.adaround`.

`qdq` behind it keeps the weights and quantizes what goes between the layers: `adaround{bits=4},qdq` is W4A8.

It does not fire on weights that are computed, shared with a node that uses them in another way, compressed already, or
that `exclude` names; see `qgraph.analysis.linear_layers` and `qgraph.analysis.convolutions`. Whatever scales weights
(equalization, smooth-quant) goes before. A second run finds nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qgraph.errors import UserError
from qgraph.numerics.adaround import adaround
from qgraph.numerics.weights import QuantizedWeight, WeightScheme
from qgraph.passes._sequential_rounding import Problem, SequentialRounding

__all__ = ["AdaRound"]


@dataclass(frozen=True)
class AdaRound(SequentialRounding):
    """Learn for every weight whether to round it up or down, so that outputs change least (AdaRound)."""

    name: ClassVar[str] = "adaround"
    group: int = field(default=0, metadata={"help": "inputs that share a scale: 0, all of an output"})
    symmetric: bool = field(default=True, metadata={"help": "no zero points: true"})
    min_elements: int = field(default=0, metadata={"help": "smaller weights stay in float"})
    drift: float = field(
        default=0.5,
        metadata={"help": "share of what quantizing the layers before has changed that the weights make up for"},
    )
    ops: tuple[str, ...] = field(
        default=("Conv", "ConvTranspose", "Gemm", "MatMul"),
        metadata={"help": "operators whose weights to round: Conv, ConvTranspose, Gemm, MatMul"},
    )
    steps: int = field(default=50, metadata={"help": "steps of learning"})
    strength: float = field(default=2.0, metadata={"help": "of the pull to 0 or 1, against the error of the outputs"})
    refine: int = field(
        default=3, metadata={"help": "rounds of deciding numbers and scales again; 0 keeps what was learned"}
    )

    def check(self) -> None:
        """Raise UserError where options are out of range."""
        super().check()
        if self.group or not self.symmetric:
            raise UserError("adaround: each output has one scale and no zero point: group=0 and symmetric=true")
        if self.steps < 1 or self.refine < 0 or self.strength < 0:
            raise UserError("adaround: steps are 1 or more, refine and strength 0 or more")

    def round(self, weight: np.ndarray, scheme: WeightScheme) -> QuantizedWeight:
        """Round an embedding table, of which nothing is learned, to the nearest."""
        return self.round_convolution(np.asarray(weight, np.float32), scheme)

    def solve(self, problem: Problem) -> tuple[QuantizedWeight, float]:
        """Round rows of weights against the Hessian of their inputs; return them and the damping."""
        made = adaround(
            problem.weight,
            problem.hessian,
            problem.scheme,
            damping=self.damping,
            steps=self.steps,
            strength=self.strength,
            refine=self.refine,
        )
        return made, self.damping
