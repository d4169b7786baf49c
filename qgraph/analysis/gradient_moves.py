"""Gradients of reductions, which spread a cotangent, and of operators that move elements, which move it back.

Where no operator moves elements back, their numbers are moved along by the operator itself, and say where to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qgraph.analysis.gradient_tape import Call, Rule, UncoveredError

__all__ = ["MOVES", "REDUCTIONS"]

# --- reductions -------------------------------------------------------------------------------------------------------


def _axes(of: Call) -> list[int] | None:
    """Return the axes of a reduction, None for all."""
    tape = of.tape
    given = of.optional(1)
    axes = of.integers("axes") if given is None else tape.known_integers(given)
    if given is not None and axes is None:
        raise UncoveredError("its axes are computed at run time")
    if not axes and of.integer("noop_with_empty_axes", 0):
        return []
    return axes or None


def _kept(of: Call, reduced: ir.Value) -> ir.Value:
    """Return what a reduction gave with the axes it took out, at size 1."""
    tape = of.tape
    axes = _axes(of)
    if of.integer("keepdims", 1) or axes == []:
        return reduced
    if axes is None:
        axes = list(range(tape.rank(of.x())))
    return tape.op("Unsqueeze", reduced, tape.ints(axes))


def _reduction(factor: Callable[[Call, ir.Value], ir.Value] | None) -> Rule:
    """`factor` gives dy/dx from y with all its axes."""

    def rule(of: Call) -> dict[int, ir.Value]:
        tape = of.tape
        spread = _kept(of, of.g)
        if factor is None:
            return {0: tape.expand(spread, of.x())}
        return {0: tape.mul(spread, factor(of, _kept(of, of.y)))}

    return rule


def _mean(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    share = tape.share(of.y, of.x(), of.g)
    return {0: tape.expand(tape.mul(_kept(of, of.g), share), of.x())}


def _winner(of: Call, y: ir.Value) -> ir.Value:
    """Those that are the extreme share its cotangent."""
    tape = of.tape
    won = tape.mask(tape.op("Equal", of.x(), y, dtype=ir.DataType.BOOL), y)
    axes = _axes(of)
    total = tape.sum(won, list(range(tape.rank(of.x()))) if axes is None else axes)
    return tape.div(won, total)


def _global_average(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    share = tape.share(of.y, of.x(), of.g)
    return {0: tape.expand(tape.mul(of.g, share), of.x())}


def _global_maximum(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    won = tape.mask(tape.op("Equal", of.x(), of.y, dtype=ir.DataType.BOOL), of.g)
    return {0: tape.mul(of.g, tape.div(won, tape.sum(won, list(range(2, tape.rank(of.x()))))))}


REDUCTIONS: Mapping[str, Rule] = {
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_maximum,
    "ReduceL1": _reduction(lambda of, _: of.tape.op("Sign", of.x())),
    "ReduceL2": _reduction(lambda of, y: of.tape.div(of.x(), y)),
    "ReduceLogSumExp": _reduction(lambda of, y: of.tape.op("Exp", of.tape.sub(of.x(), y))),
    "ReduceMax": _reduction(_winner),
    "ReduceMean": _mean,
    "ReduceMin": _reduction(_winner),
    "ReduceProd": _reduction(lambda of, y: of.tape.div(y, of.x())),
    "ReduceSum": _reduction(None),
    "ReduceSumSquare": _reduction(lambda of, _: of.tape.scale(of.x(), 2.0)),
}


# --- moves ------------------------------------------------------------------------------------------------------------


def _reshaped(of: Call) -> dict[int, ir.Value]:
    return {0: of.tape.reshape(of.g, of.tape.shape(of.x()))}


def _transpose(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    perm = of.integers("perm")
    if perm is None:
        return {0: tape.op("Transpose", of.g)}
    return {0: tape.transpose(of.g, [perm.index(axis) for axis in range(len(perm))])}


def _expand(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    return {0: tape.reduce_to(of.g, of.x(), of.y)}


def _concat(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    axis = of.integer("axis", 0)
    values = [of.x(index) for index in range(len(of.node.inputs))]
    known = [sizes[axis] for value in values if (sizes := tape.sizes(value)) is not None]
    at_run_time = len(known) < len(values)
    cuts = tape.joined(*(tape.size(value, axis) for value in values)) if at_run_time else tape.ints(known)
    parts = tape.ops("Split", len(values), of.g, cuts, axis=axis)
    return {index: parts[index] for index in of.wanted}


def _split(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    some = next(one for one in of.cotangents if one is not None)
    parts = [
        one if one is not None else tape.zeros(tape.shape(output), some)
        for output, one in zip(of.node.outputs, of.cotangents, strict=True)
    ]
    return {0: tape.op("Concat", *parts, axis=of.integer("axis", 0))}


def _pad(of: Call) -> dict[int, ir.Value]:
    """What a constant was put around is cut out again; other pads repeat elements, whose cotangents add up."""
    tape, mode, pads, axes = of.tape, of.text("mode", "constant"), of.x(1), of.optional(3)
    if mode != "constant":
        return {0: tape.scattered(of.x(), of.g, lambda numbers: tape.op("Pad", numbers, pads, None, axes, mode=mode))}
    if min(tape.known_integers(pads) or [-1]) < 0:
        return _pad_or_crop(of)
    half = tape.op("Div", tape.op("Size", pads, dtype=ir.DataType.INT64), tape.ints([2]))
    begins = tape.op("Slice", pads, tape.ints([0]), half)
    sizes = tape.shape(of.x()) if axes is None else tape.op("Gather", tape.shape(of.x()), axes)
    return {0: tape.op("Slice", of.g, begins, tape.add(begins, sizes), axes)}


def _pad_or_crop(of: Call) -> dict[int, ir.Value]:
    """Pads that may be negative: elements are numbered from 1, and what the constant stands for is number 0."""
    tape = of.tape
    axes = of.optional(3)
    one = tape.constant(np.asarray(1, np.int64))
    total = tape.op("Size", of.x(), dtype=ir.DataType.INT64)
    numbers = tape.reshape(tape.op("Range", one, tape.add(total, one), one), tape.shape(of.x()))
    moved = tape.reshape(tape.op("Pad", numbers, of.x(1), tape.constant(np.asarray(0, np.int64)), axes), [-1])
    empty = tape.zeros(tape.reshape(tape.add(total, one), [1]), of.g)
    flat = tape.op("ScatterElements", empty, moved, tape.reshape(of.g, [-1]), axis=0, reduction="add")
    inner = tape.op("Slice", flat, tape.ints([1]), tape.ints([np.iinfo(np.int64).max]))
    return {0: tape.reshape(inner, tape.shape(of.x()))}


def _moved(kind: ir.DataType = ir.DataType.INT64, *, repeats: bool = True) -> Rule:
    """Move the numbers of the elements with the operator itself, which must take integers of type `kind`."""

    def rule(of: Call) -> dict[int, ir.Value]:
        tape = of.tape

        def move(numbers: ir.Value) -> ir.Value:
            if kind == ir.DataType.INT64:
                return of.again(numbers, *of.node.inputs[1:])
            cast = tape.op("Cast", numbers, dtype=kind, to=int(kind))
            moved = of.again(cast, *of.node.inputs[1:])
            return tape.op("Cast", moved, dtype=ir.DataType.INT64, to=int(ir.DataType.INT64))

        return {0: tape.scattered(of.x(), of.g, move, repeats=repeats)}

    return rule


def _resize(of: Call) -> dict[int, ir.Value]:
    if of.text("mode", "nearest") != "nearest":
        raise UncoveredError("Resize interpolates")
    if of.text("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise UncoveredError("Resize crops")
    return dict(_moved(ir.DataType.INT32)(of))


def _gather(of: Call) -> dict[int, ir.Value]:
    """Rows go back by row; along other axes by element."""
    tape = of.tape
    if of.integer("axis", 0) != 0:
        return dict(_moved()(of))
    rows = tape.op("Unsqueeze", of.x(1), tape.ints([-1]))
    empty = tape.zeros(tape.shape(of.x()), of.g)
    return {0: tape.op("ScatterND", empty, rows, of.g, reduction="add")}


def _gather_elements(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    empty = tape.zeros(tape.shape(of.x()), of.g)
    axis = of.integer("axis", 0)
    return {0: tape.op("ScatterElements", empty, of.x(1), of.g, axis=axis, reduction="add")}


def _top_k(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    empty = tape.zeros(tape.shape(of.x()), of.g)
    axis = of.integer("axis", -1)
    return {0: tape.op("ScatterElements", empty, of.node.outputs[1], of.g, axis=axis, reduction="add")}


def _cumulative_sum(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    backwards = 1 - of.integer("reverse", 0)
    return {0: tape.op("CumSum", of.g, of.x(1), exclusive=of.integer("exclusive", 0), reverse=backwards)}


def _triangle(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    return {0: tape.op("Trilu", of.g, of.optional(1), upper=of.integer("upper", 1))}


def _depth_to_space(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    size = of.integer("blocksize", 1)
    deep = tape.op("SpaceToDepth", of.g, blocksize=size)
    if of.text("mode", "DCR") == "DCR":
        return {0: deep}
    pixels = tape.transpose(tape.reshape(deep, [0, 0, -1]), [0, 2, 1])
    swapped = tape.transpose(tape.reshape(pixels, [0, 0, size * size, -1]), [0, 1, 3, 2])
    channels = tape.transpose(tape.reshape(swapped, [0, 0, -1]), [0, 2, 1])
    return {0: tape.reshape(channels, tape.shape(of.x()))}


def _space_to_depth(of: Call) -> dict[int, ir.Value]:
    tape = of.tape
    return {0: tape.op("DepthToSpace", of.g, blocksize=of.integer("blocksize", 1))}


MOVES: Mapping[str, Rule] = {
    "Concat": _concat,
    "CumSum": _cumulative_sum,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _reshaped,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _moved(),
    "Pad": _pad,
    "Reshape": _reshaped,
    "Resize": _resize,
    "Slice": _moved(repeats=False),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _reshaped,
    "Tile": _moved(),
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _triangle,
    "Unsqueeze": _reshaped,
}
