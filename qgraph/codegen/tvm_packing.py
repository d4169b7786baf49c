"""Convolutions and products for CPUs: weights in blocks of output channels, as vectors of sums want to read them.

    conv2d(x[n,h,w,i], W[kh,kw,i,o])    =>    sums over packed[o/t, kh, kw, i, t],  packed = permute(reshape(W))
    matmul(x[..., m, k], W[k, n])       =>    sums over packed[n/t, k, t]

The packing is an operator of its own in front, of the weight alone: it is lifted out of the function and done once when
the library is loaded. Sums of half-precision floats are kept in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

__all__ = ["SUM", "TILE_KEY", "Lanes", "packed_layers"]

SUM = "sum_of_products"
"""Name of the blocks that the schedule gives registers to."""
TILE_KEY = "qgraph.tile"
"""Annotation of such a block: the output channels that are summed together."""

_WIDEST = 64


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The vector registers of a processor.

    Attributes:
        floats: float32 numbers in a register.
        registers: how many there are.
    """

    floats: int
    registers: int

    def tile(self, channels: int) -> int:
        """Return how many channels are summed together: two registers of them where that divides."""
        exact = [size for size in (2 * self.floats, self.floats, 3 * self.floats) if channels % size == 0]
        if exact:
            return exact[0]
        halves = [size for size in range(self.floats // 2, _WIDEST + 1, self.floats // 2 or 1) if channels % size == 0]
        if halves:
            return min(halves, key=lambda size: (abs(size - 2 * self.floats), size))
        return channels if channels <= _WIDEST else max(size for size in range(1, _WIDEST) if channels % size == 0)

    def rows(self, tile: int) -> int:
        """Return for how many places sums of `tile` channels fit into the registers, with what is multiplied."""
        vectors = -(-tile // self.floats)
        return max(1, min(14, (self.registers - 2 - vectors) // vectors))


def packed_layers(lanes: Lanes) -> dict[str, Callable[[Any, Any], Any]]:
    """Return rules of `relax.transform.LegalizeOps` for convolutions (NHWC, HWIO) and products with a matrix."""
    return {"relax.nn.conv2d": _convolution(lanes), "relax.matmul": _product(lanes)}


def _default(name: str) -> Callable[[Any, Any], Any]:
    from tvm import ir

    rule: Callable[[Any, Any], Any] = ir.Op.get(name).get_attr("FLegalize")
    return rule


def _convolution(lanes: Lanes) -> Callable[[Any, Any], Any]:
    def legalized(builder: Any, call: Any) -> Any:
        data, weight = call.args
        attributes = call.attrs
        packable = attributes.data_layout == "NHWC" and attributes.groups == 1 and _sizes(weight) is not None
        if not packable or not _is_float(data):
            return _default("relax.nn.conv2d")(builder, call)
        height, width, depth, channels = _sizes(weight) or ()
        tile = lanes.tile(channels)
        packed = _permuted(builder, weight, (height, width, depth, channels // tile, tile), [3, 0, 1, 2, 4])
        window = _Window(
            (height, width), tuple(map(int, attributes.strides)), tuple(map(int, attributes.dilation)),
            tuple(map(int, attributes.padding)), tile,
        )  # fmt: skip
        return builder.call_te(window.sums, data, packed, primfunc_name_hint="conv2d")

    return legalized


@dataclasses.dataclass(frozen=True)
class _Window:
    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    tile: int

    def sums(self, data: Any, weight: Any) -> Any:
        """Describe the convolution of data [n, h, w, i] with packed weights [o/t, kh, kw, i, t]."""
        from tvm import te, topi

        (kh, kw), (sh, sw), (dh, dw) = self.size, self.strides, self.dilation
        top, left, bottom, right = self.padding
        batch, height, width, depth = data.shape
        rows = (height + top + bottom - dh * (kh - 1) - 1) // sh + 1
        columns = (width + left + right - dw * (kw - 1) - 1) // sw + 1
        padded = data
        if any(self.padding):
            padded = topi.nn.pad(data, [0, top, left, 0], [0, bottom, right, 0], name="padded")
        y, x, i = (te.reduce_axis((0, size), name=name) for size, name in ((kh, "ky"), (kw, "kx"), (depth, "i")))
        tile, wide = self.tile, _widened(data.dtype)

        def element(n: Any, r: Any, c: Any, o: Any) -> Any:
            value = wide(padded[n, r * sh + y * dh, c * sw + x * dw, i])
            return te.sum(value * wide(weight[o // tile, y, x, i, o % tile]), axis=[y, x, i])

        shape = (batch, rows, columns, weight.shape[0] * tile)
        return _narrowed(te.compute(shape, element, name=SUM, attrs={TILE_KEY: tile}), data.dtype)


def _product(lanes: Lanes) -> Callable[[Any, Any], Any]:
    def legalized(builder: Any, call: Any) -> Any:
        data, weight = call.args
        sizes = _sizes(weight)
        if sizes is None or len(sizes) != 2 or not _is_float(data) or data.ty.ndim < 2 or call.attrs.out_dtype:
            return _default("relax.matmul")(builder, call)
        depth, channels = sizes
        tile = lanes.tile(channels)
        packed = _permuted(builder, weight, (depth, channels // tile, tile), [1, 0, 2])

        def sums(x: Any, w: Any) -> Any:
            from tvm import te

            k, wide = te.reduce_axis((0, depth), name="k"), _widened(x.dtype)

            def element(*index: Any) -> Any:
                *row, n = index
                return te.sum(wide(x(*row, k)) * wide(w[n // tile, k, n % tile]), axis=k)

            shape = (*x.shape[:-1], channels)
            return _narrowed(te.compute(shape, element, name=SUM, attrs={TILE_KEY: tile}), x.dtype)

        return builder.call_te(sums, data, packed, primfunc_name_hint="matmul")

    return legalized


def _permuted(builder: Any, weight: Any, blocked: tuple[int, ...], axes: list[int]) -> Any:
    from tvm import relax

    return builder.emit(relax.op.permute_dims(builder.emit(relax.op.reshape(weight, blocked)), axes))


def _sizes(value: Any) -> tuple[int, ...] | None:
    from tvm import tirx

    shape = value.ty.shape
    if shape is None or any(not isinstance(size, tirx.IntImm) for size in shape):
        return None
    sizes = tuple(int(size) for size in shape)
    return sizes if math.prod(sizes) else None


def _is_float(value: Any) -> bool:
    return str(value.ty.dtype) in ("float32", "float16")


def _widened(dtype: Any) -> Callable[[Any], Any]:
    return (lambda element: element) if str(dtype) == "float32" else (lambda element: element.astype("float32"))


def _narrowed(sums: Any, dtype: Any) -> Any:
    from tvm import te

    if str(dtype) == "float32":
        return sums
    return te.compute(sums.shape, lambda *index: sums(*index).astype(dtype), name="narrowed")
