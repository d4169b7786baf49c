"""Gradients of convolutions and of pooling over windows.

    y = Conv(x, W)           dx = ConvTranspose(g, W), cut to the size of x
                             dW = Conv(x^T, g^T) with strides and dilations in each other's place
    y = ConvTranspose(x, W)  dx = Conv(g, W), dW = the weight gradient of Conv(g, W) for the cotangent x
    y = AveragePool(x)       dx = ConvTranspose(g / elements in the window, ones), a channel at a time
    y = MaxPool(x)           dx = g, put where the maxima were

With x^T = [C / groups, groups N, ...] and g^T = [M, N, ...] one grouped convolution gives the weight gradient of all
groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.gradient_tape import Attribute, Call, Rule, Tape, UncoveredError

__all__ = ["CONVOLUTIONS"]


@dataclasses.dataclass(frozen=True)
class _Window:
    """How a window goes over the spatial axes."""

    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    pads: Sequence[int]
    group: int = 1

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def begins(self) -> Sequence[int]:
        return self.pads[: self.rank]

    @property
    def ends(self) -> Sequence[int]:
        return self.pads[self.rank :]

    def attributes(self, **others: Sequence[int]) -> dict[str, Attribute]:
        """Return the attributes of a Conv or ConvTranspose."""
        lists = {"strides": self.strides, "dilations": self.dilations, "pads": self.pads, **others}
        return {"group": self.group, **{name: list(value) for name, value in lists.items()}}


def _window(of: Call, kernel: Sequence[int], spatial: ir.Value) -> _Window:
    """Read the attributes of a node; `spatial` is the value whose size automatic pads depend on."""
    rank = len(kernel)
    strides = of.integers("strides") or [1] * rank
    dilations = of.integers("dilations") or [1] * rank
    pads = of.integers("pads") or [0] * (2 * rank)
    auto = of.text("auto_pad", "NOTSET")
    if auto == "VALID":
        pads = [0] * (2 * rank)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same_pads(of, spatial, kernel, strides, dilations, upper=auto == "SAME_UPPER")
    return _Window(kernel, strides, dilations, pads, of.integer("group", 1))


def _same_pads(
    of: Call, value: ir.Value, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], *, upper: bool
) -> list[int]:
    dims = of.tape.dims(value)
    small, large = [], []
    for axis, (width, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        size = dims[axis + 2] if dims is not None else None
        reach = dilation * (width - 1) + 1
        if stride == 1:
            total = reach - 1
        elif isinstance(size, int):
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        else:
            raise UncoveredError("its automatic pads depend on a size that is not known")
        small.append(total // 2)
        large.append(total - total // 2)
    return [*small, *large] if upper else [*large, *small]


def _kernel(of: Call) -> list[int]:
    """Return the size of the window of a layer with a weight."""
    given = of.integers("kernel_shape")
    if given is not None:
        return given
    sizes = of.tape.sizes(of.x(1))
    if sizes is None:
        raise UncoveredError("the size of its kernel is not known")
    return list(sizes[2:])


def _spread(tape: Tape, g: ir.Value, weight: ir.Value, window: _Window, x: ir.Value) -> ir.Value:
    """Return the cotangent of the input `x` of a convolution."""
    sizes = tape.dims(x)
    lengths = None if sizes is None else list(sizes[2:])
    if all(stride == 1 for stride in window.strides):
        return _correlated(tape, g, weight, window)
    if lengths is not None and all(isinstance(length, int) for length in lengths):
        left = [_unread(window, axis, int(length)) for axis, length in enumerate(lengths)]  # type: ignore[arg-type]
        return tape.op("ConvTranspose", g, weight, attributes=window.attributes(output_padding=left))
    # The size is known when the model runs: more than enough is computed, and cut.
    most = [stride - 1 for stride in window.strides]
    whole = tape.op(
        "ConvTranspose", g, weight, attributes=window.attributes(output_padding=most, pads=[0] * (2 * window.rank))
    )
    begins = tape.ints(list(window.begins))
    inner = tape.op("Slice", tape.shape(x), tape.ints([2]), tape.ints([2 + window.rank]))
    return tape.op("Slice", whole, begins, tape.add(begins, inner), tape.ints(range(2, 2 + window.rank)))


def _correlated(tape: Tape, g: ir.Value, weight: ir.Value, window: _Window) -> ir.Value:
    """Without strides, the transposed convolution is one with the kernel turned round: runtimes are faster at it."""
    pads = [
        dilation * (width - 1) - pad
        for ends in (window.begins, window.ends)
        for width, dilation, pad in zip(window.kernel, window.dilations, ends, strict=True)
    ]
    sizes = tape.sizes(weight)
    if min(pads) < 0 or sizes is None:
        return tape.op("ConvTranspose", g, weight, attributes=window.attributes())
    outputs, inputs, spatial = sizes[0] // window.group, sizes[1], list(window.kernel)
    axes = list(range(2, 2 + window.rank))
    turned = weight
    if any(width > 1 for width in window.kernel):
        last, first = tape.ints([-1] * window.rank), tape.ints([np.iinfo(np.int64).min] * window.rank)
        turned = tape.op("Slice", weight, last, first, tape.ints(axes), last)
    if inputs > 1 or outputs > 1:
        split = tape.reshape(turned, [window.group, outputs, inputs, *spatial])
        swapped = tape.transpose(split, [0, 2, 1, *(axis + 1 for axis in axes)])
        turned = tape.reshape(swapped, [window.group * inputs, outputs, *spatial])
    return tape.op("Conv", g, turned, attributes=window.attributes(pads=pads))


def _unread(window: _Window, axis: int, length: int) -> int:
    """Return how many elements at the end of an axis no window reaches."""
    padded = length + window.begins[axis] + window.ends[axis]
    return (padded - window.dilations[axis] * (window.kernel[axis] - 1) - 1) % window.strides[axis]


def _weight_gradient(tape: Tape, x: ir.Value, g: ir.Value, window: _Window) -> ir.Value:
    """Return the cotangent [M, C / groups, ...] of the weight of a convolution of `x` with the cotangent `g`."""
    spatial = list(range(2, 2 + window.rank))
    shape = tape.op("Shape", x, dtype=ir.DataType.INT64)
    inner = tape.op("Slice", shape, tape.ints([2]), tape.ints([2 + window.rank]))
    batch = tape.op("Slice", shape, tape.ints([0]), tape.ints([1]))
    if window.group > 1:
        split = tape.reshape(x, tape.joined(batch, tape.ints([window.group, -1]), inner))
        turned = tape.transpose(split, [2, 1, 0, *(axis + 1 for axis in spatial)])
        rows = tape.reshape(turned, tape.joined(tape.size(turned, 0), tape.ints([-1]), inner))
    else:
        rows = tape.transpose(x, [1, 0, *spatial])
    swapped = dataclasses.replace(window, strides=window.dilations, dilations=window.strides)
    found = tape.op("Conv", rows, tape.transpose(g, [1, 0, *spatial]), attributes=swapped.attributes())
    if all(stride == 1 for stride in window.strides):
        return tape.transpose(found, [1, 0, *spatial])
    # Where strides leave a remainder, there are offsets beyond the kernel.
    cut = tape.op("Slice", found, tape.ints([0] * window.rank), tape.ints(list(window.kernel)), tape.ints(spatial))
    return tape.transpose(cut, [1, 0, *spatial])


def _conv(of: Call) -> dict[int, ir.Value]:
    tape, x = of.tape, of.x()
    window = _window(of, _kernel(of), x)
    found = {}
    if 0 in of.wanted:
        found[0] = _spread(tape, of.g, of.x(1), window, x)
    if 1 in of.wanted:
        found[1] = _weight_gradient(tape, x, of.g, window)
    if 2 in of.wanted:
        found[2] = tape.sum(of.g, [0, *range(2, 2 + window.rank)], keep=False)
    return found


def _conv_transpose(of: Call) -> dict[int, ir.Value]:
    tape, x = of.tape, of.x()
    if of.integers("output_shape") is not None or of.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UncoveredError("its pads follow from its output shape")
    window = _window(of, _kernel(of), x)
    extra = of.integers("output_padding") or [0] * window.rank
    if any(more >= stride for more, stride in zip(extra, window.strides, strict=True) if more):
        raise UncoveredError("its output is padded by more than a stride")
    found = {}
    if 0 in of.wanted:
        found[0] = tape.op("Conv", of.g, of.x(1), attributes=window.attributes())
    if 1 in of.wanted:
        found[1] = _weight_gradient(tape, of.g, x, window)
    if 2 in of.wanted:
        found[2] = tape.sum(of.g, [0, *range(2, 2 + window.rank)], keep=False)
    return found


def _max_pool(of: Call) -> dict[int, ir.Value]:
    """The operator's second output says where the maxima were."""
    tape, node = of.tape, of.node
    g = of.g
    if of.integer("storage_order", 0):
        raise UncoveredError("it counts columns first")
    if len(node.outputs) == 1:
        node.resize_outputs(2)
    places = node.outputs[1]
    if not places.name:
        places.name = qgraph.ir.fresh_name(tape.graph, f"{node.outputs[0].name}_places")
        places.type = ir.TensorType(ir.DataType.INT64)
        places.shape = node.outputs[0].shape
    total = tape.op("Size", of.x(), dtype=ir.DataType.INT64)
    empty = tape.zeros(tape.reshape(total, [1]), g)
    flat = tape.op("ScatterElements", empty, tape.reshape(places, [-1]), tape.reshape(g, [-1]), axis=0, reduction="add")
    return {0: tape.reshape(flat, tape.shape(of.x()))}


def _average_pool(of: Call) -> dict[int, ir.Value]:
    tape, x, g = of.tape, of.x(), of.g
    kernel = of.integers("kernel_shape")
    if kernel is None or of.integer("ceil_mode", 0):
        raise UncoveredError("its windows reach over the end (ceil_mode)")
    window = dataclasses.replace(_window(of, kernel, x), group=1)
    ones = tape.constant(np.ones((1, 1, *kernel), tape.dtype(g).numpy()))
    alone = [tape.reshape(one, _one_channel(tape, one, window.rank)) for one in (g, x)]
    if of.integer("count_include_pad", 0) or not any(window.pads):
        shared = tape.scale(alone[0], 1 / float(np.prod(kernel)))
    else:
        full = tape.op("Slice", alone[1], tape.ints([0]), tape.ints([1]), tape.ints([0]))
        inside = tape.plus(tape.scale(full, 0.0), 1.0)
        shared = tape.div(alone[0], tape.op("Conv", inside, ones, attributes=window.attributes()))
    # `x` gives the sizes of the spatial axes, which are the same for every channel alone.
    return {0: tape.reshape(_spread(tape, shared, ones, window, x), tape.shape(x))}


def _one_channel(tape: Tape, value: ir.Value, rank: int) -> ir.Value:
    """Return the shape [N C, 1, ...] of a value [N, C, ...]."""
    shape = tape.op("Shape", value, dtype=ir.DataType.INT64)
    inner = tape.op("Slice", shape, tape.ints([2]), tape.ints([2 + rank]))
    return tape.joined(tape.ints([-1, 1]), inner)


CONVOLUTIONS: Mapping[str, Rule] = {
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
}
