"""ONNX's own examples of its operators as probes of an importer, and the operators that TVM's has a converter for.

An example is a model of one node with data. Those with tensors at all edges are taken; inputs behind the first become
constants, as weights, axes and bounds are in models.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qgraph.capabilities import DEFAULT_DOMAINS
from qgraph.runtime.kernel_probes import Probe

__all__ = ["WORKER", "converters", "examples"]

WORKER = "qgraph.runtime.importer_worker"


def converters() -> frozenset[str]:
    """Return the operators of ONNX's default domain that TVM's importer has a converter for; TVM must be installed."""
    from tvm.relax.frontend.onnx import onnx_frontend

    names = onnx_frontend._get_convert_map()  # noqa: SLF001 - there is no other way to ask
    return frozenset(name for name in names if onnx.defs.has(name))


def examples(op_type: str | None = None) -> Iterator[Probe]:
    """Yield the examples of operators of the default domain, in the order in which the installed ONNX gives them.

    Args:
        op_type: the only operator that is wanted; all if None.
    """
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of examples that overflow, or divide by zero
        cases = collect_testcases(None)  # an operator's alone would be all that this process ever gets
    for case in cases:
        if case.model is None or not case.data_sets:
            continue
        graph = case.model.graph
        if len(graph.node) != 1 or graph.node[0].domain not in DEFAULT_DOMAINS:
            continue
        if op_type not in (None, graph.node[0].op_type):
            continue
        if not graph.input or any(not value.type.HasField("tensor_type") for value in (*graph.input, *graph.output)):
            continue
        model = _with_constants(case.model, case.data_sets[0][0])
        (node,) = model.graph
        types = [None if one is None else one.dtype for one in node.inputs]
        words = tuple("" if one is None else str(one.numpy()) for one in types)
        yield Probe(node.op_type, model.graph.opset_imports[""], words, model)


def _with_constants(source: onnx.ModelProto, data: Any) -> ir.Model:
    model = onnx.ModelProto()
    model.CopyFrom(source)
    for value, array in zip(source.graph.input[1:], data[1:], strict=False):
        tensor = array if isinstance(array, onnx.TensorProto) else onnx.numpy_helper.from_array(np.asarray(array))
        model.graph.initializer.append(tensor)
        model.graph.initializer[-1].name = value.name
        model.graph.input.remove(next(one for one in model.graph.input if one.name == value.name))
    return ir.from_proto(model)
