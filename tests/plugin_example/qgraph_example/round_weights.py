"""Rounded weights.

    Y = MatMul(X, W)    =>    Y = MatMul(X, round(W, digits))

Weights that hold no floats are left alone, and so are those that are rounded already: a second run changes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Pass, Report, Skipped


@dataclasses.dataclass(frozen=True)
class RoundWeights(Pass):
    """Round every float weight to a number of decimal digits."""

    name: ClassVar[str] = "round-weights"
    digits: int = 2

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Round the initializers of all graphs."""
        del context
        changed, skipped = 0, []
        for graph in qgraph.ir.all_graphs(model):
            for value in graph.initializers.values():
                weight = None if value.const_value is None else value.const_value.numpy()
                if weight is None or not np.issubdtype(weight.dtype, np.floating):
                    skipped.append(Skipped(str(value.name), "it holds no floats"))
                    continue
                rounded = np.round(weight, self.digits)
                if not np.array_equal(rounded, weight, equal_nan=True):
                    value.const_value = ir.tensor(rounded, name=value.name)
                    changed += 1
        return Report(changed=changed, skipped=skipped, notes=[f"{changed} weights rounded to {self.digits} digits"])
