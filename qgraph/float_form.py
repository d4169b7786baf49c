"""The float model that an artifact was quantized from: its source after the passes that lost nothing.

    source -> prepare -> equalize, smooth-quant ... | qdq ...        up to the bar

An artifact's manifest names the passes; they are run again, on the samples at hand, until the first that loses
something says so (`Context.keep_reference`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

import qgraph.ir
from qgraph import registry
from qgraph.analysis.gradients import FIRST_OPSET
from qgraph.artifact import Artifact
from qgraph.errors import UserError
from qgraph.pipeline import Context, Pipeline

__all__ = ["float_form"]

_BY_SAMPLES = ("awq", "smooth-quant")
"""Passes that lose nothing and depend on the samples."""
_MARKS = ("mixed-bits", "mixed-precision")
"""Passes that only note what others shall do."""


class _FoundError(Exception):
    """The model is about to lose something."""


class _Until(Context):
    """A context that stops the passes before the first loss."""

    def keep_reference(self, model: ir.Model) -> None:
        del model
        raise _FoundError


def float_form(source: Path, artifact: Artifact | None, context: Context) -> tuple[ir.Model, list[str]]:
    """Return the float model and what to know of it.

    Args:
        source: the model that was compiled.
        artifact: what was compiled from it; None for a model that did not come from here: the source is brought to an
            opset that gradients know.
        context: samples, seed, threads and progress for the passes.

    Raises:
        UserError: the manifest's passes cannot be run again.
    """
    model = qgraph.ir.load(source)
    if artifact is None:
        if model.graph.opset_imports.get("", 0) < FIRST_OPSET:
            Pipeline.parse(f"lift-constants,convert-opset{{version={FIRST_OPSET}}}").run(model, context=context)
        return model, []
    parts = artifact.manifest["pipeline"]
    target = registry.find("target", artifact.manifest["target"])
    fields = {one.name: getattr(context, one.name) for one in dataclasses.fields(context) if one.init}
    until = _Until(**{**fields, "opset": getattr(target, "opset", None), "reference": None, "_analyses": {}})
    Pipeline.parse(parts["prepare"]).run(model, context=until)
    notes: list[str] = []
    for one in Pipeline.parse(parts["compress"]):
        if one.name in _MARKS:
            continue
        try:
            report = one.apply(model, until)
        except _FoundError:
            return model, notes
        except (UserError, MemoryError, OSError):
            raise
        except Exception as error:
            raise UserError(f"its pass '{one.name}' cannot be run again: {error}") from error
        qgraph.ir.forget_names(model)
        until.forget(one.preserves)
        if report.changed and one.name in _BY_SAMPLES:
            notes.append(f"{one.name} was run again on these samples: with others, its factors differ a little")
    return model, notes
