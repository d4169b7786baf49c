"""How much the errors of layers count at the outputs of the model.

    y = W x  ...  outputs        G = E[sum over the rows of a sample of g^T g],  g = d(v . outputs) / dy

An error e in y changes the outputs by e G e^T, to first order, in the mean over random directions v of the outputs. A
decomposition of the weight that is the best for tr(G dW H dW^T), with H the moment of the layer's inputs, is so the
best for the outputs where rows are alike (Martens and Grosse 2015, "K-FAC", section 3), and errors of different layers
compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.analysis.gradients import FIRST_OPSET, gradient_model
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.probes import Probe, first_line, raw_outputs
from qgraph.errors import UserError
from qgraph.numerics.products import product, steady
from qgraph.pipeline import Context

__all__ = ["output_gradients"]

_MOST_FEEDS = 32
_DIRECTIONS = 2
_MOST_BYTES = 1 << 30
"""The backward pass holds the whole model in memory: larger ones go without."""
_MOST_NODES = 2000
"""A session of the backward pass of more would take long to open."""
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def output_gradients(
    model: ir.Model, context: Context, layers: Sequence[LinearLayer], who: str
) -> tuple[dict[LinearLayer, np.ndarray], str]:
    """Return G, float64 [N, N], of what each layer gives, bias aside; or none, and why there are none.

    Args:
        model: is not changed.
        context: its samples are used.
        layers: products and convolutions.
        who: the name that progress and errors show.

    Raises:
        UserError: the model does not run on a sample.
    """
    if not layers:
        return {}, ""
    outputs = [str(value.name) for value in model.graph.outputs if value.dtype in _FLOATS]
    names = {str(layer.node.outputs[0].name): layer for layer in layers}
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > _MOST_BYTES or len(model.graph) > _MOST_NODES:
        return {}, "the model is too large for a backward pass"
    if not outputs or model.graph.opset_imports.get("", 0) < FIRST_OPSET:
        return {}, f"gradients need opset {FIRST_OPSET} and an output of real numbers"
    try:
        backward = gradient_model(model, outputs, list(names))
    except UserError as error:
        return {}, str(error)
    gradients = [str(backward.values[name].name) for name in names]
    samples = context.samples(f"'{who}' by gradients")
    generator = np.random.default_rng(context.seed)
    found = {layer: np.zeros((layer.outputs, layer.outputs)) for layer in layers}
    forward: Probe | None = None
    probe: Probe | None = None
    for number, (feed, _) in enumerate(zip(samples, range(_MOST_FEEDS), strict=False)):
        context.progress(who, number, min(len(samples), _MOST_FEEDS))
        if forward is None:
            fed = frozenset(feed)
            forward = Probe(model, raw_outputs(outputs), fed, threads=context.threads)
            seeds = {str(value.name) for value in backward.cotangents.values()}
            probe = Probe(backward.model, raw_outputs(gradients), fed | seeds, threads=context.threads)
        assert probe is not None
        try:
            given = forward.run(feed)
            for _ in range(_DIRECTIONS):
                directions = {
                    str(backward.cotangents[name].name): generator.choice([-1.0, 1.0], one.shape).astype(one.dtype)
                    for name, one in zip(outputs, given, strict=True)
                }
                for layer, array in zip(names.values(), probe.run({**feed, **directions}), strict=True):
                    rows = _rows(layer, array)
                    with steady():
                        found[layer] += product(rows.T, rows)
        except Exception as error:
            raise UserError(f"the model does not run on calibration sample {number}: {first_line(error)}") from error
    return found, ""


def _rows(layer: LinearLayer, array: np.ndarray) -> np.ndarray:
    """Return float32 [n, N]."""
    turned = np.moveaxis(array, 1, -1) if layer.kind == "convolution" else array
    return np.ascontiguousarray(turned.reshape(-1, layer.outputs), dtype=np.float32)
