"""Sparse weights in fewer bytes: a bit for each element, and the numbers that are not zero.

    W [..]    <=>    mask uint8 [E / 8, 1]      bit i of byte b: whether element 8 b + i is other than zero
                     values [1 + n]             a zero, then the n numbers in the order of their elements

An element is values[bit * (number of bits set up to it)]. For 2:4 a bit each is what sparse tensor cores' own indices
take, two bits for a number that stays: 17 of 32 bits are left in float32, 9 of 16 in float16.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["mask_and_values", "packed_bytes", "with_zeros"]


def mask_and_values(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mask and values of an array whose elements are a multiple of 8; minus zero counts as zero.

    Raises:
        ValueError: they are not.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.size % 8:
        raise ValueError(f"{flat.size} elements fill no whole bytes of a mask")
    stays = flat != 0
    return np.packbits(stays, bitorder="little")[:, None], np.concatenate([np.zeros(1, flat.dtype), flat[stays]])


def with_zeros(mask: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array [shape] that mask and values stand for.

    Raises:
        ValueError: they do not fit.
    """
    stays = np.unpackbits(mask.reshape(-1), bitorder="little").astype(bool)
    if stays.size != math.prod(shape) or np.count_nonzero(stays) != values.size - 1:
        raise ValueError(f"a mask of {stays.size} bits and {values.size} values are no array of {shape}")
    flat = np.zeros(stays.size, values.dtype)
    flat[stays] = values[1:]
    return flat.reshape(shape)


def packed_bytes(array: np.ndarray) -> int:
    """Return the bytes of mask and values."""
    return array.size // 8 + (1 + int(np.count_nonzero(array))) * array.itemsize
