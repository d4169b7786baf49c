"""What a model takes, and arrays made to fit it or refused in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.errors import UserError
from qgraph.pipeline import Feeds

__all__ = ["LABELS", "InputSpec", "cast", "conform_feed", "fits", "quoted", "show_shape", "signature"]

LABELS = "labels"
"""Name of the array that holds labels unless another is given."""


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """An input that a feed must hold.

    Attributes:
        name: as feeds name it.
        dtype: numpy's name, such as float32; `string` for text.
        shape: None for an axis of any size; None as a whole when not even the rank is known.
        below: number of rows of the table that the input picks from, such as the tokens that a model knows; None
            where it is no such number.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    below: int | None = None


def signature(model: ir.Model) -> tuple[InputSpec, ...]:
    """Return the inputs of `model`, without the initializers that a caller may override.

    Raises:
        UserError: an input is no tensor, or has no type.
    """
    return tuple(_spec(value) for value in model.graph.inputs if value.name not in model.graph.initializers)


def _spec(value: ir.Value) -> InputSpec:
    if not isinstance(value.type, ir.TensorType):
        raise UserError(f"input '{value.name}' is no tensor ({value.type}): no feeds can be made for this model")
    dtype = value.type.dtype
    shape = None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)
    name = "string" if dtype == ir.DataType.STRING else dtype.numpy().name
    return InputSpec(str(value.name), name, shape, _rows(value) if dtype.is_integer() else None)


def _rows(value: ir.Value) -> int | None:
    """Return how many rows the tables have, the smallest of them, that `value` indexes directly."""
    tables = [node.inputs[0] for node, place in value.uses() if node.op_type == "Gather" and place == 1]
    sizes = [
        table.const_value.shape[0]
        for table in tables
        if table is not None and table.const_value is not None and len(table.const_value.shape) == 2
    ]
    return min((size for size in sizes if isinstance(size, int)), default=None)


def show_shape(shape: Sequence[int | None] | None) -> str:
    """Return a shape for people: [?, 3, 224, 224]."""
    return "of any rank" if shape is None else f"[{', '.join('?' if d is None else str(d) for d in shape)}]"


def fits(shape: Sequence[int], wanted: Sequence[int | None] | None) -> bool:
    """Tell whether an array of `shape` can be fed where `wanted` is asked for."""
    if wanted is None:
        return True
    return len(shape) == len(wanted) and all(want in (None, size) for size, want in zip(shape, wanted, strict=True))


def cast(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """Return `array` in the element type of `spec`, where nothing is lost but floating-point precision.

    Args:
        array: of any type.
        spec: the input that it is for.
        where: names the array in errors, such as "data.npz: array 'x'".

    Raises:
        UserError: the types do not go together, or an integer does not fit.
    """
    if spec.dtype == "string":
        if array.dtype.kind not in "UO":
            raise UserError(f"{where} is {array.dtype}, but input '{spec.name}' takes text")
        return array.astype(object)
    target = np.dtype(spec.dtype)
    if array.dtype == target:
        return array
    if array.dtype.kind == target.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(target)
    if array.dtype.kind in "biu" and target.kind in "biu":
        narrow = array.astype(target)
        if (narrow == array).all():
            return narrow
        raise UserError(
            f"{where} is {array.dtype} and holds numbers that {target} cannot, which input '{spec.name}' is"
        )
    hint = f"Convert it: array.astype('{target}')."
    if array.dtype == np.uint8 and target.kind == "f":
        hint = "If it holds images, say how to scale them with --preprocess PRESET."
    raise UserError(f"{where} is {array.dtype}, but input '{spec.name}' is {target}. {hint}")


def conform_feed(feed: Mapping[str, object], inputs: Sequence[InputSpec], where: str) -> Feeds:
    """Return the arrays for the inputs, in their types; others are left out.

    Args:
        feed: arrays by input name.
        inputs: what the model takes.
        where: names the feed in errors.

    Raises:
        UserError: an input has no array, or one of the wrong shape or type.
    """
    result = {}
    for spec in inputs:
        if spec.name not in feed:
            raise UserError(f"{where} has no array for input '{spec.name}' (it has: {quoted(feed)})")
        array = np.asarray(feed[spec.name])
        if not fits(array.shape, spec.shape):
            raise UserError(
                f"{where}: '{spec.name}' has shape {show_shape(array.shape)}, "
                f"but the input takes {show_shape(spec.shape)}"
            )
        result[spec.name] = cast(array, spec, f"{where}: '{spec.name}'")
    return result


def quoted(names: Iterable[object]) -> str:
    """Return names for people: 'a', 'b'."""
    return ", ".join(f"'{name}'" for name in names) or "nothing"
