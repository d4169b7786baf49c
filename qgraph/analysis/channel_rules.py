"""How a positive factor for a channel of a value goes on to what the value is made of, operator by operator.

Each rule takes the channel of every element of an output to those of the inputs (`Tracer.up`), or ends at constants
that take the factor. `qgraph.analysis.channel_sources` lists the operators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.linear_layers import LinearLayer
from qgraph.analysis.shapes import Shapes
from qgraph.analysis.symbols import Dim

__all__ = [
    "NONE",
    "RULES",
    "Found",
    "Key",
    "NoSourceError",
    "Rule",
    "Source",
    "Tracer",
    "at",
    "constant_tensor",
    "key",
    "tie",
]

Dims: TypeAlias = tuple[Dim, ...]
Key: TypeAlias = tuple[str, str]
"""Domain ("" for the default) and operator."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
NONE = -1
"""An element that no factor goes to."""
_MICROSOFT = "com.microsoft"


class NoSourceError(Exception):
    """The reason why no constants take factors for the channels of a value."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A constant whose elements are linear in channels of the activation.

    Attributes:
        node: reads the constant.
        index: as which input.
        channels: which channel's factor each element takes, -1 for none; broadcasts against the constant.
        matrix: the layer whose weight or bias it is, None for others.
    """

    node: ir.Node
    index: int
    channels: np.ndarray
    matrix: LinearLayer | None = None

    @property
    def value(self) -> ir.Value:
        """The constant as it stands."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What lies at the end of the ways up: constants, and pairs of channels that have to take the same factor."""

    sources: tuple[Source, ...] = ()
    ties: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    heads: tuple[np.ndarray, ...] = ()
    linear: bool = True

    def __add__(self, other: Found) -> Found:
        return Found(
            self.sources + other.sources,
            self.ties + other.ties,
            self.heads + other.heads,
            self.linear and other.linear,
        )


class Tracer:
    """Goes up. `ids` has the channel of each element, -1 for none; its axes count from the last, and may be 1."""

    def __init__(self, shapes: Shapes, layers: Mapping[ir.Node, LinearLayer], rules: Mapping[Key, Rule]) -> None:
        self._shapes = shapes
        self._layers = layers
        self._rules = rules

    def up(self, value: ir.Value | None, ids: np.ndarray, readers: Sequence[ir.Node]) -> Found:
        """Go on with the node that makes `value`, which nobody but `readers` may read."""
        if value is None:
            raise NoSourceError("an input is missing on the way up")
        if value.is_graph_output():
            raise NoSourceError(f"'{value.name}' is an output of the model")
        using = [use.node for use in value.uses() if not qgraph.ir.is_op(use.node, "Shape", "Size")]
        other = next((one for one in using if one not in readers or using.count(one) > 1), None)
        if other is not None:
            raise NoSourceError(f"'{value.name}' is read by '{qgraph.ir.node_label(other)}' too")
        node = value.producer()
        if node is None:
            raise NoSourceError(f"'{value.name}' is no result of a node")
        rule = self._rules.get(key(node))
        if rule is None:
            raise NoSourceError(f"it comes through {at(node)}")
        return rule(self, node, value, ids)

    # --- where it goes on --------------------------------------------------------------------------------------------

    def passed(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """On with the first input."""
        if value is not node.outputs[0]:
            raise NoSourceError(f"it is a side output of '{qgraph.ir.node_label(node)}'")
        return self.up(node.inputs[0], ids, [node])

    def bent(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Positively homogeneous, not linear."""
        return dataclasses.replace(self.passed(node, value, ids), linear=False)

    def added(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Both sides take it."""
        del value
        found = Found()
        for index in range(2):
            found += self.operand(node, index, ids)
        return found

    def multiplied(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
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
                found = self.operand(node, index, ids)
            except NoSourceError as reason:
                reasons.append(str(reason))
                continue
            scalar = _is_single(node.inputs[1 - index])
            return found if scalar else dataclasses.replace(found, linear=False)
        raise NoSourceError("; ".join(dict.fromkeys(reasons)) or f"it comes through {at(node)}")

    def chosen(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Where, of which one branch is zero."""
        del value
        for index in (1, 2):
            other = qgraph.ir.constant(node.inputs[3 - index])
            if other is not None and not other.any():
                found = self.operand(node, index, ids)
                return dataclasses.replace(found, linear=False)
        raise NoSourceError(f"neither branch of {at(node)} is zero")

    def operand(self, node: ir.Node, index: int, ids: np.ndarray) -> Found:
        """Follow one input of an operator that broadcasts."""
        value = node.inputs[index]
        constant = constant_tensor(value)
        if constant is not None:
            return Found((_vector(node, index, ids),))
        narrow, ties = self.narrowed(value, ids)
        return Found(ties=ties) + self.up(value, narrow, [node])

    def narrowed(
        self, value: ir.Value | None, ids: np.ndarray
    ) -> tuple[np.ndarray, tuple[tuple[np.ndarray, np.ndarray], ...]]:
        """Fit ids to an input that is broadcast to them; what is spread over several channels ties them."""
        dims = self.dims(value)
        ties = []
        for axis in range(ids.ndim):
            size = ids.shape[axis]
            place = axis - ids.ndim
            dim = dims[place] if -place <= len(dims) else 1
            if size == 1 or dim == size:
                continue
            if dim != 1:
                raise NoSourceError(f"the size of '{value.name if value else ''}' is not certain")
            first, rest = np.take(ids, [0], axis), np.take(ids, range(1, size), axis)
            ties.append(tie(np.broadcast_to(first, rest.shape), rest))
            ids = first
        return ids.reshape(ids.shape[max(0, ids.ndim - len(dims)) :]), tuple(ties)

    def dims(self, value: ir.Value | None) -> Dims:
        """Return the shape of a value, of which the rank at least has to be known."""
        dims = self._shapes.dims(value) if value is not None else None
        if dims is None:
            raise NoSourceError(f"the shape of '{value.name if value else ''}' is not known")
        return tuple(dims)

    # --- movement ----------------------------------------------------------------------------------------------------

    def transposed(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Axes in another order."""
        del value
        perm = node.attributes.get_ints("perm", ()) or range(len(self.dims(node.inputs[0])))[::-1]
        ids = ids.reshape([1] * (len(perm) - ids.ndim) + list(ids.shape))
        return self.up(node.inputs[0], ids.transpose(np.argsort(perm)), [node])

    def reshaped(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Axes joined or cut."""
        after, before = self.dims(value), self.dims(node.inputs[0])
        gathered = _side_by_side(ids, after, before)
        if gathered is None:
            return self.up(node.inputs[0], _reshape(ids, after, before), [node])
        ids, tie = gathered
        return Found(ties=(tie,)) + self.up(node.inputs[0], ids, [node])

    def expanded(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """What is repeated takes one factor."""
        del value
        narrow, ties = self.narrowed(node.inputs[0], ids)
        return Found(ties=ties) + self.up(node.inputs[0], narrow, [node])

    def split(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """One part of an input whose other parts stay as they are."""
        axis = node.attributes.get_int("axis", 0)
        place = axis if axis < 0 else axis - len(self.dims(node.inputs[0]))
        sizes = [self.dims(one)[place] for one in node.outputs]
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
        return self.up(node.inputs[0], source, [node])

    def joined(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Each input takes its part."""
        axis = node.attributes.get_int("axis", 0)
        place = axis if axis < 0 else axis - len(self.dims(value))
        found, start = Found(), 0
        for index, one in enumerate(node.inputs):
            part = ids
            if -place <= ids.ndim and ids.shape[place] > 1:
                size = self.dims(one)[place]
                if not isinstance(size, int):
                    raise NoSourceError(f"the size of '{one.name if one else ''}' is not certain")
                part = np.take(ids, range(start, start + size), place)
                start += size
            constant = constant_tensor(one)
            if constant is not None:
                found += Found((_vector(node, index, part),))
            elif (part != NONE).any():
                found += self.up(one, part, [node])
        return found

    # --- products ----------------------------------------------------------------------------------------------------

    def product(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """The columns of a weight, or the values that attention mixes."""
        del value
        layer = self._layers.get(node)
        if layer is not None:
            return self._columns(layer, ids)
        if (
            node.op_type == "Gemm"
            or constant_tensor(node.inputs[0]) is not None
            or constant_tensor(node.inputs[1]) is not None
        ):
            raise NoSourceError(f"{at(node)} has a weight that cannot be rewritten")
        if ids.ndim > 1 and ids.shape[-2] != 1:
            raise NoSourceError(f"the rows of {at(node)} are channels")
        mixed = ids.reshape(-1, ids.shape[-1])
        values, ties = self.narrowed(node.inputs[1], ids)
        return Found(ties=ties, heads=_heads(mixed)) + self.up(node.inputs[1], values, [node])

    def _columns(self, layer: LinearLayer, ids: np.ndarray) -> Found:
        if ids.size != ids.shape[-1]:
            raise NoSourceError(f"the rows of '{layer.name}' ({layer.node.op_type}) are channels")
        columns = np.broadcast_to(ids.reshape(-1), (layer.outputs,))
        if not _is_own(layer):
            raise NoSourceError(f"the weight of '{layer.name}' is used elsewhere too")
        flipped = _behind(layer)
        sources = [Source(flipped or layer.node, 0 if flipped else 1, columns, layer)]
        sources[0] = dataclasses.replace(sources[0], channels=columns[:, None] if layer.transposed else columns)
        addend = layer.node.inputs[2] if layer.node.op_type == "Gemm" and len(layer.node.inputs) > 2 else None
        if addend is not None:
            if constant_tensor(addend) is None:
                raise NoSourceError(f"the bias of '{layer.name}' is computed")
            sources.append(Source(layer.node, 2, columns, layer))
        return Found(tuple(sources))

    def attention(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Attention of the standard: values are input 2, [batch, rows, heads * size] or [batch, heads, rows, size]."""
        self._require_no_cache(node, value, 5, 2)
        values = self.dims(node.inputs[2])
        if len(values) == 4:
            if ids.ndim < 3 or ids.shape[-2] != 1:
                raise NoSourceError(f"{at(node)} is not laid out by heads")
            return self._repeated(node, ids[..., 0, :], values[-3], split=True)
        return self._merged(node, ids, node.attributes.get_int("kv_num_heads", 0))

    def multi_head_attention(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """As `attention`, with a bias for the values."""
        self._require_no_cache(node, value, 7, 2)
        if len(node.inputs) < 3 or node.inputs[2] is None or len(self.dims(node.inputs[2])) != 3:
            raise NoSourceError(f"{at(node)} takes packed values")
        found = self._merged(node, ids, node.attributes.get_int("num_heads", 0))
        bias = node.inputs[3] if len(node.inputs) > 3 else None
        if bias is None:
            return found
        size = self.dims(bias)[-1]
        if constant_tensor(bias) is None or not isinstance(size, int) or size < ids.size:
            raise NoSourceError(f"the bias of {at(node)} is computed")
        places = np.full(size, NONE)
        places[size - ids.size :] = ids.reshape(-1)
        return dataclasses.replace(found + Found((_vector(node, 3, places),)), linear=False)

    def group_query_attention(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """As `attention`, of fewer heads of values than of queries."""
        self._require_no_cache(node, value, 4, 2)
        if node.inputs[2] is None:
            raise NoSourceError(f"{at(node)} takes packed values")
        return self._merged(node, ids, node.attributes.get_int("kv_num_heads", 0))

    def _require_no_cache(self, node: ir.Node, value: ir.Value, past: int, present: int) -> None:
        """Values that are kept for the next call, or come from the last, are seen outside."""
        name = at(node)
        if value is not node.outputs[0]:
            raise NoSourceError(f"it is a side output of {name}")
        kept = node.outputs[present] if len(node.outputs) > present else None
        if kept is not None and (kept.uses() or kept.is_graph_output()):
            raise NoSourceError(f"{name} hands its values out, as '{kept.name}'")
        if any(one is not None for one in node.inputs[past : past + 1]):
            raise NoSourceError(f"{name} takes values of an earlier call")

    def _merged(self, node: ir.Node, ids: np.ndarray, kv_heads: int) -> Found:
        """Values [batch, rows, kv_heads * size]; ids is over query heads * size."""
        width = self.dims(node.inputs[2])[-1]
        if not isinstance(width, int) or kv_heads < 1 or width % kv_heads or ids.size != ids.shape[-1]:
            raise NoSourceError(f"the heads of {at(node)} are not certain")
        return self._repeated(node, ids.reshape(-1, width // kv_heads), kv_heads, split=False)

    def _repeated(self, node: ir.Node, ids: np.ndarray, kv_heads: Dim, *, split: bool) -> Found:
        """Query head i reads the values of head i // (query heads / kv_heads); ids is [query heads, size]."""
        ids = ids.reshape(-1, ids.shape[-1])
        if not isinstance(kv_heads, int) or len(ids) % kv_heads:
            raise NoSourceError(f"the heads of {at(node)} are not certain")
        grouped = ids.reshape(kv_heads, -1, ids.shape[-1])
        first, rest = grouped[:, :1], grouped[:, 1:]
        ties = (tie(np.broadcast_to(first, rest.shape), rest),)
        values = first if split else first.reshape(-1)
        return Found(ties=ties, heads=_heads(ids)) + self.up(node.inputs[2], values, [node])

    # --- norms -------------------------------------------------------------------------------------------------------

    def normalized(self, node: ir.Node, value: ir.Value, ids: np.ndarray) -> Found:
        """Weight and bias take it, over the last axis alone."""
        weight, bias = _NORMS[key(node)]
        if value is not node.outputs[0] or ids.size != ids.shape[-1]:
            raise NoSourceError(f"it is a side output of {at(node)}")
        places = [place for place in (weight, bias) if place < len(node.inputs) and node.inputs[place] is not None]
        for place in places:
            if constant_tensor(node.inputs[place]) is None or self.dims(node.inputs[place]) != (ids.size,):
                raise NoSourceError(f"{at(node)} has no constant weight per channel")
        if weight not in places:
            raise NoSourceError(f"{at(node)} has no weight")
        return Found(tuple(_vector(node, place, ids.reshape(-1)) for place in places), linear=False)


_NORMS = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1, 99),
    ("", "SimplifiedLayerNormalization"): (1, 99),
    (_MICROSOFT, "SimplifiedLayerNormalization"): (1, 99),
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): (2, 99),
    (_MICROSOFT, "SkipLayerNormalization"): (2, 3),
}
"""Where weight and bias stand among the inputs; 99 is nowhere."""

Rule: TypeAlias = Callable[[Tracer, ir.Node, ir.Value, np.ndarray], Found]
"""Takes the tracer, a node, its output, and the channel of each element of that output."""

RULES: Mapping[Key, Rule] = {
    **{("", op): Tracer.passed for op in ("Identity", "Cast", "Dropout", "Neg")},
    **{("", op): Tracer.bent for op in ("Relu", "LeakyRelu")},
    **{("", op): Tracer.added for op in ("Add", "Sub")},
    **{("", op): Tracer.multiplied for op in ("Mul", "Div")},
    **{("", op): Tracer.reshaped for op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")},
    **dict.fromkeys(_NORMS, Tracer.normalized),
    ("", "Transpose"): Tracer.transposed,
    ("", "Expand"): Tracer.expanded,
    ("", "Split"): Tracer.split,
    ("", "Concat"): Tracer.joined,
    ("", "Where"): Tracer.chosen,
    ("", "MatMul"): Tracer.product,
    ("", "Gemm"): Tracer.product,
    ("", "Attention"): Tracer.attention,
    (_MICROSOFT, "MultiHeadAttention"): Tracer.multi_head_attention,
    (_MICROSOFT, "GroupQueryAttention"): Tracer.group_query_attention,
}


def at(node: ir.Node) -> str:
    """Return label and operator of a node, for a reason."""
    return f"'{qgraph.ir.node_label(node)}' ({node.op_type})"


def key(node: ir.Node) -> tuple[str, str]:
    """Return what rules are found by."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of a floating-point constant, unread."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None and qgraph.ir.is_op(value.producer(), "Constant"):
        tensor = ir.convenience.get_const_tensor(value)
    return tensor if tensor is not None and tensor.dtype in _FLOATS else None


def _is_single(value: ir.Value | None) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.size == 1


def _vector(node: ir.Node, index: int, ids: np.ndarray) -> Source:
    return Source(node, index, ids.reshape([size for place, size in enumerate(ids.shape) if size > 1 or place]))


def classes(channels: int, ties: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the least channel of each one's class."""
    tied = np.arange(channels)
    while True:
        before = tied.copy()
        for one, other in ties:
            least = np.minimum(tied[one], tied[other])
            np.minimum.at(tied, one, least)
            np.minimum.at(tied, other, least)
        tied = tied[tied]
        if (tied == before).all():
            return tied


def tie(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of channels that have to take the same factor, without those that take none."""
    if ((one == NONE) != (other == NONE)).any():
        raise NoSourceError("some of what is shared with other channels must stay as it is")
    used = one != NONE
    return one[used], other[used]


def _heads(mixed: np.ndarray) -> tuple[np.ndarray, ...]:
    used = mixed[(mixed != NONE).all(axis=1)]
    return (used,) if len(used) else ()


def _behind(layer: LinearLayer) -> ir.Node | None:
    """Return the Transpose that now stands between the weight and the node."""
    right = layer.node.inputs[1]
    return right.producer() if right is not None and right.const_value is None else None


def _is_own(layer: LinearLayer) -> bool:
    """Tell whether nobody else reads the weight, or the Transpose behind it."""
    values = [layer.node.inputs[1]]
    behind = _behind(layer)
    if behind is not None:
        values.append(behind.inputs[0])
    return all(value is not None and qgraph.ir.only_consumer(value) is not None for value in values)


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
