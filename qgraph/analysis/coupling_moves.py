"""Coupled dimensions of what moves, joins, divides and repeats elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis import symbols
from qgraph.analysis.coupling import Coupling, Cut, at
from qgraph.analysis.coupling_tools import Rule, axis_of, freeze_all, input_of
from qgraph.analysis.dimensions import Axis

__all__ = ["MOVES", "follow_target"]


def _transpose(node: ir.Node, found: Coupling) -> None:
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    if before is None or after is None:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    perm = node.attributes.get_ints("perm", ()) or range(len(before))[::-1]
    for axis, source in zip(after, perm, strict=True):
        found.join(before[source], axis, node)


def _reshape(node: ir.Node, found: Coupling) -> None:
    """Axes that make up the same product are the same indices; the stated sizes follow."""
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    dims, new_dims = found.shapes.dims(source), found.shapes.dims(result)
    before, after = found.of(source), found.of(result)
    if dims is None or new_dims is None or before is None or after is None:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    for olds, news in _blocks(dims, new_dims):
        _join_block(node, found, [before[index] for index in olds], [after[index] for index in news])
    if node.op_type == "Reshape":
        for index, entry in enumerate(_entries(found, node.inputs[1]) or ()):
            if entry == 0 and index < len(before):
                found.join(before[index], after[index], node)  # it copies the size
        follow_target(node, found, 1, after)


def _blocks(dims: Sequence[symbols.Dim], others: Sequence[symbols.Dim]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of axes, by their indices, that hold the same number of elements; axes of 1 left out."""
    ones, twos = ([index for index, dim in enumerate(side) if dim != 1] for side in (dims, others))
    left = _prefixes([dims[index] for index in ones])
    right = {str(product): index for index, product in enumerate(_prefixes([others[index] for index in twos]))}
    marks = [(0, 0)]
    for index, product in enumerate(left[1:], start=1):
        place = right.get(str(product))
        if place is not None and place > marks[-1][1]:
            marks.append((index, place))
    if marks[-1] != (len(ones), len(twos)):
        marks.append((len(ones), len(twos)))
    return [(ones[a:b], twos[c:d]) for (a, c), (b, d) in pairwise(marks)]


def _prefixes(dims: Sequence[symbols.Dim]) -> list[symbols.Dim]:
    found: list[symbols.Dim] = [1]
    for dim in dims:
        found.append(symbols.mul(found[-1], dim))
    return found


def _join_block(node: ir.Node, found: Coupling, before: Sequence[Axis | None], after: Sequence[Axis | None]) -> None:
    if all(axis is None for axis in (*before, *after)):
        return
    known = [[axis for axis in side if axis is not None] for side in (before, after)]
    products = [found.dimensions.product(side) for side in known]
    if len(known[0]) == len(before) and len(known[1]) == len(after) and None not in products:
        found.join(products[0], products[1], node)
        return
    for axis in (*before, *after):
        found.freeze(axis, f"{at(node)} arranges it in a way that cannot be followed")


def follow_target(node: ir.Node, found: Coupling, index: int, axes: Sequence[Axis | None]) -> None:
    """Let a shape that a node takes as an input follow its axes; freeze those of which it says what cannot be changed.

    Sizes of -1 and 0 follow by themselves.
    """
    target = input_of(node, index)
    data = found.data(target)
    if target is None or data is None or len(data.elements) != len(axes):
        for axis in axes:
            found.freeze(axis, f"the shape that {at(node)} makes is computed")
        return
    entries = _entries(found, target)
    stated = {}
    for place, axis in enumerate(axes):
        if axis is None or axis.size == 1:
            continue
        entry = entries[place] if entries is not None and place < len(entries) else None
        if entry is None:
            found.freeze(axis, f"the shape that {at(node)} makes is computed")
        elif entry == axis.size:
            stated[place] = axis

    def edit(model: ir.Model, cut: Cut) -> None:
        sizes = {place: cut.size(axis) for place, axis in stated.items() if cut.indices(axis) is not None}
        if sizes:
            node.replace_input_with(index, _with_entries(model, found, node, index, sizes))

    if stated:
        found.edits.append(edit)


def _entries(found: Coupling, target: ir.Value | None) -> list[int | None] | None:
    """Return the entries of a vector that stand in constants, None for the others; None if it is no such vector."""
    array = qgraph.ir.constant(target)
    if array is not None:
        return [int(entry) for entry in array.reshape(-1)]
    node = None if target is None else target.producer()
    if node is None or not qgraph.ir.is_op(node, "Concat"):
        return None
    entries: list[int | None] = []
    for piece in node.inputs:
        inner = _piece(found, piece)
        if inner is None:
            return None
        entries += inner
    return entries


def _piece(found: Coupling, piece: ir.Value | None) -> list[int | None] | None:
    """Return the entries of a part of a vector, None for what is computed; None where its length is not known."""
    entries = _entries(found, piece)
    if entries is not None or piece is None:
        return entries
    dims = found.shapes.dims(piece)
    return [None] * dims[0] if dims is not None and len(dims) == 1 and isinstance(dims[0], int) else None


def _with_entries(model: ir.Model, found: Coupling, node: ir.Node, index: int, sizes: Mapping[int, int]) -> ir.Value:
    """Return the vector that a node reads, with other entries at some places, for this reader alone."""

    def changed(target: ir.Value | None, places: Mapping[int, int]) -> ir.Value:
        assert target is not None
        array = qgraph.ir.constant(target)
        if array is not None:
            vector = array.reshape(-1).astype(np.int64)
            for place, size in places.items():
                vector[place] = size
            return qgraph.ir.initializer(model.graph, f"{target.name}_cut", vector)
        concat = target.producer()
        assert concat is not None
        start, pieces = 0, []
        for piece in concat.inputs:
            assert piece is not None
            length = len(_piece(found, piece) or ())
            inside = {place - start: size for place, size in places.items() if start <= place < start + length}
            pieces.append(changed(piece, inside) if inside else piece)
            start += length
        joined = ir.node("Concat", pieces, {"axis": 0}, name=qgraph.ir.fresh_name(model.graph, f"{target.name}_cut"))
        result = joined.outputs[0]
        result.name, result.type, result.shape = joined.name, target.type, target.shape
        qgraph.ir.insert_before(node, joined)
        return result

    return changed(node.inputs[index], sizes)


def _expand(node: ir.Node, found: Coupling) -> None:
    source = node.inputs[0]
    after = found.of(node.outputs[0])
    if source is None or after is None:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    found.same(source, node.outputs[0], node)
    follow_target(node, found, 1, after)


def _tile(node: ir.Node, found: Coupling) -> None:
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    repeats = found.static(input_of(node, 1))
    if before is None or after is None or repeats is None:
        freeze_all(node, found, f"how often {at(node)} repeats is not known")
        return
    for axis, tiled, times in zip(before, after, repeats, strict=True):
        if times == 1:
            found.join(axis, tiled, node)
        else:
            found.freeze(axis, f"{at(node)} repeats it")
            found.freeze(tiled, f"{at(node)} repeats it")


def _concat(node: ir.Node, found: Coupling) -> None:
    result = found.of(node.outputs[0])
    parts = [found.of(value) for value in node.inputs]
    if result is None or any(part is None or len(part) != len(result) for part in parts):
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    along = axis_of(node, 0, len(result))
    joined = [part[along] for part in parts if part is not None]
    if all(axis is not None for axis in joined):
        whole = Axis(
            tuple(term for axis in joined if axis is not None for term in found.dimensions.resolved(axis).terms)
        )
        found.join(whole, result[along], node)
    else:
        for axis in (*joined, result[along]):
            found.freeze(axis, f"{at(node)} joins it with something of uncertain size")
    for part in parts:
        for index, axis in enumerate(part or ()):
            if index != along:
                found.join(axis, result[index], node)


def _split(node: ir.Node, found: Coupling) -> None:
    source = found.of(node.inputs[0])
    parts = [found.of(value) for value in node.outputs]
    if source is None or any(part is None for part in parts):
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    along = axis_of(node, 0, len(source))
    axes = [part[along] for part in parts if part is not None]
    known = [axis for axis in axes if axis is not None]
    if len(known) == len(axes):
        whole = Axis(tuple(term for axis in known for term in axis.terms))
        found.join(whole, source[along], node)
        _follow_split(node, found, known)
    else:
        for axis in (source[along], *axes):
            found.freeze(axis, f"{at(node)} splits it at places that are not certain")
    for part in parts:
        for index, axis in enumerate(part or ()):
            if index != along:
                found.join(axis, source[index], node)


def _follow_split(node: ir.Node, found: Coupling, parts: Sequence[Axis]) -> None:
    def edit(model: ir.Model, cut: Cut) -> None:
        if all(cut.indices(axis) is None for axis in parts):
            return
        sizes = [cut.size(axis) for axis in parts]
        node.attributes.pop("num_outputs", None)
        if "split" in node.attributes:
            node.attributes["split"] = ir.AttrInt64s("split", sizes)
            return
        node.resize_inputs(2)
        name = f"{node.outputs[0].name}_split"
        node.replace_input_with(1, qgraph.ir.initializer(model.graph, name, np.array(sizes, np.int64)))

    if "split" not in node.attributes and (node.version or 13) < 13:
        for axis in parts:
            found.freeze(axis, f"{at(node)} splits it into equal parts")
        return
    found.edits.append(edit)


def _slice(node: ir.Node, found: Coupling) -> None:
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    if before is None or after is None:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    starts, axes = found.static(input_of(node, 1)), found.static(input_of(node, 3))
    if axes is None and input_of(node, 3) is None and starts is not None:
        axes = list(range(len(starts)))
    touched = range(len(before)) if axes is None or len(node.inputs) < 2 else [axis % len(before) for axis in axes]
    for index, (axis, part) in enumerate(zip(before, after, strict=True)):
        whole = axis is not None and part is not None and axis.size == part.size
        if index in touched and not whole:
            for one in (axis, part):
                found.freeze(one, f"{at(node)} takes a part of it")
        elif index in touched:
            found.join(axis, part, node)
            found.freeze(axis, f"{at(node)} may turn it around")
        else:
            found.join(axis, part, node)


def _gather(node: ir.Node, found: Coupling) -> None:
    """The axis that is looked up along stays whole; the others go on."""
    data, indices, result = found.of(node.inputs[0]), found.of(node.inputs[1]), found.of(node.outputs[0])
    if data is None or indices is None or result is None:
        freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    along = axis_of(node, 0, len(data))
    found.freeze(data[along], f"{at(node)} looks up along it")
    for index, axis in enumerate(data):
        if index != along:
            place = index if index < along else index + len(indices) - 1
            found.join(axis, result[place], node)
    for index, axis in enumerate(indices):
        found.join(axis, result[along + index], node)


def _pad(node: ir.Node, found: Coupling) -> None:
    """What is padded is a sum of the padding before, what was there, and the padding behind."""
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    pads = node.attributes.get_ints("pads", ()) or found.static(input_of(node, 1))
    mode = node.attributes.get_string("mode", "constant")
    if before is None or after is None or pads is None or len(pads) != 2 * len(before):
        freeze_all(node, found, f"how {at(node)} pads is not known")
        return
    for index, (axis, padded) in enumerate(zip(before, after, strict=True)):
        left, right = pads[index], pads[index + len(before)]
        if not left and not right:
            found.join(axis, padded, node)
        elif axis is None or padded is None or min(left, right) < 0 or mode != "constant":
            found.freeze(axis, f"{at(node)} pads it")
            found.freeze(padded, f"{at(node)} pads it")
        else:
            _join_padded(node, found, axis, padded, (index, left), (index + len(before), right))


def _join_padded(
    node: ir.Node, found: Coupling, axis: Axis, padded: Axis, before: tuple[int, int], behind: tuple[int, int]
) -> None:
    """Join an axis and its padded form; `before` and `behind` are places in the pads and what stands there."""
    sides = {place: found.dimensions.axis(size) for place, size in (before, behind) if size}
    left, right = (found.dimensions.resolved(sides[place]).terms if size else () for place, size in (before, behind))
    found.join(Axis((*left, *found.dimensions.resolved(axis).terms, *right)), padded, node)

    def edit(model: ir.Model, cut: Cut) -> None:
        sizes = {place: cut.size(side) for place, side in sides.items() if cut.indices(side) is not None}
        if not sizes:
            return
        if "pads" in node.attributes:
            pads = list(node.attributes.get_ints("pads", ()))
            for place, size in sizes.items():
                pads[place] = size
            node.attributes["pads"] = ir.AttrInt64s("pads", pads)
        else:
            node.replace_input_with(1, _with_entries(model, found, node, 1, sizes))

    if "pads" not in node.attributes and qgraph.ir.constant(input_of(node, 1)) is None:
        for side in sides.values():
            found.freeze(side, f"{at(node)} computes how much it pads")
    found.edits.append(edit)


def _constant(node: ir.Node, found: Coupling) -> None:
    """What stands in a node and not in an initializer is not cut: `lift-constants` makes initializers of them."""
    for value in node.outputs:
        found.freeze_value(value, f"it stands in {at(node)}: put lift-constants before")


def _shape(node: ir.Node, found: Coupling) -> None:
    """What is read off a tensor follows it by itself; what is made of that is found by `follow_target`."""
    del node, found


MOVES: Mapping[tuple[str, str], Rule] = {
    **{("", op): _reshape for op in ("Flatten", "Reshape", "Squeeze", "Unsqueeze")},
    **{("", op): _shape for op in ("Shape", "Size")},
    ("", "Constant"): _constant,
    ("", "Concat"): _concat,
    ("", "Expand"): _expand,
    ("", "Gather"): _gather,
    ("", "Pad"): _pad,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Tile"): _tile,
    ("", "Transpose"): _transpose,
}
"""Domain and operator -> rule."""
