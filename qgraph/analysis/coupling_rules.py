"""What operators do to the dimensions of tensors; see `qgraph.analysis.coupling`.

A rule takes a node and the coupling so far, joins axes of inputs and outputs, freezes what must not be cut, and adds
edits for the sizes that the node states in attributes or constant inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis import symbols
from qgraph.analysis.coupling import Coupling, Cut, at
from qgraph.analysis.dimensions import Axis

__all__ = ["COVERED", "apply"]

Rule = Callable[[ir.Node, Coupling], None]

_MICROSOFT = "com.microsoft"


def apply(node: ir.Node, found: Coupling) -> None:
    """Apply the rule of a node's operator; without one, freeze all that it reads and gives."""
    domain = "" if node.domain in ("", "ai.onnx") else node.domain
    rule = _RULES.get((domain, node.op_type))
    inner = [value for graph in qgraph.ir.inner_graphs(node) for one in graph.all_nodes() for value in one.inputs]
    for value in inner:
        if value is not None and value.graph is node.graph:
            found.freeze_value(value, f"a subgraph of {at(node)} reads it")
    if rule is None:
        _freeze_all(node, found, f"{at(node)} is not understood")
    else:
        rule(node, found)


def _freeze_all(node: ir.Node, found: Coupling, reason: str) -> None:
    for value in (*node.inputs, *node.outputs):
        found.freeze_value(value, reason)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _axis(node: ir.Node, default: int, rank: int) -> int:
    return node.attributes.get_int("axis", default) % max(rank, 1)


# --- element by element -----------------------------------------------------------------------------------------------


def _elementwise(node: ir.Node, found: Coupling) -> None:
    for value in node.inputs:
        if value is not None:
            found.same(value, node.outputs[0], node)


def _first(node: ir.Node, found: Coupling) -> None:
    """The first input and output have the same axes; the others are not about axes."""
    assert node.inputs[0] is not None
    found.same(node.inputs[0], node.outputs[0], node)
    for output in node.outputs[1:]:
        found.freeze_value(output, f"it is a side output of {at(node)}")
    if node.op_type in _UNARY:
        for parameter in node.inputs[1:]:
            found.freeze_value(parameter, f"it is a parameter of {at(node)}")


def _softmax(node: ir.Node, found: Coupling) -> None:
    _first(node, found)
    axes = found.of(node.outputs[0]) or ()
    old = (node.version or 13) < 13
    start = _axis(node, 1 if old else -1, len(axes))
    for axis in axes[start:] if old else axes[start : start + 1]:
        found.freeze(axis, f"{at(node)} sums over it")


def _along(default: int) -> Rule:
    """The axis that the operator works along is not cut."""

    def rule(node: ir.Node, found: Coupling) -> None:
        _first(node, found)
        axes = found.of(node.outputs[0]) or ()
        if axes:
            found.freeze(axes[_axis(node, default, len(axes))], f"{at(node)} works along it")

    return rule


def _layer_norm(node: ir.Node, found: Coupling) -> None:
    _first(node, found)
    axes = found.of(node.outputs[0]) or ()
    for axis in axes[_axis(node, -1, len(axes)) :]:
        found.freeze(axis, f"{at(node)} normalizes over it")
    for value in node.inputs[1:]:
        if value is not None:
            found.same(value, node.outputs[0], node)


def _skip_norm(node: ir.Node, found: Coupling) -> None:
    for value in (*node.inputs, *node.outputs):
        found.freeze_value(value, f"{at(node)} normalizes over it")


def _batch_norm(node: ir.Node, found: Coupling) -> None:
    _first(node, found)
    axes = found.of(node.outputs[0]) or ()
    for value in node.inputs[1:]:
        vector = found.of(value)
        if vector and len(axes) > 1:
            found.join(vector[0], axes[1], node)
    if node.op_type == "InstanceNormalization":
        for axis in axes[2:]:
            found.freeze(axis, f"{at(node)} normalizes over it")


def _linear_dequantize(node: ir.Node, found: Coupling) -> None:
    _first(node, found)
    axes = found.of(node.outputs[0]) or ()
    blocked = node.attributes.get_int("block_size", 0) != 0
    for value in node.inputs[1:]:
        parameters = found.of(value)
        if blocked:
            found.freeze_value(node.outputs[0], f"{at(node)} has a scale for every block of it")
        elif parameters is not None and len(parameters) == 1 and axes:
            found.join(parameters[0], axes[_axis(node, 1, len(axes))], node)


# --- products ---------------------------------------------------------------------------------------------------------


def _matmul(node: ir.Node, found: Coupling) -> None:
    left, right, result = found.of(node.inputs[0]), found.of(node.inputs[1]), found.of(node.outputs[0])
    if left is None or right is None or result is None or len(left) < 2 or len(right) < 2:
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    found.join(left[-1], right[-2], node)
    found.join(left[-2], result[-2], node)
    found.join(right[-1], result[-1], node)
    for axes in (left[:-2], right[:-2]):
        for one, other in zip(reversed(axes), reversed(result[:-2]), strict=False):
            if one is None or one.size > 1:
                found.join(one, other, node)
    if len(result) > 2 and not any(_is_stored(value) for value in node.inputs):
        found.note_heads(result[:-2], (left[-1], right[-1]))


def _is_stored(value: ir.Value | None) -> bool:
    """Tell whether a value is a constant, or made of constants alone."""
    if value is None or value.const_value is not None:
        return True
    node = value.producer()
    return node is not None and bool(node.inputs) and all(map(_is_stored, node.inputs))


def _gemm(node: ir.Node, found: Coupling) -> None:
    left, right, result = found.of(node.inputs[0]), found.of(node.inputs[1]), found.of(node.outputs[0])
    if left is None or right is None or result is None:
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    rows, inner = left[::-1] if node.attributes.get_int("transA", 0) else left
    from_inner, columns = right[::-1] if node.attributes.get_int("transB", 0) else right
    found.join(inner, from_inner, node)
    found.join(columns, result[1], node)
    found.join(rows, result[0], node)
    addend = _input(node, 2)
    if addend is not None:
        found.same(addend, node.outputs[0], node)


def _conv(node: ir.Node, found: Coupling) -> None:
    """Weight [out, in / groups, ...], or [in, out / groups, ...] transposed; each group is an index of an atom."""
    data, weight, result = found.of(node.inputs[0]), found.of(node.inputs[1]), found.of(node.outputs[0])
    if data is None or weight is None or result is None or len(weight) < 3:
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    transposed = node.op_type == "ConvTranspose"
    groups = node.attributes.get_int("group", 1)
    whole, part = weight[0], weight[1]
    outer, inner = (data[1], result[1]) if transposed else (result[1], data[1])
    found.join(whole, outer, node)
    if groups == 1:
        found.join(part, inner, node)
    else:
        _join_groups(node, found, groups, whole, part, inner)
    found.join(data[0], result[0], node)
    for axis in (*weight[2:], *data[2:], *result[2:]):
        found.freeze(axis, f"{at(node)} works along it")
    bias = found.of(_input(node, 2))
    if bias is not None:
        found.join(bias[0], result[1], node)


def _join_groups(
    node: ir.Node, found: Coupling, groups: int, whole: Axis | None, part: Axis | None, inner: Axis | None
) -> None:
    if whole is None or part is None or inner is None or whole.size % groups or inner.size != groups * part.size:
        _freeze_all(node, found, f"the groups of {at(node)} are not certain")
        return
    factors = found.dimensions.split(whole, [groups, whole.size // groups], at(node))
    if factors is None:
        _freeze_all(node, found, f"the groups of {at(node)} cannot be followed")
        return
    both = found.dimensions.product([factors[0], part])
    if both is None:
        _freeze_all(node, found, f"the groups of {at(node)} cannot be followed")
        return
    found.join(both, inner, node)
    _edit_attribute(node, found, "group", factors[0])


def _edit_attribute(node: ir.Node, found: Coupling, name: str, axis: Axis) -> None:
    def edit(model: ir.Model, cut: Cut) -> None:
        del model
        if cut.indices(axis) is not None:
            node.attributes[name] = ir.AttrInt64(name, cut.size(axis))

    found.edits.append(edit)


# --- movement ---------------------------------------------------------------------------------------------------------


def _transpose(node: ir.Node, found: Coupling) -> None:
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    if before is None or after is None:
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
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
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    for olds, news in _blocks(dims, new_dims):
        _join_block(node, found, [before[index] for index in olds], [after[index] for index in news])
    if node.op_type == "Reshape":
        for index, entry in enumerate(_entries(found, node.inputs[1]) or ()):
            if entry == 0 and index < len(before):
                found.join(before[index], after[index], node)  # it copies the size
        _follow_target(node, found, 1, after)


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


def _follow_target(node: ir.Node, found: Coupling, index: int, axes: Sequence[Axis | None]) -> None:
    """Let a shape that a node takes as an input follow its axes; freeze those of which it says what cannot be changed.

    Sizes of -1 and 0 follow by themselves.
    """
    target = _input(node, index)
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
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    found.same(source, node.outputs[0], node)
    _follow_target(node, found, 1, after)


def _tile(node: ir.Node, found: Coupling) -> None:
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    repeats = found.static(_input(node, 1))
    if before is None or after is None or repeats is None:
        _freeze_all(node, found, f"how often {at(node)} repeats is not known")
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
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    along = _axis(node, 0, len(result))
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
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    along = _axis(node, 0, len(source))
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
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    starts, axes = found.static(_input(node, 1)), found.static(_input(node, 3))
    if axes is None and _input(node, 3) is None and starts is not None:
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
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    along = _axis(node, 0, len(data))
    found.freeze(data[along], f"{at(node)} looks up along it")
    for index, axis in enumerate(data):
        if index != along:
            place = index if index < along else index + len(indices) - 1
            found.join(axis, result[place], node)
    for index, axis in enumerate(indices):
        found.join(axis, result[along + index], node)


# --- reductions, pools and the like -----------------------------------------------------------------------------------


def _reduce(node: ir.Node, found: Coupling) -> None:
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    given = node.attributes.get_ints("axes", ()) or found.static(_input(node, 1))
    if before is None or after is None or (given is None and _input(node, 1) is not None):
        _freeze_all(node, found, f"the axes of {at(node)} are not known")
        return
    reduced = {axis % len(before) for axis in given} if given else set(range(len(before)))
    if not given and node.attributes.get_int("noop_with_empty_axes", 0) != 0:
        reduced = set()
    sums = node.op_type in ("ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare")
    place = 0
    for index, axis in enumerate(before):
        if index in reduced:
            if not sums:
                found.freeze(axis, f"{at(node)} reduces it")
            place += node.attributes.get_int("keepdims", 1)
            continue
        found.join(axis, after[place], node)
        place += 1


def _pool(node: ir.Node, found: Coupling) -> None:
    """Batch and channels go on, what lies behind is worked along."""
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    if before is None or after is None:
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    for index, (axis, pooled) in enumerate(zip(before, after, strict=True)):
        if index > 1:
            found.freeze(axis, f"{at(node)} works along it")
            found.freeze(pooled, f"{at(node)} works along it")
        else:
            found.join(axis, pooled, node)
    for value in node.outputs[1:]:
        found.freeze_value(value, f"it is a side output of {at(node)}")


def _resize(node: ir.Node, found: Coupling) -> None:
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    if before is None or after is None or "axes" in node.attributes:
        _freeze_all(node, found, f"the shapes at {at(node)} are not known")
        return
    for axis, resized in zip(before, after, strict=True):
        if axis is not None and resized is not None and axis.size == resized.size:
            found.join(axis, resized, node)
        else:
            found.freeze(axis, f"{at(node)} changes its size")
            found.freeze(resized, f"{at(node)} changes its size")
    for value in node.inputs[1:3]:
        found.freeze_value(value, f"it is a parameter of {at(node)}")
    if _input(node, 3) is not None:
        _follow_target(node, found, 3, after)


def _pad(node: ir.Node, found: Coupling) -> None:
    """What is padded is a sum of the padding before, what was there, and the padding behind."""
    before, after = found.of(node.inputs[0]), found.of(node.outputs[0])
    pads = node.attributes.get_ints("pads", ()) or found.static(_input(node, 1))
    mode = node.attributes.get_string("mode", "constant")
    if before is None or after is None or pads is None or len(pads) != 2 * len(before):
        _freeze_all(node, found, f"how {at(node)} pads is not known")
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

    if "pads" not in node.attributes and qgraph.ir.constant(_input(node, 1)) is None:
        for side in sides.values():
            found.freeze(side, f"{at(node)} computes how much it pads")
    found.edits.append(edit)


def _shape(node: ir.Node, found: Coupling) -> None:
    """What is read off a tensor follows it by itself; what is made of that is found by `_follow_target`."""
    del node, found


# --- attention and recurrent layers -----------------------------------------------------------------------------------


def _heads(node: ir.Node, found: Coupling, value: ir.Value | None, heads: int) -> tuple[Axis, Axis] | None:
    """Split the last axis of [batch, rows, heads * size] into heads and size."""
    axes = found.of(value)
    last = axes[-1] if axes is not None and len(axes) == 3 else None
    if last is None or heads < 1 or last.size % heads:
        return None
    factors = found.dimensions.split(last, [heads, last.size // heads], at(node))
    return None if factors is None else (factors[0], factors[1])


def _multi_head_attention(node: ir.Node, found: Coupling) -> None:
    """Of com.microsoft: query, key, value and result [batch, rows, heads * size]."""
    heads = node.attributes.get_int("num_heads", 0)
    values = [*(_input(node, index) for index in range(3)), node.outputs[0]]
    split = [_heads(node, found, value, heads) for value in values]
    others = [_input(node, index) for index in range(3, len(node.inputs))]
    if any(one is None for one in split) or any(value is not None for value in others[3:]):
        _freeze_all(node, found, f"the heads of {at(node)} are not certain")
        return
    query, key, value, result = (one for one in split if one is not None)
    for one in (key, value, result):
        found.join(query[0], one[0], node)
    found.join(query[1], key[1], node)
    found.join(value[1], result[1], node)
    found.freeze(query[1], f"{at(node)} scales by its size")
    bias = found.of(others[0]) if others else None
    if bias is not None:
        widths = [found.dimensions.product(list(one)) for one in (query, key, value)]
        if None in widths:
            _freeze_all(node, found, f"the heads of {at(node)} are not certain")
            return
        found.join(Axis(tuple(term for one in widths if one is not None for term in one.terms)), bias[-1], node)
    for other in (*others[1:], *node.outputs[1:]):
        found.freeze_value(other, f"{at(node)} reads or gives it beside its heads")
    found.note_heads([query[0]], [query[1], value[1]])
    _edit_attribute(node, found, "num_heads", query[0])


def _attention(node: ir.Node, found: Coupling) -> None:
    """Of the standard: [batch, rows, heads * size] with the heads in attributes, or [batch, heads, rows, size]."""
    axes = found.of(node.inputs[0])
    others = [_input(node, index) for index in range(4, len(node.inputs))]
    if axes is None or any(value is not None for value in (*others, *node.outputs[1:])):
        _freeze_all(node, found, f"the heads of {at(node)} are not certain")
        return
    for value in (_input(node, 3),):
        found.freeze_value(value, f"it is the mask of {at(node)}")
    if len(axes) == 3:
        _attention_merged(node, found)
    else:
        _attention_by_heads(node, found)


def _attention_merged(node: ir.Node, found: Coupling) -> None:
    wide, narrow = (node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
    counts = (wide, narrow, narrow, wide)
    values = [*(_input(node, index) for index in range(3)), node.outputs[0]]
    split = [_heads(node, found, value, count) for value, count in zip(values, counts, strict=True)]
    if any(one is None for one in split) or not narrow or wide % narrow:
        _freeze_all(node, found, f"the heads of {at(node)} are not certain")
        return
    query, key, value, result = (one for one in split if one is not None)
    found.join(query[0], result[0], node)
    found.join(key[0], value[0], node)
    found.join(query[1], key[1], node)
    found.join(value[1], result[1], node)
    found.freeze(query[1], f"{at(node)} scales by its size")
    _join_grouped(node, found, query[0], key[0])
    found.note_heads([key[0]], [query[1], value[1]])
    _edit_attribute(node, found, "q_num_heads", query[0])
    _edit_attribute(node, found, "kv_num_heads", key[0])


def _join_grouped(node: ir.Node, found: Coupling, query: Axis, key: Axis) -> None:
    """Query head i reads key head i // (query heads / key heads)."""
    if query.size == key.size:
        found.join(query, key, node)
        return
    factors = found.dimensions.split(query, [key.size, query.size // key.size], at(node))
    if factors is None:
        found.freeze(query, f"the groups of {at(node)} cannot be followed")
        found.freeze(key, f"the groups of {at(node)} cannot be followed")
        return
    found.join(factors[0], key, node)


def _attention_by_heads(node: ir.Node, found: Coupling) -> None:
    parts = [found.of(_input(node, index)) for index in range(3)]
    result = found.of(node.outputs[0])
    if result is None or any(part is None or len(part) != 4 for part in (*parts, result)):
        _freeze_all(node, found, f"the heads of {at(node)} are not certain")
        return
    query, key, value = (part for part in parts if part is not None)
    found.join(query[1], result[1], node)
    found.join(key[1], value[1], node)
    found.join(query[3], key[3], node)
    found.join(value[3], result[3], node)
    found.freeze(query[3], f"{at(node)} scales by its size")
    if query[1] is not None and key[1] is not None:
        _join_grouped(node, found, query[1], key[1])
    found.note_heads([key[1]], [query[3], value[3]])
    for axis in (*(part[2] for part in (query, key, value, result)), *(part[0] for part in (query, key, value))):
        found.freeze(axis, f"{at(node)} works along it")


def _recurrent(gates: int) -> Rule:
    """Weights [directions, gates * hidden, inputs] and [directions, gates * hidden, hidden]."""

    def rule(node: ir.Node, found: Coupling) -> None:
        data, weight, recurrence = (found.of(_input(node, index)) for index in range(3))
        if data is None or weight is None or recurrence is None or _input(node, 7) is not None:
            _freeze_all(node, found, f"the layout of {at(node)} is not certain")
            return
        hidden = recurrence[2]
        if hidden is None or node.attributes.get_int("layout", 0) != 0:
            _freeze_all(node, found, f"the layout of {at(node)} is not certain")
            return
        found.join(data[-1], weight[2], node)
        for axis, count in ((weight[1], gates), (recurrence[1], gates), (_last(found, _input(node, 3)), 2 * gates)):
            if axis is None:
                continue
            factors = found.dimensions.split(axis, [count, axis.size // count], at(node))
            if factors is None:
                _freeze_all(node, found, f"the gates of {at(node)} cannot be followed")
                return
            found.freeze(factors[0], f"they are the gates of {at(node)}")
            found.join(factors[1], hidden, node)
        for value in (_input(node, 5), _input(node, 6), *node.outputs):
            if value is not None and (value.uses() or value.is_graph_output() or value in node.inputs):
                found.join(_last(found, value), hidden, node)
        for value in (*(_input(node, index) for index in (1, 2, 3, 5, 6)), *node.outputs[1:]):
            directions = found.of(value)
            if directions:
                found.freeze(directions[0], f"they are the directions of {at(node)}")
        every = found.of(node.outputs[0])
        if every:
            found.freeze(every[1], f"they are the directions of {at(node)}")
        found.freeze_value(_input(node, 4), f"they are the lengths of {at(node)}")
        _edit_attribute(node, found, "hidden_size", hidden)

    return rule


def _last(found: Coupling, value: ir.Value | None) -> Axis | None:
    axes = found.of(value)
    return axes[-1] if axes else None


_UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_BINARY = (
    "Add", "And", "BitwiseAnd", "BitwiseOr", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip
_POOLS = (
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool",
)  # fmt: skip
_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip

_RULES: dict[tuple[str, str], Rule] = {
    **{("", op): _first for op in _UNARY},
    **{("", op): _elementwise for op in _BINARY},
    **{("", op): _pool for op in _POOLS},
    **{("", op): _reduce for op in _REDUCTIONS},
    **{("", op): _softmax for op in ("Hardmax", "LogSoftmax", "Softmax")},
    **{("", op): _along(-1) for op in ("CumSum", "LpNormalization")},
    **{("", op): _layer_norm for op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")},
    **{("", op): _batch_norm for op in ("BatchNormalization", "InstanceNormalization")},
    **{("", op): _reshape for op in ("Flatten", "Reshape", "Squeeze", "Unsqueeze")},
    **{("", op): _conv for op in ("Conv", "ConvTranspose")},
    **{("", op): _shape for op in ("Constant", "Shape", "Size")},
    ("", "Attention"): _attention,
    ("", "Concat"): _concat,
    ("", "DequantizeLinear"): _linear_dequantize,
    ("", "Expand"): _expand,
    ("", "GRU"): _recurrent(3),
    ("", "Gather"): _gather,
    ("", "Gemm"): _gemm,
    ("", "LSTM"): _recurrent(4),
    ("", "MatMul"): _matmul,
    ("", "Pad"): _pad,
    ("", "QuantizeLinear"): _linear_dequantize,
    ("", "RNN"): _recurrent(1),
    ("", "Resize"): _resize,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Tile"): _tile,
    ("", "Transpose"): _transpose,
    ("", "Upsample"): _resize,
    (_MICROSOFT, "BiasGelu"): _elementwise,
    (_MICROSOFT, "FastGelu"): _elementwise,
    (_MICROSOFT, "Gelu"): _first,
    (_MICROSOFT, "MultiHeadAttention"): _multi_head_attention,
    (_MICROSOFT, "QuickGelu"): _first,
    (_MICROSOFT, "SkipLayerNormalization"): _skip_norm,
}
COVERED: tuple[tuple[str, str], ...] = tuple(_RULES)
"""Domain and operator of what there is a rule for."""
