"""Writing integer nodes: what stands for a tensor, and how accumulators become integers of few bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_rules import is_constant
from qgraph.numerics.requantize import fixed_point
from qgraph.passes import _integer_functions

__all__ = ["LIMIT", "Codes", "Target", "UnfitError", "Writer", "along"]

LIMIT = (1 << 31) - 1
"""The largest accumulator."""
_LEAST = 2.0**-32
_BITS = {ir.DataType.UINT8: (0, 255), ir.DataType.INT8: (-128, 127), ir.DataType.INT16: (-32768, 32767),
         ir.DataType.INT4: (-8, 7), ir.DataType.UINT4: (0, 15)}  # fmt: skip
_INT32_BOUNDS = (-(1 << 31), LIMIT)

Attributes = Mapping[str, ir.Attr | int | float | str | Sequence[int]]


class UnfitError(Exception):
    """A unit cannot be written in integers; the message says why, in words that follow the node's name."""


class Target(NamedTuple):
    """Integers that are wanted: real = (integer - zero_point) * scale."""

    scale: float
    zero_point: int
    dtype: ir.DataType

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest integer."""
        return _INT32_BOUNDS if self.dtype is ir.DataType.INT32 else _BITS[self.dtype]

    @property
    def reach(self) -> int:
        """The largest distance of an integer from the zero point."""
        low, high = self.bounds
        return max(self.zero_point - low, high - self.zero_point)

    def quantize(self, real: np.ndarray) -> np.ndarray:
        """Return the integers for real numbers as QuantizeLinear computes them; NaN becomes zero."""
        low, high = self.bounds
        with np.errstate(all="ignore"):
            codes = np.rint(np.asarray(real, np.float32) / np.float32(self.scale)) + np.float32(self.zero_point)
        codes = np.where(np.isnan(codes), self.zero_point, codes)
        return np.asarray(np.clip(codes, low, high)).astype(self.dtype.numpy())

    def points(self) -> np.ndarray:
        """Return what each integer stands for, float32, the least first, as DequantizeLinear computes it."""
        low, high = self.bounds
        codes = np.arange(low, high + 1, dtype=np.float32) - np.float32(self.zero_point)
        return np.asarray(codes * np.float32(self.scale))


@dataclasses.dataclass(frozen=True)
class Codes:
    """A tensor of integers and what they stand for."""

    value: ir.Value
    form: Target


class Writer:
    """Writes nodes before a place in a graph.

    Args:
        model: to which functions are added.
        rounding: how accumulators are rounded.
    """

    def __init__(self, model: ir.Model, rounding: str) -> None:
        self.model = model
        self.graph = model.graph
        self.rounding = rounding
        self._remarks: dict[str, None] = {}
        self._most = LIMIT
        self._tables: list[int] = []
        self._place: ir.Node | None = None
        self._base = "integer"
        self._constants: dict[tuple[object, ...], ir.Value] = {}
        self._centred: dict[tuple[ir.Value, int], ir.Value] = {}

    def at(self, node: ir.Node, base: str) -> None:
        """Write before `node` from now on, under names that start with `base`."""
        self._place, self._base = node, base

    def remark(self, text: str) -> None:
        """Note something that a user should know of what was written."""
        self._remarks[text] = None

    def limit(self, most: int) -> None:
        """Note that a sum of unknown length cannot overflow as long as it has at most `most` terms."""
        self._most = min(self._most, most)

    def whole_table(self, nbytes: int) -> None:
        """Note a table of every 16-bit input, for a function too steep to interpolate."""
        self._tables.append(nbytes)

    def remarks(self) -> list[str]:
        """Return what was noted."""
        sums = [f"sums along dynamic axes cannot leave int32 up to {self._most:,} terms"] if self._most < LIMIT else []
        tables = (
            [f"{len(self._tables)} tables of 65,536 entries ({sum(self._tables) >> 10} KiB)"] if self._tables else []
        )
        return [*self._remarks, *sums, *tables]

    # --- nodes --------------------------------------------------------------------------------------------------------

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType,
        attributes: Attributes | None = None,
        *,
        outputs: int = 1,
        domain: str = "",
    ) -> ir.Node:
        """Insert a node whose outputs are of one type."""
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        node = ir.node(op_type, inputs, dict(attributes or {}), domain=domain, num_outputs=outputs)
        return self._insert(node, op_type, dtype)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType,
        attributes: Attributes | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node and return its output."""
        return self.node(op_type, inputs, dtype, attributes, domain=domain).outputs[0]

    def function(self, name: str, inputs: Sequence[ir.Value], dtype: ir.DataType) -> ir.Value:
        """Insert a call of one of the functions of `qgraph.passes._integer_functions`."""
        rounding = self.rounding if name == "Requantize" else None
        node = _integer_functions.call(self.model, name, inputs, rounding=rounding)
        return self._insert(node, name, dtype).outputs[0]

    def _insert(self, node: ir.Node, kind: str, dtype: ir.DataType) -> ir.Node:
        assert self._place is not None
        node.name = qgraph.ir.fresh_name(self.graph, f"{self._base}/{kind}")
        for index, value in enumerate(node.outputs):
            value.name = qgraph.ir.fresh_name(self.graph, f"{node.name}_{index}" if index else f"{node.name}_out")
            value.dtype = dtype
        self.graph.insert_before(self._place, node)
        return node

    def constant(self, array: np.ndarray | int, dtype: ir.DataType, name: str = "") -> ir.Value:
        """Return an initializer; equal ones are stored once."""
        stored = np.asarray(array).astype(dtype.numpy())
        key = (dtype, stored.shape, stored.tobytes())
        if key not in self._constants:
            label = name or (f"{stored.item()}_{dtype.name.lower()}" if stored.size == 1 else f"{self._base}/constant")
            tensor = ir.tensor(stored, dtype=dtype)
            self._constants[key] = qgraph.ir.initializer(self.graph, label, tensor)
        return self._constants[key]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return `value` as another type of integers, which its numbers must fit."""
        if value.dtype is dtype:
            return value
        return self.op("Cast", [value], dtype, {"to": int(dtype)})

    def times(self, value: ir.Value, factor: int) -> ir.Value:
        """Return an int32 value times a number."""
        if factor == 1:
            return value
        return self.op("Mul", [value, self.constant(factor, ir.DataType.INT32)], ir.DataType.INT32)

    # --- integers that stand for something ----------------------------------------------------------------------------

    def codes(self, value: ir.Value) -> Codes:
        """Return the integers that stand for a tensor of the graph.

        Raises:
            UnfitError: there are none.
        """
        node = value.producer()
        if node is None or not qgraph.ir.is_op(node, "DequantizeLinear"):
            raise UnfitError(f"what it reads ('{value.name}') is not quantized")
        source = node.inputs[0]
        assert source is not None
        return Codes(source, self.form(node, value))

    def form(self, node: ir.Node, value: ir.Value) -> Target:
        """Return what the integers of a QuantizeLinear or DequantizeLinear mean.

        Raises:
            UnfitError: it has several scales, or computed ones, or integers of another type.
        """
        scale = qgraph.ir.constant(node.inputs[1])
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        zero_point = np.zeros(1) if zero is None else qgraph.ir.constant(zero)
        integers = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        dtype = None if integers is None else integers.dtype
        if dtype is None and zero is not None:
            dtype = zero.dtype
        if scale is None or zero_point is None or scale.size != 1:
            raise UnfitError(f"the scale of '{value.name}' is not one constant number")
        if dtype not in _BITS:
            raise UnfitError(f"'{value.name}' is quantized to {'?' if dtype is None else dtype.name.lower()}")
        if dtype is ir.DataType.INT16 and np.any(zero_point):
            raise UnfitError(f"'{value.name}' is quantized to int16 with a zero point: quantize it around zero")
        if not float(scale.item()) > 0:
            raise UnfitError(f"the scale of '{value.name}' is {scale.item()}, which is not positive")
        return Target(float(scale.item()), int(zero_point.item()), dtype)

    def centred(self, codes: Codes) -> ir.Value:
        """Return the integers less their zero point, in int32."""
        key = (codes.value, codes.form.zero_point)
        if key not in self._centred:
            wide = self.cast(codes.value, ir.DataType.INT32)
            zero = codes.form.zero_point
            if zero:
                wide = self.op("Sub", [wide, self.constant(zero, ir.DataType.INT32)], ir.DataType.INT32)
            self._centred[key] = wide
        return self._centred[key]

    def real(self, value: ir.Value) -> np.ndarray:
        """Return a constant in float64, whether it is stored as such or as integers."""
        array = qgraph.ir.constant(value)
        if array is not None:
            return np.asarray(array, np.float64)
        node = value.producer()
        if node is None or not qgraph.ir.is_op(node, "DequantizeLinear") or not is_constant(node.inputs[0]):
            raise UnfitError(f"'{value.name}' is computed at run time")
        integers, scale = qgraph.ir.constant(node.inputs[0]), qgraph.ir.constant(node.inputs[1])
        zero = None if len(node.inputs) < 3 or node.inputs[2] is None else qgraph.ir.constant(node.inputs[2])
        if integers is None or scale is None or node.attributes.get_int("block_size", 0) != 0:
            raise UnfitError(f"the scale of '{value.name}' is not one constant number, or one for each channel")
        axis = node.attributes.get_int("axis", 1)
        scales, zero_points = (
            _spread(one, axis, integers.ndim) for one in (scale, np.zeros(()) if zero is None else zero)
        )
        return np.asarray((np.asarray(integers, np.float64) - zero_points) * scales)

    # --- results ------------------------------------------------------------------------------------------------------

    def requantize(
        self,
        accumulator: ir.Value,
        scale: np.ndarray | float,
        target: Target,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> ir.Value:
        """Return an int32 accumulator as integers of few bits.

        Args:
            accumulator: int32.
            scale: what one of its units is worth, of a shape that broadcasts to it, positive.
            target: the integers that are wanted.
            low: clamp to this real number from below.
            high: and to this from above.

        Raises:
            UnfitError: no multiplier represents the scale.
        """
        ratio = np.asarray(scale, np.float64) / target.scale
        gone = ratio < _LEAST  # an int32 times less than 2^-32 rounds to zero
        try:
            multiplier, shift = fixed_point(np.where(gone, 1.0, ratio))
        except ValueError as error:
            raise UnfitError(f"{error}: use a coarser scale for its inputs or a finer one for its result") from None
        multiplier, shift = np.where(gone, 0, multiplier), np.where(gone, 0, shift)
        if multiplier.size > 1 and np.ptp(multiplier) == 0 and np.ptp(shift) == 0:
            multiplier, shift = multiplier.reshape(-1)[0], shift.reshape(-1)[0]
        least, largest = target.bounds
        bounds = [
            bound if math.isinf(real) else int(target.quantize(np.asarray(real)).item())
            for real, bound in ((low, least), (high, largest))
        ]
        inputs = [
            accumulator,
            self.constant(multiplier, ir.DataType.INT32),
            self.constant(shift, ir.DataType.INT32),
            *(self.constant(one, target.dtype) for one in (target.zero_point, *bounds)),
        ]
        return self.function("Requantize", inputs, target.dtype)

    def rescale(self, codes: Codes, target: Target) -> ir.Value:
        """Return integers at another scale, or as they are where it is the same."""
        if codes.form == target:
            return codes.value
        return self.requantize(self.centred(codes), codes.form.scale, target)


def along(entries: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Return one entry for each index along an axis in a shape that broadcasts against an array of that rank."""
    entries = np.asarray(entries)
    return entries if entries.ndim == 0 else entries.reshape([-1 if one == axis % rank else 1 for one in range(rank)])


def _spread(parameter: np.ndarray, axis: int, rank: int) -> np.ndarray:
    one = np.asarray(parameter, np.float64)
    return one.reshape(()) if one.size == 1 else along(one, axis, rank)
