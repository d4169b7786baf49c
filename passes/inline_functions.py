"""Calls of model-local functions become what the functions do.

    y = my.Linear(x, w)    my.Linear(x, w) { y = MatMul(x, w) }    =>    y = MatMul(x, w)

All calls, those in subgraphs and in other functions included; then no pass needs to know of functions. A function may
be written for another opset than the model: if it is older it is converted up, and if it is newer the model is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qgraph.errors import UserError
from qgraph.passes import _opsets
from qgraph.pipeline import Context, Pass, Report

__all__ = ["InlineFunctions"]


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Put the bodies of model-local functions in the place of their calls."""

    name: ClassVar[str] = "inline-functions"

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Inline; `changed` counts the calls.

        Raises:
            UserError: functions call one another in a circle, or take graphs as attributes.
        """
        del context
        if not model.functions:
            return Report()
        count = len(model.functions)
        _agree_on_opset(model)
        try:
            result = InlinePass()(model)
        except (ir.passes.PassError, ir.passes.InvariantError, ValueError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise UserError(f"the model's functions cannot be inlined: {cause}. Export without functions.") from error
        calls = sum(getattr(result, "id_count", {}).values())
        for identifier in list(model.functions):
            del model.functions[identifier]
        return Report(changed=max(calls, count), notes=[f"{calls} calls of {count} functions inlined"])


def _agree_on_opset(model: ir.Model) -> None:
    """Bring the model and its functions to the highest opset that any of them is written for."""
    versions = [_opsets.version_of(model.graph.opset_imports)]
    versions += [_opsets.version_of(function.opset_imports) for function in model.functions.values()]
    known = [version for version in versions if version is not None]
    if len(set(known)) > 1:
        _opsets.convert(model, max(known))
    for function in model.functions.values():
        for domain, version in function.opset_imports.items():
            model.graph.opset_imports.setdefault(domain, version)
