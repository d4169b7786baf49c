"""What MIL's operations compute, in numpy: products, convolutions, pooling, recurrent layers.

Written from the definitions of the operations, as plainly as possible: a convolution is a sum over the places of its
kernel. Arrays of float16 come as float32, in which sums are taken; the interpreter rounds what is returned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qgraph.coreml.semantics import Semantics
from qgraph.coreml.semantics_elementwise import SEMANTICS as ELEMENTWISE

__all__ = ["SEMANTICS"]


def _linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    product = x @ weight.T
    return np.asarray(product if bias is None else product + bias)


def _matmul(x: np.ndarray, y: np.ndarray, transpose_x: bool = False, transpose_y: bool = False) -> np.ndarray:
    left = x.swapaxes(-1, -2) if transpose_x else x
    right = y.swapaxes(-1, -2) if transpose_y else y
    return np.asarray(left @ right)


def _padded(x: np.ndarray, pad: np.ndarray, fill: float) -> np.ndarray:
    pairs = [(0, 0), (0, 0), *((int(pad[2 * axis]), int(pad[2 * axis + 1])) for axis in range(x.ndim - 2))]
    return np.pad(x, pairs, constant_values=fill)


def _windows(
    x: np.ndarray, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yield each place of the kernel, and what stands there in every window of a padded `x`."""
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    counts = [(size - span) // stride + 1 for size, span, stride in zip(x.shape[2:], spans, strides, strict=True)]
    for place in itertools.product(*map(range, kernel)):
        starts = [index * step for index, step in zip(place, dilations, strict=True)]
        cut = [
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(starts, counts, strides, strict=True)
        ]
        yield place, x[(slice(None), slice(None), *cut)]


def _numbers(given: np.ndarray | None, rank: int, default: int) -> list[int]:
    return [default] * rank if given is None else [int(number) for number in given]


def _conv(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: int = 1,
) -> np.ndarray:
    """weight [C_out, C_in / groups, ...]."""
    assert pad_type == "custom"
    rank, groups = x.ndim - 2, int(groups)
    kernel = weight.shape[2:]
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    total: np.ndarray | None = None
    spatial: tuple[int, ...] = ()
    strides, dilations = _numbers(strides, rank, 1), _numbers(dilations, rank, 1)
    for place, seen in _windows(_padded(x, _pads(pad, rank), 0.0), kernel, strides, dilations):
        spatial = seen.shape[2:]
        columns = seen.reshape(x.shape[0], groups, weight.shape[1], -1)
        part = np.matmul(split[..., np.ravel_multi_index(place, kernel)], columns)
        total = part if total is None else total + part
    assert total is not None
    return _biased(total.reshape(x.shape[0], weight.shape[0], *spatial), bias)


def _pads(pad: np.ndarray | None, rank: int) -> np.ndarray:
    return np.zeros(2 * rank, np.int32) if pad is None else pad


def _biased(y: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    return y if bias is None else y + bias.reshape(-1, *[1] * (y.ndim - 2))


def _conv_transpose(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    pad: Any = None,
    output_shape: Any = None,
    pad_type: str = "valid",
    strides: Any = None,
    dilations: Any = None,
    groups: int = 1,
) -> np.ndarray:
    """weight [C_in, C_out / groups, ...]: each input is spread over what its kernel covers; `pad` is cut off."""
    assert pad_type == "custom"
    rank, groups, kernel = x.ndim - 2, int(groups), weight.shape[2:]
    strides, dilations = _numbers(strides, rank, 1), _numbers(dilations, rank, 1)
    pads = _pads(pad, rank)
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    columns = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    sizes = [(x.shape[2 + axis] - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1 for axis in range(rank)]
    wanted = [size - int(pads[2 * axis]) - int(pads[2 * axis + 1]) for axis, size in enumerate(sizes)]
    wanted = wanted if output_shape is None else [int(size) for size in output_shape[2:]]
    room = [max(size, int(pads[2 * axis]) + wanted[axis]) for axis, size in enumerate(sizes)]
    total = np.zeros((x.shape[0], weight.shape[1] * groups, *room), x.dtype)
    for place in itertools.product(*map(range, kernel)):
        weights = split[..., np.ravel_multi_index(place, kernel)].swapaxes(1, 2)
        part = np.matmul(weights, columns).reshape(x.shape[0], -1, *x.shape[2:])
        cut = [
            slice(index * dilations[axis], index * dilations[axis] + (x.shape[2 + axis] - 1) * strides[axis] + 1,
                  strides[axis])
            for axis, index in enumerate(place)
        ]  # fmt: skip
        total[(slice(None), slice(None), *cut)] += part
    cut = [slice(int(pads[2 * axis]), int(pads[2 * axis]) + wanted[axis]) for axis in range(rank)]
    return _biased(total[(slice(None), slice(None), *cut)], bias)


def _max_pool(
    x: np.ndarray, kernel_sizes: Any, pad_type: str, strides: Any = None, pad: Any = None, ceil_mode: Any = False
) -> np.ndarray:
    assert pad_type == "custom"
    assert not ceil_mode
    rank = x.ndim - 2
    padded = _padded(x, _pads(pad, rank), -np.inf)
    seen = _windows(padded, _numbers(kernel_sizes, rank, 1), _numbers(strides, rank, 1), [1] * rank)
    return np.asarray(np.max([one for _, one in seen], axis=0))


def _avg_pool(
    x: np.ndarray,
    kernel_sizes: Any,
    pad_type: str,
    strides: Any = None,
    pad: Any = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
) -> np.ndarray:
    assert pad_type == "custom"
    assert not ceil_mode
    rank = x.ndim - 2
    kernel, steps = _numbers(kernel_sizes, rank, 1), _numbers(strides, rank, 1)
    inside = _padded(np.ones_like(x), _pads(pad, rank), 0.0 if exclude_padding_from_average else 1.0)
    sums, counts = (
        np.sum([one for _, one in _windows(array, kernel, steps, [1] * rank)], axis=0)
        for array in (_padded(x, _pads(pad, rank), 0.0), inside)
    )
    return np.asarray(sums / counts)


def _steps(x: np.ndarray, direction: str) -> Iterator[int]:
    return iter(reversed(range(len(x)))) if direction == "reverse" else iter(range(len(x)))


def _lstm_one_way(
    x: np.ndarray, h: np.ndarray, c: np.ndarray, weights: Sequence[Any], direction: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gates stand in the order input, forget, output, cell."""
    weight_ih, weight_hh, bias = weights
    outputs = np.zeros((len(x), *h.shape), x.dtype)
    sigmoid = ELEMENTWISE["sigmoid"]
    for step in _steps(x, direction):
        gates = x[step] @ weight_ih.T + h @ weight_hh.T + (0 if bias is None else bias)
        i, f, o, z = np.split(gates, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
        h = sigmoid(o) * np.tanh(c)
        outputs[step] = h
    return outputs, h, c


def _lstm(
    x: np.ndarray,
    initial_h: np.ndarray,
    initial_c: np.ndarray,
    weight_ih: np.ndarray,
    weight_hh: np.ndarray,
    bias: Any = None,
    weight_ih_back: Any = None,
    weight_hh_back: Any = None,
    bias_back: Any = None,
    direction: str = "forward",
    output_sequence: Any = False,
    **activations: str,
) -> tuple[np.ndarray, ...]:
    given = [activations.get(name) for name in ("recurrent_activation", "cell_activation", "activation")]
    assert output_sequence
    assert given in ([None] * 3, ["sigmoid", "tanh", "tanh"])
    hidden = weight_hh.shape[1]
    one_way = "forward" if direction == "bidirectional" else direction
    forward = _lstm_one_way(x, initial_h[:, :hidden], initial_c[:, :hidden], (weight_ih, weight_hh, bias), one_way)
    if direction != "bidirectional":
        return forward
    back = (weight_ih_back, weight_hh_back, bias_back)
    other = _lstm_one_way(x, initial_h[:, hidden:], initial_c[:, hidden:], back, "reverse")
    return tuple(np.concatenate(pair, axis=-1) for pair in zip(forward, other, strict=True))


def _gru(
    x: np.ndarray,
    initial_h: np.ndarray,
    weight_ih: np.ndarray,
    weight_hh: np.ndarray,
    bias: Any = None,
    direction: str = "forward",
    output_sequence: Any = False,
    reset_after: Any = False,
    input_bias: Any = None,
    **activations: str,
) -> tuple[np.ndarray, ...]:
    """Gates stand in the order reset, update (MIL: output), hidden."""
    given = [activations.get(name) for name in ("recurrent_activation", "activation")]
    assert output_sequence
    assert reset_after
    assert given in ([None] * 2, ["sigmoid", "tanh"])
    h, outputs = initial_h, np.zeros((len(x), *initial_h.shape), x.dtype)
    sigmoid = ELEMENTWISE["sigmoid"]
    for step in _steps(x, direction):
        ours = np.split(x[step] @ weight_ih.T + (0 if input_bias is None else input_bias), 3, axis=-1)
        states = np.split(h @ weight_hh.T + (0 if bias is None else bias), 3, axis=-1)
        r, z = (sigmoid(a + b) for a, b in zip(ours[:2], states[:2], strict=True))
        n = np.tanh(ours[2] + r * states[2])
        h = (1 - z) * n + z * h
        outputs[step] = h
    return outputs, h


def _rnn(
    x: np.ndarray,
    initial_h: np.ndarray,
    weight_ih: np.ndarray,
    weight_hh: np.ndarray,
    bias: Any = None,
    direction: str = "forward",
    output_sequence: Any = False,
    activation: str = "tanh",
) -> tuple[np.ndarray, ...]:
    assert output_sequence
    assert activation == "tanh"
    h, outputs = initial_h, np.zeros((len(x), *initial_h.shape), x.dtype)
    for step in _steps(x, direction):
        h = np.tanh(x[step] @ weight_ih.T + h @ weight_hh.T + (0 if bias is None else bias))
        outputs[step] = h
    return outputs, h


SEMANTICS: Mapping[str, Semantics] = {
    "linear": _linear,
    "matmul": _matmul,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "lstm": _lstm,
    "gru": _gru,
    "rnn": _rnn,
}
