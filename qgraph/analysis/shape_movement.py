"""Shapes of what moves data about: slices, joins, reshapes and their like, and of what computes shapes.

Source: the operator reference of ONNX, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.analysis import symbols
from qgraph.analysis.shape_facts import (
    Data,
    Dims,
    Fact,
    Facts,
    PartialDims,
    UnknownShapeError,
    agreed,
    axis_in,
    broadcast,
    dims_of,
    input_of,
    int_of,
    ints_of,
    is_never_negative,
    rule,
)
from qgraph.analysis.symbols import Dim

__all__: list[str] = []

_UNBOUNDED = (1 << 31) - 1
"""Exporters write this or more where a slice goes to the end."""


@rule("Shape")
def _shape(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    end = node.attributes.get("end")
    dims = dims_of(node, facts)[int_of(node, "start", 0) : None if end is None else end.as_int()]
    return [Fact(ir.DataType.INT64, (len(dims),), Data(dims))]


@rule("Size")
def _size(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(ir.DataType.INT64, (), Data((symbols.product(dims_of(node, facts)),), scalar=True))]


@rule("Gather")
def _gather(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims, indices = dims_of(node, facts), dims_of(node, facts, 1)
    axis = axis_in(int_of(node, "axis", 0), len(dims))
    data, at = facts.data(node.inputs[0]), facts.array(node.inputs[1])
    elements = None
    if data is not None and at is not None and at.ndim < 2:
        elements = Data(tuple(data.elements[int(index)] for index in at.reshape(-1)), at.ndim == 0)
    return [Fact(facts.dtype(node.inputs[0]), dims[:axis] + indices + dims[axis + 1 :], elements)]


@rule("GatherElements")
def _gather_elements(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(facts.dtype(node.inputs[0]), dims_of(node, facts, 1))]


@rule("GatherND")
def _gather_nd(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims, indices = dims_of(node, facts), dims_of(node, facts, 1)
    length = indices[-1]
    if not isinstance(length, int):
        raise UnknownShapeError("the length of its index tuples is not known")
    return [Fact(facts.dtype(node.inputs[0]), indices[:-1] + dims[int_of(node, "batch_dims", 0) + length :])]


@rule("Concat")
def _concat(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    shapes = [dims_of(node, facts, index) for index in range(len(node.inputs))]
    axis = axis_in(int_of(node, "axis", 1), len(shapes[0]))
    total: Dim = 0
    for shape in shapes:
        total = symbols.add(total, shape[axis])
    merged = [agreed([shape[other] for shape in shapes]) for other in range(len(shapes[0]))]
    data = [facts.data(value) for value in node.inputs]
    elements = Data(tuple(one for part in data if part is not None for one in part.elements))
    whole = len(shapes[0]) == 1 and all(part is not None for part in data)
    return [
        Fact(facts.dtype(node.inputs[0]), (*merged[:axis], total, *merged[axis + 1 :]), elements if whole else None)
    ]


@rule("Slice")
def _slice(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = list[Dim | None](dims_of(node, facts))
    axes = ints_of(node, facts, "axes", 3)
    steps = ints_of(node, facts, "steps", 4)
    starts, ends = (_limits(node, facts, name, index) for name, index in (("starts", 1), ("ends", 2)))
    axes = tuple(range(len(starts))) if axes is None else axes
    steps = (1,) * len(axes) if steps is None else steps
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = dims[axis_in(axis, len(dims))]
        dims[axis_in(axis, len(dims))] = None if size is None else _sliced(size, start, end, step)
    data = facts.data(node.inputs[0])
    elements = None
    if data is not None and isinstance(starts[0], int) and isinstance(ends[0], int) and len(starts) == 1:
        start, end, step = starts[0], ends[0], steps[0]
        last = None if step < 0 and end < -len(data.elements) else end
        elements = Data(data.elements[start:last:step])
    return [Fact(facts.dtype(node.inputs[0]), tuple(dims), elements)]


def _limits(node: ir.Node, facts: Facts, name: str, index: int) -> tuple[Dim | None, ...]:
    attribute = node.attributes.get(name)
    if attribute is not None:
        return tuple(attribute.as_ints())
    data = facts.data(input_of(node, index))
    if data is None:
        length = dims_of(node, facts, index)[0]
        if not isinstance(length, int):
            raise UnknownShapeError(f"its {name} are not known")
        return (None,) * length
    return data.elements


def _sliced(size: Dim, start: Dim | None, end: Dim | None, step: int) -> Dim | None:
    """Return how many elements lie between start and end of an axis, as Slice counts."""
    if start is None or end is None or step == 0:
        return None
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice(start, None if step < 0 and end < -size else end, step).indices(size)))
    if step != 1:
        return None
    to_the_end = end == size or (isinstance(end, int) and end >= _UNBOUNDED)
    if isinstance(start, int) and start < 0:
        return symbols.minimum(size, -start) if to_the_end else None
    if not is_never_negative(start):
        return None
    if to_the_end or (isinstance(end, int) and end < 0):
        left = symbols.sub(size if to_the_end else symbols.add(size, end), start)
        return left if left == size or is_never_negative(left) else symbols.maximum(left, 0)
    return symbols.minimum(size, end) if start == 0 and is_never_negative(end) else None


@rule("Split")
def _split(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    axis = axis_in(int_of(node, "axis", 0), len(dims))
    count = len(node.outputs)
    try:
        given = ints_of(node, facts, "split", 1)
    except UnknownShapeError:
        sizes: PartialDims = (None,) * count
    else:
        sizes = given if given is not None else _even_parts(dims[axis], count)
    dtype = facts.dtype(node.inputs[0])
    return [Fact(dtype, (*dims[:axis], size, *dims[axis + 1 :])) for size in sizes]


def _even_parts(size: Dim, count: int) -> PartialDims:
    if isinstance(size, int):
        part = -(-size // count)
        return (*(part,) * (count - 1), size - part * (count - 1))
    return (symbols.divide(size, count),) * count


@rule("Squeeze")
def _squeeze(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    given = ints_of(node, facts, "axes", 1)
    if given is None and not all(isinstance(dim, int) for dim in dims):
        raise UnknownShapeError("it is not known which of its dimensions are 1")
    gone = {i for i, dim in enumerate(dims) if dim == 1} if given is None else {axis_in(a, len(dims)) for a in given}
    left = tuple(dim for axis, dim in enumerate(dims) if axis not in gone)
    return [Fact(facts.dtype(node.inputs[0]), left, _reranked(facts.data(node.inputs[0]), len(left)))]


def _reranked(data: Data | None, rank: int) -> Data | None:
    if data is None or rank > 1 or (rank == 0 and len(data.elements) != 1):
        return None
    return Data(data.elements, rank == 0)


@rule("Unsqueeze")
def _unsqueeze(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = list(dims_of(node, facts))
    axes = ints_of(node, facts, "axes", 1) or ()
    rank = len(dims) + len(axes)
    for axis in sorted(axis_in(axis, rank) for axis in axes):
        dims.insert(axis, 1)
    return [Fact(facts.dtype(node.inputs[0]), tuple(dims), _reranked(facts.data(node.inputs[0]), rank))]


@rule("Reshape")
def _reshape(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = facts.dims(node.inputs[0]) if node.inputs[0] is not None else None
    target = facts.data(input_of(node, 1))
    dtype = facts.dtype(node.inputs[0])
    if target is None:
        (rank,) = dims_of(node, facts, 1)
        if not isinstance(rank, int):
            raise UnknownShapeError("it reshapes to a rank that is computed at run time")
        return [Fact(dtype, (None,) * rank)]
    result = _reshaped(dims, target.elements, copies=not int_of(node, "allowzero", 0))
    return [Fact(dtype, result, _reranked(facts.data(node.inputs[0]), len(result)))]


def _reshaped(dims: Dims | None, target: tuple[Dim | None, ...], *, copies: bool) -> PartialDims:
    result: list[Dim | None] = []
    for axis, size in enumerate(target):
        if size == 0 and copies:
            result.append(dims[axis] if dims is not None and axis < len(dims) else None)
        else:
            result.append(None if size == -1 else size)
    missing = [axis for axis, size in enumerate(result) if size is None]
    if dims is not None and len(missing) == 1:
        result[missing[0]] = symbols.quotient(dims, [size for size in result if size is not None])
    return tuple(result)


@rule("Flatten")
def _flatten(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    axis = int_of(node, "axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    return [Fact(facts.dtype(node.inputs[0]), (symbols.product(dims[:axis]), symbols.product(dims[axis:])))]


@rule("Transpose")
def _transpose(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = dims_of(node, facts)
    order = node.attributes.get_ints("perm", range(len(dims))[::-1])
    if sorted(order) != list(range(len(dims))):
        raise UnknownShapeError(f"perm={list(order)} does not fit {len(dims)} dimensions")
    return [Fact(facts.dtype(node.inputs[0]), tuple(dims[axis] for axis in order))]


@rule("Expand")
def _expand(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims, target = dims_of(node, facts), facts.data(input_of(node, 1))
    if target is None:
        (rank,) = dims_of(node, facts, 1)
        if not isinstance(rank, int):
            raise UnknownShapeError("it expands to a rank that is computed at run time")
        target = Data((None,) * rank)
    return [Fact(facts.dtype(node.inputs[0]), broadcast(dims, target.elements))]


@rule("Tile")
def _tile(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims, repeats = dims_of(node, facts), facts.data(input_of(node, 1))
    if repeats is None:
        return [Fact(facts.dtype(node.inputs[0]), (None,) * len(dims))]
    pairs = zip(dims, repeats.elements, strict=True)
    tiled = tuple(None if times is None else symbols.mul(dim, times) for dim, times in pairs)
    return [Fact(facts.dtype(node.inputs[0]), tiled)]


@rule("Pad")
def _pad(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims = list[Dim | None](dims_of(node, facts))
    axes = ints_of(node, facts, "axes", 3) or tuple(range(len(dims)))
    attribute = node.attributes.get("pads")
    data = Data(tuple(attribute.as_ints())) if attribute is not None else facts.data(input_of(node, 1))
    pads = data.elements if data is not None else (None,) * (2 * len(axes))
    for place, axis in enumerate(axes):
        before, after, dim = pads[place], pads[place + len(axes)], dims[axis_in(axis, len(dims))]
        known = before is not None and after is not None and dim is not None
        dims[axis_in(axis, len(dims))] = symbols.add(symbols.add(dim, before), after) if known else None  # type: ignore[arg-type]
    return [Fact(facts.dtype(node.inputs[0]), tuple(dims))]


@rule("ConstantOfShape")
def _constant_of_shape(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    value = node.attributes.get("value")
    dtype = value.as_tensor().dtype if value is not None else ir.DataType.FLOAT
    data = facts.data(input_of(node, 0))
    if data is not None:
        return [Fact(dtype, data.elements)]
    (rank,) = dims_of(node, facts)
    if not isinstance(rank, int):
        raise UnknownShapeError("its rank is computed at run time")
    return [Fact(dtype, (None,) * rank)]


@rule("Range")
def _range(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dtype = facts.dtype(node.inputs[0])
    known = [facts.data(value) for value in node.inputs]
    start, limit, delta = (one.elements[0] if one is not None else None for one in known)
    if start is None or limit is None or delta != 1:
        return [Fact(dtype, (None,))]
    length = symbols.sub(limit, start)
    return [Fact(dtype, (length if is_never_negative(length) else symbols.maximum(length, 0),))]


@rule("OneHot")
def _one_hot(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    indices = dims_of(node, facts)
    axis = axis_in(int_of(node, "axis", -1), len(indices) + 1)
    depth = facts.data(node.inputs[1])
    size = depth.elements[0] if depth is not None else None
    return [Fact(facts.dtype(node.inputs[2]), (*indices[:axis], size, *indices[axis:]))]


@rule("DepthToSpace", "SpaceToDepth")
def _blocks(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    n, c, h, w = dims_of(node, facts)
    block = int_of(node, "blocksize", 0)
    if block < 1:
        raise UnknownShapeError(f"blocksize={block} is not possible")
    dims: PartialDims = (n, symbols.mul(c, block * block), symbols.floordiv(h, block), symbols.floordiv(w, block))
    if node.op_type == "DepthToSpace":
        dims = (n, symbols.floordiv(c, block * block), symbols.mul(h, block), symbols.mul(w, block))
    return [Fact(facts.dtype(node.inputs[0]), dims)]


@rule("NonZero")
def _non_zero(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    return [Fact(ir.DataType.INT64, (len(dims_of(node, facts)), None))]


@rule("Resize", "Upsample")
def _resize(node: ir.Node, facts: Facts) -> Sequence[Fact]:
    dims, dtype = dims_of(node, facts), facts.dtype(node.inputs[0])
    unknown = [Fact(dtype, (None,) * len(dims))]
    sizes = facts.data(input_of(node, 3))
    stretched = node.attributes.get_string("keep_aspect_ratio_policy", "stretch") == "stretch"
    cropped = node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    if "axes" in node.attributes or not stretched or cropped:
        return unknown
    if sizes is not None:
        return [Fact(dtype, sizes.elements)]
    scales = _scales(node, facts)
    if scales is None or len(scales) != len(dims):
        return unknown
    return [Fact(dtype, tuple(_scaled(dim, scale) for dim, scale in zip(dims, scales, strict=True)))]


def _scales(node: ir.Node, facts: Facts) -> Sequence[float] | None:
    attribute = node.attributes.get("scales")
    if attribute is not None:
        return attribute.as_floats()
    array = facts.array(input_of(node, 2 if len(node.inputs) > 2 else 1))
    return None if array is None else [float(scale) for scale in array.reshape(-1)]


def _scaled(dim: Dim, scale: float) -> Dim | None:
    if isinstance(dim, int):
        return int(np.float32(dim) * np.float32(scale))
    return symbols.mul(dim, int(scale)) if scale == int(scale) else None
