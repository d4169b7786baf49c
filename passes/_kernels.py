"""What passes ask a capability table before they write: is there a kernel, and what would a higher opset cost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

import qgraph.ir
from qgraph import capabilities
from qgraph.analysis.kernel_support import refusal, refusal_of
from qgraph.passes import _opsets
from qgraph.passes._rules import Rule, fires

__all__ = ["TABLE_HELP", "fused_kernel", "lacking", "raised", "unraisable"]

TABLE_HELP = "capability table without whose kernel nothing is written, such as onnxruntime-cpu"


def lacking(
    name: str,
    types: Sequence[ir.DataType | None],
    table: str,
    *,
    version: int | None = None,
    attributes: Mapping[str, int | float | str] | None = None,
) -> str | None:
    """Return why there is no kernel for a node that a pass would write, in one line, or None where there is one.

    Args:
        name: of the operator, as tables call it.
        types: of its inputs; None for one that is left out, or of which nothing is known.
        table: name of the table; '' asks none.
        version: of the operator's domain that the model imports.
        attributes: of the node.
    """
    if not table:
        return None
    reason = refusal_of(name, types, capabilities.table(table), attributes, version=version)
    return None if reason is None else f"there is no kernel for it: {reason}"


def fused_kernel(pattern: str, form: str, table: str) -> str | None:
    """Return why a runtime computes several nodes in float, in one line; None where it does not, or nothing is known.

    Args:
        pattern: the nodes, as the table's fusions write them.
        form: the first condition, such as "uint8 activations, int8 weight".
        table: name of the table.
    """
    asked = capabilities.table(table)
    known = [one for one in asked.fusions if one.pattern == pattern and one.when == (form,)]
    if not known or any(one.kernel or one.arithmetic == "integers" for one in known):
        return None
    return f"{asked.title} of {asked.version} computes {pattern} in float ({form})"


def unraisable(model: ir.Model, version: int, name: str, table: str) -> str | None:
    """Return why a model must not be of an operator's opset, in one line, or None.

    Args:
        model: is not changed.
        version: of the default domain, from which on there is such an operator; a later one of the model stays.
        name: of the operator, of float32.
        table: name of the table, which must have the operator, and every kernel that the model has now; '' asks none.
    """
    if not table:
        return None
    asked, now = capabilities.table(table), model.graph.opset_imports
    version = max(version, now.get("", 0))
    reason = lacking(name, [ir.DataType.FLOAT], table, version=version)
    if reason is not None:
        return reason
    for node in qgraph.ir.walk(model):
        lost = refusal(node, asked, opsets={**now, "": version})
        if lost is not None and refusal(node, asked, opsets=now) is None:
            return f"opset {version} would cost '{qgraph.ir.node_label(node)}' its kernel: {lost}"
    return None


def raised(model: ir.Model, version: int, name: str, table: str, rules: Sequence[Rule]) -> str | None:
    """Bring a model to the opset of an operator that is about to be fused, if there is something to fuse.

    Args:
        model: is changed only when None is returned.
        version, name, table: see `unraisable`.
        rules: what would be fused.

    Returns:
        None where there is, and the model is of that opset now; why not, or '' where no rule would fire.
    """
    reason = unraisable(model, version, name, table)
    if reason is not None:
        return reason
    if not fires(model, rules):
        return ""
    _opsets.convert(model, version)
    return None
