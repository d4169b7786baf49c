"""From a lowered model to deployable files: check, write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

import qgraph
import qgraph.ir
from qgraph.analysis.weight_facts import weight_facts
from qgraph.errors import UserError
from qgraph.pipeline import Report
from qgraph.targets.base import Target

__all__ = ["Built", "write"]


@dataclasses.dataclass(frozen=True)
class Built:
    """What was made of a prepared model.

    Attributes:
        compress: report of the compress part.
        lower: report of the lower part.
        weights: see `weight_facts`.
        nodes: of the lowered model.
        files: names of the deployable files.
    """

    compress: Report
    lower: Report
    weights: Mapping[str, Any] | None
    nodes: int
    files: tuple[str, ...]

    def reports(self, prepared: Report) -> dict[str, Report]:
        """Return part -> report, with that of the prepare part."""
        return {"prepare": prepared, "compress": self.compress, "lower": self.lower}

    def told(self) -> str:
        """Return one line: nodes, files and what lowering did."""
        facts = f"{self.nodes} nodes, {', '.join(self.files)}"
        return "   ".join([facts, ", ".join(dict.fromkeys(self.lower.notes))]) if self.lower.notes else facts


def write(
    model: ir.Model,
    target: Target,
    compress: Report,
    lower: Report,
    folder: Path,
) -> Built:
    """Write the files of a lowered model into `folder`.

    Args:
        model: is changed.
        target: for which it is.
        compress: report of the compress part.
        lower: of the lower part.
        folder: exists and is empty.

    Raises:
        UserError: the target cannot run the model.
    """
    weights = weight_facts(model)
    model.producer_name, model.producer_version = "qgraph", qgraph.__version__
    refused = target.check(model)
    if refused:
        first = "; ".join(f"'{node}': {reason}" for node, reason in refused[:3])
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(f"{target.name} cannot run this model: {first}{more}.")
    files = target.lower(model, folder)
    return Built(compress, lower, weights, qgraph.ir.count_nodes(model), tuple(files))
