import dataclasses

import numpy as np
import pytest

from qgraph.numerics.schemes import INT8, INT8_ACTIVATION, INT8_WEIGHT, UINT8, UINT8_WEIGHT, Scheme


@pytest.mark.parametrize(
    ("scheme", "qmin", "qmax", "centre", "dtype"),
    [
        (INT8, -128, 127, 0, np.int8),
        (INT8_WEIGHT, -127, 127, 0, np.int8),
        (INT8_ACTIVATION, -128, 127, 0, np.int8),
        (UINT8, 0, 255, 128, np.uint8),
        (UINT8_WEIGHT, 0, 255, 128, np.uint8),
        (Scheme(bits=4), -8, 7, 0, np.int8),
        (Scheme(bits=4, narrow=True), -7, 7, 0, np.int8),
        (Scheme(bits=2, signed=False, symmetric=False), 0, 3, 2, np.uint8),
        (Scheme(bits=3, signed=False, narrow=True), 1, 7, 4, np.uint8),
    ],
)
def test_integers(scheme, qmin, qmax, centre, dtype):
    assert (scheme.qmin, scheme.qmax, scheme.centre, scheme.dtype) == (qmin, qmax, centre, dtype)


@pytest.mark.parametrize(
    ("block_shape", "axis", "block_size", "scale_shape"),
    [
        ((), None, 0, ()),
        ((-1, -1, -1), None, 0, ()),
        ((1, -1, -1), 0, 0, (6,)),
        ((-1, -1, 1), 2, 0, (5,)),
        ((1, 3, 1), 1, 3, (6, 2, 5)),
        ((4, 1, 1), 0, 4, (2, 4, 5)),
        ((4, 2, 1), None, 0, (2, 2, 5)),
        ((1, -1, 1), None, 0, (6, 1, 5)),
    ],
)
def test_blocks_of_a_6_by_4_by_5_array(block_shape, axis, block_size, scale_shape):
    scheme = Scheme(block_shape=block_shape)
    assert (scheme.axis, scheme.block_size, scheme.scale_shape((6, 4, 5))) == (axis, block_size, scale_shape)


def test_axes_count_from_the_end_too():
    assert INT8.per_channel(4, -1).block_shape == (-1, -1, -1, 1)
    assert INT8.per_group(2, -2, 32).block_shape == (32, 1)
    assert INT8.per_channel(4, 0).per_tensor() == INT8


@pytest.mark.parametrize("fault", [{"bits": 1}, {"bits": 9}, {"block_shape": (0, 1)}, {"block_shape": (-2,)}])
def test_what_makes_no_scheme_is_refused(fault):
    with pytest.raises(ValueError, match=r"bits|block shape"):
        Scheme(**fault)


def test_a_scheme_is_a_value():
    assert hash(INT8.per_channel(2, 1)) == hash(INT8.per_channel(2, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        INT8.bits = 4
    with pytest.raises(ValueError, match="no axis 2"):
        INT8.per_channel(2, 2)
    with pytest.raises(ValueError, match="does not fit"):
        INT8.per_channel(2, 1).grid((3,))
