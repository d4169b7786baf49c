"""Integer dot products as processors without VNNI compute them.

    vpmaddubsw    u8[2n], s8[2n]  ->  s16[n]      saturate(a0 * b0 + a1 * b1)
    vpmaddwd      s16[2n], 1      ->  s32[n]      exact

AVX2 and AVX-512 multiply unsigned bytes with signed ones and add neighbours in 16 bits, which saturates: twice
255 * 127 is 64770, and becomes 32767. VNNI and the dot products of Arm add in 32 bits. Source: Intel 64 and IA-32
Architectures Software Developer's Manual, volume 2, PMADDUBSW.
"""

from __future__ import annotations

import numpy as np

__all__ = ["LARGEST_PAIR", "largest_pair", "saturating_product"]

LARGEST_PAIR = 32767
"""What the sum of a pair of products may reach; 7-bit weights stay below: 255 * 64 * 2 = 32640."""
_LARGEST_UNSIGNED = 255


def saturating_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return left @ right as AVX2 computes it, int32 [rows, columns].

    Args:
        left: uint8 [rows, width].
        right: int8 [width, columns].
    """
    if left.dtype != np.uint8 or right.dtype != np.int8:
        raise ValueError(f"uint8 and int8 are multiplied, not {left.dtype} and {right.dtype}")
    odd = left.shape[1] % 2
    wide = np.pad(left, ((0, 0), (0, odd))).astype(np.int32)
    tall = np.pad(right, ((0, odd), (0, 0))).astype(np.int32)
    pairs = wide[:, 0::2, None] * tall[None, 0::2] + wide[:, 1::2, None] * tall[None, 1::2]
    limits = np.iinfo(np.int16)
    return np.asarray(np.clip(pairs, limits.min, limits.max).sum(axis=1, dtype=np.int32))


def largest_pair(weights: np.ndarray) -> int:
    """Return what the sum of two products of these int8 weights with bytes may reach, whichever two meet.

    No sum saturates if it is at most `LARGEST_PAIR`: the negative limit is one further away.
    """
    wide = weights.astype(np.int32)
    return 2 * _LARGEST_UNSIGNED * max(0, int(wide.max(initial=0)), -int(wide.min(initial=0)))
