"""The data types of an ML Program, with their numbers in MIL.proto."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

__all__ = ["ARRAY_TYPES", "FROM_ONNX", "MilType"]


class MilType(enum.Enum):
    """A data type, by the name that MIL gives it."""

    BOOL = "bool"
    STRING = "string"
    FLOAT16 = "fp16"
    FLOAT32 = "fp32"
    INT4 = "int4"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    UINT1 = "uint1"
    UINT2 = "uint2"
    UINT3 = "uint3"
    UINT4 = "uint4"
    UINT6 = "uint6"
    UINT8 = "uint8"
    UINT16 = "uint16"
    UINT32 = "uint32"

    @property
    def bits(self) -> int:
        """Bits of a number in the weight file."""
        return 8 if self is MilType.BOOL else int("".join(filter(str.isdecimal, self.value)))

    @property
    def numpy(self) -> np.dtype:
        """The numpy type that holds its numbers; those of less than 8 bits have a byte each."""
        if self is MilType.BOOL:
            return np.dtype(np.bool_)
        if self in (MilType.FLOAT16, MilType.FLOAT32):
            return np.dtype(f"f{self.bits // 8}")
        return np.dtype(f"{'u' if self.value.startswith('u') else 'i'}{max(self.bits, 8) // 8}")

    @property
    def is_float(self) -> bool:
        """Whether it is a floating-point type."""
        return self in (MilType.FLOAT16, MilType.FLOAT32)

    @classmethod
    def of_proto(cls, number: int) -> MilType | None:
        """Return the type with a number of MIL.proto, or None."""
        return _PROTO.get(number)


_PROTO: Mapping[int, MilType] = {
    1: MilType.BOOL,
    2: MilType.STRING,
    10: MilType.FLOAT16,
    11: MilType.FLOAT32,
    21: MilType.INT8,
    22: MilType.INT16,
    23: MilType.INT32,
    25: MilType.INT4,
    31: MilType.UINT8,
    32: MilType.UINT16,
    33: MilType.UINT32,
    35: MilType.UINT4,
    36: MilType.UINT2,
    37: MilType.UINT1,
    38: MilType.UINT6,
    39: MilType.UINT3,
}

ARRAY_TYPES: Mapping[int, MilType] = {0x10010: MilType.FLOAT16, 0x10020: MilType.FLOAT32, 0x20020: MilType.INT32}
"""ArrayFeatureType.ArrayDataType: what inputs and outputs of a model may be."""

FROM_ONNX: Mapping[ir.DataType, MilType] = {
    ir.DataType.BOOL: MilType.BOOL,
    ir.DataType.FLOAT: MilType.FLOAT32,
    ir.DataType.FLOAT16: MilType.FLOAT16,
    ir.DataType.INT8: MilType.INT8,
    ir.DataType.UINT8: MilType.UINT8,
    ir.DataType.INT16: MilType.INT32,
    ir.DataType.UINT16: MilType.INT32,
    ir.DataType.INT32: MilType.INT32,
    ir.DataType.INT64: MilType.INT32,
}
"""What a tensor of a model becomes: whole numbers have 32 bits, but for quantized ones."""
