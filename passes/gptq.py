"""Weights rounded one input after the other, so that those still to come make up for the error (GPTQ).

    y = MatMul(x, W)    =>    y = MatMul(x, DequantizeLinear(Wq, scale, zero_point))        Gemm and Gather likewise
    y = Conv(x, W)      =>    y = Conv(x, DequantizeLinear(Wq, scale))                      where `ops` names Conv

What an input's error costs is seen from calibration samples: the Hessian of each layer's squared output error (Frantar
et al. 2022), taken block by block, after the layers before were quantized. Layers that read the same value share it;
that of a weight which several layers read is their sum. The weights also make up for what quantizing the layers before
has changed in their input (Li et al. 2025, GPTAQ), and in the residual stream that their outputs are added to.
Embedding tables are rounded to the nearest, with ranges of least squared error; a table that is the output layer too
stays one. A convolution is the linear layer over the patches that it reads, with one positive scale for each output,
chosen for least error in the outputs too (`qgraph.numerics.channel_rounding`).

Weights that `sparsify` has made sparse keep their zeros. With `sparse`, products get them in the same sweep: what goes
and what the others round to make up for one another (SparseGPT, `qgraph.numerics.sparsity`).

It does not fire on weights that are computed, shared with a node that is no linear layer, or compressed already; see
`qgraph.analysis.linear_layers` and `qgraph.analysis.convolutions`. Whatever scales or rotates weights (AWQ, rotations)
goes before. A second run finds nothing to do.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qgraph.analysis.sparse_weights import ZerosStay, mark_sparse
from qgraph.errors import UserError
from qgraph.numerics.channel_rounding import round_channels, round_stack
from qgraph.numerics.gptq import gptq
from qgraph.numerics.sparsity import Pattern, parse_pattern, sparse_gptq
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, quantize_weight
from qgraph.passes._sequential_rounding import Problem, SequentialRounding
from qgraph.passes._weight_rounding import Chosen, Prepared, some_of
from qgraph.pipeline import Context

__all__ = ["Gptq"]

_HALF = 0.5
_ROUNDS = 4
"""Of deciding every number of a convolution again, at most."""


@dataclass(frozen=True)
class Gptq(SequentialRounding):
    """Quantize weights so that the error in a layer's outputs is least (GPTQ)."""

    name: ClassVar[str] = "gptq"
    format: Literal["int", "nf4", "fp8e4m3", "fp8e5m2", "mxfp4", "nvfp4", "ternary"] = field(
        default="int", metadata={"help": "integers, or a small float format, which has its own bits"}
    )
    order: Literal["activation", "none"] = field(
        default="activation", metadata={"help": "inputs of the largest activations first, or as they lie"}
    )
    clip: Literal["mse", "minmax"] = field(default="mse", metadata={"help": "ranges of least squared error, or full"})
    refine: int = field(
        default=10, metadata={"help": "rounds of deciding every group again, each as long as GPTQ itself"}
    )

    sparse: str = field(
        default="",
        metadata={"help": "set weights of products to zero as well: 2:4, another n:m, or unstructured (half)"},
    )

    def scheme(self, bits: int) -> WeightScheme:
        """Return the scheme of a weight with `bits` bits; ValueError if the options do not go together."""
        return WeightScheme(self.format, bits, self.group, self.symmetric)

    def round(self, weight: np.ndarray, scheme: WeightScheme) -> QuantizedWeight:
        """Round an embedding table, which has no Hessian, to the nearest."""
        return quantize_weight(weight, scheme, method=self.clip)

    def check(self) -> None:
        """Raise UserError where options are out of range."""
        super().check()
        if self.refine < 0:
            raise UserError(f"gptq: refine is a number of rounds, 0 or more, not {self.refine}")
        self._pattern()

    def _pattern(self) -> Pattern | None:
        try:
            return parse_pattern(self.sparse, _HALF) if self.sparse else None
        except ValueError as error:
            raise UserError(f"gptq: {error}") from error

    def prepare(self, model: ir.Model, context: Context, chosen: Chosen) -> Prepared:
        """Quantize all layers; those that become sparse are marked, and later passes have to keep their zeros."""
        prepared = super().prepare(model, context, chosen)
        pattern = self._pattern()
        if pattern is None:
            return prepared
        products = [layers for layers, _ in chosen.values() if all(layer.kind == "linear" for layer in layers)]
        sparse = [layers for layers in products if pattern.fits(layers[0].inputs)]
        ragged = [layers[0].name for layers in products if not pattern.fits(layers[0].inputs)]
        notes = [*prepared.notes]
        if ragged:
            notes.append(f"not {pattern}, since their inputs are no multiple of {pattern.of}: {some_of(ragged)}")
        if sparse:
            notes.append(f"{len(sparse)} of them {pattern}")
            context.promises.append(ZerosStay())
        for layer in itertools.chain(*sparse):
            mark_sparse(layer.node, pattern, _HALF)
        return dataclasses.replace(prepared, notes=notes)

    def solve(self, problem: Problem) -> tuple[QuantizedWeight, float]:
        """Round rows of weights against the Hessian of their inputs; return them, and the damping that was used."""
        if problem.convolution:
            rounds = min(self.refine, _ROUNDS)
            if problem.weight.ndim == 2:
                made = round_channels(
                    problem.weight, problem.hessian, problem.scheme, damping=self.damping, rounds=rounds
                )
            else:
                made = round_stack(problem.weight, problem.hessian, problem.scheme, damping=self.damping, rounds=rounds)
            return made, self.damping
        pattern = self._pattern()
        if problem.stays is not None or (pattern is not None and pattern.fits(problem.weight.shape[1])):
            sparse = sparse_gptq(
                problem.weight,
                problem.hessian,
                pattern or Pattern("unstructured"),
                scheme=problem.scheme,
                mask=problem.stays,
                damping=self.damping,
                refine=self.refine,
            )
            assert sparse.quantized is not None
            return sparse.quantized, self.damping
        result = gptq(
            problem.weight,
            problem.hessian,
            problem.scheme,
            damping=self.damping,
            order=self.order,
            clip=self.clip,
            refine=self.refine,
        )
        return result.quantized, result.damping
