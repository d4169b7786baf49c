"""The integers of weights in `full-qdq`: 4, 8 or 16 bits, one scale or one for each output, and which have 16.

    w  =>  D(w8, s)        or        D(w16, s / 256)

A weight of 16 bits is two of 8 to `integer-requantize`, and costs each product twice. It is planned where the outputs
are too far from linear for gradients to foresee what they feel: there every weight's rounding to 8 bits is put in and
measured on a few samples, and what alone takes a tenth of the noise that was asked for gets 16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import is_constant, output_axis
from qgraph.analysis.integer_units import Form, Unit, layer_weight
from qgraph.analysis.perturbation_effects import decibels
from qgraph.analysis.perturbation_measures import measure
from qgraph.analysis.perturbations import Perturbation
from qgraph.numerics.quantize import Parameters, minmax_parameters, quantize
from qgraph.numerics.schemes import INT8_WEIGHT, Scheme
from qgraph.passes._full_qdq_stands import Options
from qgraph.pipeline import Context

__all__ = ["PLAIN", "Rounded", "Style", "felt_weights", "float_weights", "round_weight", "style_of", "weight_errors"]

_INT4 = Scheme(4)
_DTYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8, 16: ir.DataType.INT16}
_MATRIX = 2
_FINER = 256
"""Steps of a 16-bit weight in one of its 8 bits: 127 of these are 32512, within two halves of 8 bits."""
_SHARE = 0.1
"""The share of the noise asked for that a weight may make alone."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A weight in integers.

    Attributes:
        codes: int8 (4 bits too) or int16.
        scale: float32, () or (outputs,).
        axis: that of the outputs; None where there is one scale.
        dtype: of the codes as they are stored.
    """

    codes: np.ndarray
    scale: np.ndarray
    axis: int | None
    dtype: ir.DataType

    def real(self) -> np.ndarray:
        """Return the numbers that the integers stand for, float32."""
        return np.asarray(self.codes * _laid_out(self.scale, self.axis, self.codes.ndim), np.float32)


@dataclasses.dataclass(frozen=True)
class Style:
    """How weights are rounded.

    Attributes:
        bits: 4, 8 or 16.
        per_channel: one scale for each output, where the integer operators can have that.
        powers: scales are powers of two.
    """

    bits: int = 8
    per_channel: bool = True
    powers: bool = False


PLAIN = Style()


def style_of(options: Options) -> Style:
    """Return how the options of `full-qdq` have all weights rounded."""
    bits = 16 if options.wide_weights == "all" else 4 if options.weights == "int4" else 8
    return Style(bits, options.per_channel, options.scales == "pow2")


def round_weight(node: ir.Node, style: Style) -> Rounded:
    """Round the constant weight of a layer."""
    found = layer_weight(node)
    assert found is not None
    index, weight = found
    array = qgraph.ir.constant(weight)
    assert array is not None
    scheme = _INT4 if style.bits == _INT4.bits else INT8_WEIGHT
    if style.per_channel and index == 1 and (node.op_type != "MatMul" or array.ndim == _MATRIX):
        scheme = scheme.per_channel(array.ndim, output_axis(node))
    scale, zero_point = minmax_parameters(array, scheme)
    if style.powers:
        scale = np.asarray(np.exp2(np.ceil(np.log2(scale.astype(np.float64)))), np.float32)
    if style.bits > scheme.bits:
        scale = np.asarray(np.maximum(scale / _FINER, np.finfo(np.float32).tiny), np.float32)
        codes = np.rint(array / _laid_out(scale, scheme.axis, array.ndim)).astype(np.int16)
    else:
        codes = quantize(array, scheme, Parameters(scale, zero_point)).values
    return Rounded(codes, scale, scheme.axis, _DTYPES[style.bits])


def _laid_out(scale: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    return scale if axis is None else scale.reshape([-1 if one == axis else 1 for one in range(rank)])


def float_weights(units: Iterable[Unit]) -> Iterator[tuple[ir.Value, ir.Node]]:
    """Yield the weights that are to be rounded, each with a layer that reads it."""
    for unit in units:
        found = layer_weight(unit.main) if unit.form is Form.LAYER else None
        if found is not None and is_constant(found[1]):
            yield found[1], unit.main


def weight_errors(units: Iterable[Unit], style: Style) -> dict[str, np.ndarray]:
    """Return by name the errors that rounding the weights of layers makes."""
    errors: dict[str, np.ndarray] = {}
    for weight, node in float_weights(units):
        array = qgraph.ir.constant(weight)
        if array is not None and weight.name and array.size:
            errors[weight.name] = round_weight(node, style).real() - array
    return errors


def felt_weights(
    model: ir.Model, context: Context, units: Sequence[Unit], errors: Mapping[str, np.ndarray], options: Options
) -> tuple[frozenset[ir.Value], list[str]]:
    """Return the weights whose rounding the outputs feel by measurement, and a remark on each.

    Args:
        model: is not changed.
        context: its samples are run.
        units: the parts of the model.
        errors: by which the weights are rounded, by name.
        options: those of the pass.
    """
    outputs = [str(value.name) for value in dict.fromkeys(model.graph.outputs) if value.dtype is ir.DataType.FLOAT]
    measured, _ = measure(model, context, {name: Perturbation(name, one) for name, one in errors.items()}, outputs)
    least = _SHARE * 10 ** (-options.sqnr / 10)
    readers: dict[ir.Value, list[ir.Node]] = {}
    for weight, node in float_weights(units):
        if measured.get(str(weight.name), 0.0) > least:
            readers.setdefault(weight, []).append(node)
    notes = []
    for weight, nodes in readers.items():
        others = f" and {len(nodes) - 1} that share it" if len(nodes) > 1 else ""
        told = decibels(1.0, measured[str(weight.name)]) or math.inf
        notes.append(f"weight of '{qgraph.ir.node_label(nodes[0])}'{others}: 16 bits, as 8 leave {told:.1f} dB")
    return frozenset(readers), notes
