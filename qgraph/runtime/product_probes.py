"""How ONNX Runtime's kernels for the CPU add products of bytes on the processor at hand: small models that are run.

    vpmaddubsw    u8[2n], s8[2n]  ->  s16[n]      saturate(a0 * b0 + a1 * b1)       processors without VNNI

All activations of a probe are as large as they can be, and all weights as large or as small, so that a kernel that adds
two neighbouring products in 16 bits gives another result than their sum. Where a kernel has several ways (one row or
more, channels that fill registers or do not), a form has a probe for each. Source: Intel 64 and IA-32 Architectures
Software Developer's Manual, volume 2, PMADDUBSW; see `qgraph.numerics.dot_products`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qgraph.capabilities import ByteProduct
from qgraph.errors import UserError
from qgraph.runtime.product_models import (
    COLUMNS,
    EXTREMES,
    WIDTH,
    Probe,
    attention,
    blocks,
    convolution,
    layer,
    product,
    recurrence,
)

__all__ = ["FORMS", "Form", "found_products"]

SOURCE = "product"
_ROWS = (1, 8)


@dataclasses.dataclass(frozen=True)
class Form:
    """A kernel with data types, and conditions in words.

    Attributes:
        kernel: as tables call it.
        weights: its inputs that are weights.
        activations: their type; "float32" where it quantizes them itself.
        stored: type of the weights.
        when: what else holds.
        builds: make the probes.
    """

    kernel: str
    weights: tuple[int, ...]
    activations: str
    stored: str
    when: tuple[str, ...]
    builds: tuple[Callable[[], Probe], ...] = dataclasses.field(repr=False, compare=False)


def found_products(processor: str, forms: Sequence[Form] | None = None) -> Iterator[ByteProduct]:
    """Yield how each form adds up here; forms that the installed runtime has no kernel for are left out.

    Args:
        processor: what the one at hand is called where sums saturate.
        forms: all, if not given.

    Raises:
        UserError: ONNX Runtime is not installed.
    """
    for form in FORMS if forms is None else forms:
        try:
            wrong = [build().saturates() for build in form.builds]
        except UserError:
            continue
        yield ByteProduct(form.kernel, form.weights, form.activations, form.stored, form.when,
                          (processor,) if any(wrong) else (), SOURCE)  # fmt: skip


_PAIRS = (("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8"), ("int8", "uint8"))
_DENSE = ((32, 3, 1, 2), (20, 3, 1, 2), (32, 1, 1, 2), (32, 3, 2, 2))
_DEPTHWISE = ((32, 3, 32, 2), (20, 3, 20, 2), (32, 5, 32, 2), (32, 3, 32, 1), (32, 3, 32, 3))
"""Channels, size of the kernel, groups, axes of the image."""


_LAYERS: Sequence[tuple[str, tuple[str, ...], Sequence[tuple[Sequence[int], int]]]] = (
    ("Conv", (), (((32, 32, 3, 3), 1), ((20, 20, 3, 3), 1), ((32, 16, 3, 3), 2))),
    ("Conv", ("depthwise",), (((32, 1, 3, 3), 32), ((20, 1, 3, 3), 20))),
    ("Gemm", (), (((WIDTH, COLUMNS), 1),)),
    ("MatMul", (), (((WIDTH, COLUMNS), 1),)),
)
"""Operators, what else holds, and for each probe the shape of the weight and the groups."""


def _forms() -> Iterator[Form]:
    when: tuple[str, ...]
    products = {
        "MatMulInteger": 1,
        "com.microsoft.MatMulIntegerToFloat": 1,
        "QLinearMatMul": 3,
        "com.microsoft.QGemm": 3,
    }
    for (kernel, index), pair in itertools.product(products.items(), _PAIRS):
        yield Form(kernel, (index,), *pair, (), _built(product, pair[1], ((kernel, *pair, rows) for rows in _ROWS)))
    kernel = "com.microsoft.DynamicQuantizeMatMul"
    for stored in EXTREMES:
        builds = _built(product, stored, ((kernel, "float32", stored, rows) for rows in _ROWS))
        yield Form(kernel, (1,), "float32", stored, (), builds)
    convolutions = {"ConvInteger": 1, "QLinearConv": 3, "com.microsoft.QLinearConv": 3}
    for (kernel, index), pair in itertools.product(convolutions.items(), _PAIRS):
        for when, sizes in (((), _DENSE), (("depthwise",), _DEPTHWISE)):
            builds = _built(convolution, pair[1], ((kernel, *pair, *one) for one in sizes))
            yield Form(kernel, (index,), *pair, when, builds)
    for (op_type, when, shapes), pair in itertools.product(_LAYERS, _PAIRS):
        builds = _built(layer, pair[1], ((op_type, *pair, *one) for one in shapes))
        yield Form(f"DequantizeLinear -> {op_type} -> QuantizeLinear", (1,), *pair, when, builds)
    for pair in _PAIRS:
        yield Form("com.microsoft.QAttention", (1,), *pair, (), _built(attention, pair[1], (pair,)))
    for stored in EXTREMES:
        builds = _built(recurrence, stored, ((stored,),))
        yield Form("com.microsoft.DynamicQuantizeLSTM", (1, 2), "float32", stored, (), builds)
    for bits in (2, 4, 8):
        builds = tuple(functools.partial(blocks, bits, rows) for rows in _ROWS)
        yield Form("com.microsoft.MatMulNBits", (1,), "float32", "uint8", (f"{bits} bits",), builds)


def _built(
    build: Callable[..., Probe], stored: str, arguments: Iterable[Sequence[Any]]
) -> tuple[Callable[[], Probe], ...]:
    """Return the probes of weights of both extremes, for each of some arguments."""
    return tuple(functools.partial(build, *one, weight) for one in arguments for weight in EXTREMES[stored])


FORMS: tuple[Form, ...] = tuple(_forms())
"""Every form of which a table may say something."""
