"""How a positive factor for a channel of a value goes on to what the value is made of, operator by operator.

Each rule takes the channel of every element of an output to those of the inputs (`Tracer.up`), or ends at constants
that take the factor. `qgraph.analysis.channel_sources` lists the operators; here are those that compute element by
element, those that move, and the norms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.channel_products import PRODUCT_RULES
from qgraph.analysis.channel_tracer import (
    NONE,
    Dims,
    Found,
    Key,
    NoSourceError,
    Rule,
    Tracer,
    at,
    constant_tensor,
    key,
    tie,
    vector,
)

__all__ = ["RULES"]

_MICROSOFT = "com.microsoft"


def multiplied(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """One factor takes it: a constant vector, or whatever leads to sources.

    A single number stays one. As a vector it would keep runtimes from recognising what it is part of: ONNX Runtime
    runs MiniLM an eighth slower when the 0.5 of a GELU is no scalar.
    """
    del value
    indices = [index for index in range(2 if node.op_type == "Mul" else 1) if not _is_single(node.inputs[index])]
    order = sorted(indices, key=lambda index: constant_tensor(node.inputs[index]) is None)
    reasons: list[str] = []
    for index in order:
        try:
            found = tracer.operand(node, index, ids)
        except NoSourceError as reason:
            reasons.append(str(reason))
            continue
        scalar = _is_single(node.inputs[1 - index])
        return found if scalar else dataclasses.replace(found, linear=False)
    raise NoSourceError("; ".join(dict.fromkeys(reasons)) or f"it comes through {at(node)}")


def chosen(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """Where, of which one branch is zero."""
    del value
    for index in (1, 2):
        other = qgraph.ir.constant(node.inputs[3 - index])
        if other is not None and not other.any():
            found = tracer.operand(node, index, ids)
            return dataclasses.replace(found, linear=False)
    raise NoSourceError(f"neither branch of {at(node)} is zero")


def _is_single(value: ir.Value | None) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.size == 1


# --- movement ---------------------------------------------------------------------------------------------------------


def transposed(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """Axes in another order."""
    del value
    perm = node.attributes.get_ints("perm", ()) or range(len(tracer.dims(node.inputs[0])))[::-1]
    ids = ids.reshape([1] * (len(perm) - ids.ndim) + list(ids.shape))
    return tracer.up(node.inputs[0], ids.transpose(np.argsort(perm)), [node])


def reshaped(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """Axes joined or cut."""
    after, before = tracer.dims(value), tracer.dims(node.inputs[0])
    gathered = _side_by_side(ids, after, before)
    if gathered is None:
        return tracer.up(node.inputs[0], _reshape(ids, after, before), [node])
    ids, tied = gathered
    return Found(ties=(tied,)) + tracer.up(node.inputs[0], ids, [node])


def expanded(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """What is repeated takes one factor."""
    del value
    narrow, ties = tracer.narrowed(node.inputs[0], ids)
    return Found(ties=ties) + tracer.up(node.inputs[0], narrow, [node])


def split(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """One part of an input whose other parts stay as they are."""
    axis = node.attributes.get_int("axis", 0)
    place = axis if axis < 0 else axis - len(tracer.dims(node.inputs[0]))
    sizes = [tracer.dims(one)[place] for one in node.outputs]
    if -place > ids.ndim or any(not isinstance(size, int) for size in sizes):
        raise NoSourceError(f"{at(node)} does not split channels")
    whole = [int(size) for size in sizes if isinstance(size, int)]
    number = next(index for index, one in enumerate(node.outputs) if one is value)
    shape = list(ids.shape)
    shape[place] = whole[number]
    part = np.broadcast_to(ids, shape)
    shape[place] = sum(whole)
    source = np.full(shape, NONE)
    start = sum(whole[:number])
    np.moveaxis(source, place, 0)[start : start + whole[number]] = np.moveaxis(part, place, 0)
    return tracer.up(node.inputs[0], source, [node])


def joined(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """Each input takes its part."""
    axis = node.attributes.get_int("axis", 0)
    place = axis if axis < 0 else axis - len(tracer.dims(value))
    found, start = Found(), 0
    for index, one in enumerate(node.inputs):
        part = ids
        if -place <= ids.ndim and ids.shape[place] > 1:
            size = tracer.dims(one)[place]
            if not isinstance(size, int):
                raise NoSourceError(f"the size of '{one.name if one else ''}' is not certain")
            part = np.take(ids, range(start, start + size), place)
            start += size
        constant = constant_tensor(one)
        if constant is not None:
            found += Found((vector(node, index, part),))
        elif (part != NONE).any():
            found += tracer.up(one, part, [node])
    return found


def _side_by_side(
    ids: np.ndarray, after: Dims, before: Dims
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]] | None:
    """Take ids of [batch, heads, rows, size] back to [batch, groups, heads of a group * rows, size].

    Decoders lay the query heads that share their values side by side in this way, and multiply them as rows, so that
    the heads of a group are tied. Returns None for other shapes.
    """
    if len(after) != 4 or len(before) != 4 or after[0] != before[0] or after[3] != before[3]:
        return None
    heads, groups = after[1], before[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or groups >= heads or heads % groups:
        return None
    ids = ids.reshape([1] * (4 - ids.ndim) + list(ids.shape))
    if ids.shape[:3] != (1, heads, 1):
        return None
    grouped = ids.reshape(1, groups, heads // groups, ids.shape[3])
    first, rest = grouped[:, :, :1], grouped[:, :, 1:]
    return first, tie(np.broadcast_to(first, rest.shape), rest)


def _reshape(ids: np.ndarray, after: Dims, before: Dims) -> np.ndarray:
    """Take ids of a reshaped value back to the shape before.

    Raises:
        NoSourceError: channels are mixed with sizes that are not known.
    """
    ids = ids.reshape([1] * (len(after) - ids.ndim) + list(ids.shape))
    whole: list[int] = []
    shape: list[int] = []
    for wide, narrow in _blocks(after, before):
        old, new = after[wide], before[narrow]
        sizes = ids.shape[wide]
        if all(size == 1 for size in sizes):
            whole[:0], shape[:0] = sizes, [1] * len(new)
            continue
        static = [dim for dim in (*old, *new) if isinstance(dim, int)]
        if len(static) < len(old) + len(new):
            raise NoSourceError("channels are reshaped together with rows")
        whole[:0], shape[:0] = static[: len(old)], static[len(old) :]
    return np.broadcast_to(ids, whole).reshape(shape)


def _blocks(after: Dims, before: Dims) -> list[tuple[slice, slice]]:
    """Cut two shapes of the same number of elements, from the right, into runs that stand for each other."""
    blocks = []
    right, other_right = len(after), len(before)
    while right or other_right:
        left, other_left = _block(after[:right], before[:other_right])
        blocks.append((slice(left, right), slice(other_left, other_right)))
        right, other_right = left, other_left
    return blocks


def _block(after: Dims, before: Dims) -> tuple[int, int]:
    """Return where the last run of each starts."""
    if after and before and after[-1] == before[-1]:
        return len(after) - 1, len(before) - 1
    left, other_left = len(after), len(before)
    size, other_size = 1, 1
    while True:
        if size <= other_size and left and isinstance(dim := after[left - 1], int):
            left, size = left - 1, size * dim
        elif other_size <= size and other_left and isinstance(dim := before[other_left - 1], int):
            other_left, other_size = other_left - 1, other_size * dim
        else:
            return 0, 0
        if size == other_size:
            return left, other_left


# --- norms ------------------------------------------------------------------------------------------------------------


def normalized(tracer: Tracer, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
    """Weight and bias take it, over the last axis alone."""
    weight, bias = _NORMS[key(node)]
    if value is not node.outputs[0] or ids.size != ids.shape[-1]:
        raise NoSourceError(f"it is a side output of {at(node)}")
    places = [place for place in (weight, bias) if place < len(node.inputs) and node.inputs[place] is not None]
    for place in places:
        if constant_tensor(node.inputs[place]) is None or tracer.dims(node.inputs[place]) != (ids.size,):
            raise NoSourceError(f"{at(node)} has no constant weight per channel")
    if weight not in places:
        raise NoSourceError(f"{at(node)} has no weight")
    return Found(tuple(vector(node, place, ids.reshape(-1)) for place in places), linear=False)


_NORMS = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1, 99),
    ("", "SimplifiedLayerNormalization"): (1, 99),
    (_MICROSOFT, "SimplifiedLayerNormalization"): (1, 99),
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): (2, 99),
    (_MICROSOFT, "SkipLayerNormalization"): (2, 3),
}
"""Where weight and bias stand among the inputs; 99 is nowhere."""

RULES: Mapping[Key, Rule] = {
    **{("", op): Tracer.passed for op in ("Identity", "Cast", "Dropout", "Neg")},
    **{("", op): Tracer.bent for op in ("Relu", "LeakyRelu")},
    **{("", op): Tracer.added for op in ("Add", "Sub")},
    **{("", op): multiplied for op in ("Mul", "Div")},
    **{("", op): reshaped for op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")},
    **dict.fromkeys(_NORMS, normalized),
    ("", "Transpose"): transposed,
    ("", "Expand"): expanded,
    ("", "Split"): split,
    ("", "Concat"): joined,
    ("", "Where"): chosen,
    **PRODUCT_RULES,
}
