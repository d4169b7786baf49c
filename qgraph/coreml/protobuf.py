"""Reading a Core ML model's protobuf messages, as far as an ML Program needs them.

Field numbers are those of Model.proto, FeatureTypes.proto and MIL.proto (coremltools, mlmodel/format), which are part
of the format; nothing of coremltools is needed to read a package. A message becomes a dictionary, and so does a map;
packed numbers become a list. Fields that are not named here are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qgraph.wire import WireError, read_varint

__all__ = ["decode"]

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_SIGN, _RANGE = 1 << 63, 1 << 64


class _Field(NamedTuple):
    """A field: its name, what it holds (a kind of scalar, or a message), and whether there may be several."""

    name: str
    kind: str
    repeated: bool = False


def _many(name: str, kind: str) -> _Field:
    return _Field(name, kind, repeated=True)


def _map(name: str, kind: str) -> _Field:
    return _Field(name, f"map {kind}", repeated=True)


_MESSAGES: Mapping[str, Mapping[int, _Field]] = {
    "Model": {
        1: _Field("version", "int"),
        2: _Field("description", "ModelDescription"),
        502: _Field("program", "Program"),
    },
    "ModelDescription": {
        1: _many("inputs", "FeatureDescription"),
        10: _many("outputs", "FeatureDescription"),
        100: _Field("metadata", "Metadata"),
    },
    "FeatureDescription": {1: _Field("name", "text"), 3: _Field("type", "FeatureType")},
    "FeatureType": {5: _Field("array", "ArrayFeatureType")},
    "ArrayFeatureType": {1: _many("shape", "int"), 2: _Field("type", "int")},
    "Metadata": {100: _map("entries", "text")},
    "Program": {2: _map("functions", "Function")},
    "Function": {
        1: _many("inputs", "NamedValueType"),
        2: _Field("opset", "text"),
        3: _map("blocks", "Block"),
    },
    "Block": {
        1: _many("inputs", "NamedValueType"),
        2: _many("outputs", "text"),
        3: _many("operations", "Operation"),
    },
    "Operation": {
        1: _Field("type", "text"),
        2: _map("inputs", "Argument"),
        3: _many("outputs", "NamedValueType"),
        4: _many("blocks", "Block"),
        5: _map("attributes", "Value"),
    },
    "Argument": {1: _many("bindings", "Binding")},
    "Binding": {1: _Field("name", "text"), 2: _Field("value", "Value")},
    "NamedValueType": {1: _Field("name", "text"), 2: _Field("type", "ValueType")},
    "ValueType": {1: _Field("tensor", "TensorType"), 2: _Field("list", "ListType")},
    "TensorType": {1: _Field("type", "int"), 2: _Field("rank", "int"), 3: _many("dimensions", "Dimension")},
    "ListType": {1: _Field("type", "ValueType"), 2: _Field("length", "Dimension")},
    "Dimension": {1: _Field("constant", "ConstantDimension"), 2: _Field("unknown", "UnknownDimension")},
    "ConstantDimension": {1: _Field("size", "int")},
    "UnknownDimension": {1: _Field("variadic", "int")},
    "Value": {
        2: _Field("type", "ValueType"),
        3: _Field("immediate", "ImmediateValue"),
        5: _Field("blob", "BlobFileValue"),
    },
    "ImmediateValue": {1: _Field("tensor", "TensorValue"), 3: _Field("list", "ListValue")},
    "ListValue": {1: _many("values", "Value")},
    "BlobFileValue": {1: _Field("file", "text"), 2: _Field("offset", "int")},
    "TensorValue": {
        1: _Field("floats", "Floats"),
        2: _Field("ints", "Integers"),
        3: _Field("bools", "Integers"),
        4: _Field("strings", "Texts"),
        5: _Field("longs", "Integers"),
        7: _Field("bytes", "Bytes"),
    },
    "Floats": {1: _many("values", "float")},
    "Integers": {1: _many("values", "int")},
    "Texts": {1: _many("values", "text")},
    "Bytes": {1: _Field("values", "bytes")},
}


def decode(data: memoryview, message: str = "Model") -> dict[str, Any]:
    """Return a serialized message as a dictionary: field name -> value; repeated fields that are empty are there too.

    Raises:
        WireError: the bytes do not follow the wire format, or end too early.
    """
    return _decode(data, 0, len(data), message)


def _decode(data: memoryview, position: int, end: int, message: str) -> dict[str, Any]:
    fields = _MESSAGES[message]
    found: dict[str, Any] = {
        field.name: {} if field.kind.startswith("map ") else [] for field in fields.values() if field.repeated
    }
    while position < end:
        tag, position = read_varint(data, position, end)
        start, position = _extent(data, position, end, tag & 7)
        field = fields.get(tag >> 3)
        if field is not None:
            _put(found, field, data, start, position, tag & 7)
    return found


def _extent(data: memoryview, position: int, end: int, wire: int) -> tuple[int, int]:
    """Return where the bytes of a field start and end."""
    if wire == _DELIMITED:
        length, start = read_varint(data, position, end)
        stop = start + length
    elif wire == _VARINT:
        start, stop = position, read_varint(data, position, end)[1]
    elif wire in (_FIXED64, _FIXED32):
        start, stop = position, position + (8 if wire == _FIXED64 else 4)
    else:
        raise WireError("its bytes are no protobuf message")
    if stop > end:
        raise WireError("it is cut off")
    return start, stop


def _put(found: dict[str, Any], field: _Field, data: memoryview, start: int, end: int, wire: int) -> None:
    if field.kind.startswith("map "):
        entry = _entry(data, start, end, field.kind.removeprefix("map "))
        found[field.name][entry[0]] = entry[1]
    elif field.kind in _PACKED and wire == _DELIMITED:
        found[field.name] += _PACKED[field.kind](data, start, end)
    elif field.repeated:
        found[field.name].append(_value(data, start, end, field.kind))
    else:
        found[field.name] = _value(data, start, end, field.kind)


def _entry(data: memoryview, start: int, end: int, kind: str) -> tuple[str, Any]:
    """Return key and value of a map's entry; either is left out where it is empty."""
    key, value = "", "" if kind == "text" else _decode(data, 0, 0, kind)
    while start < end:
        tag, start = read_varint(data, start, end)
        at, start = _extent(data, start, end, tag & 7)
        if tag >> 3 == 1:
            key = str(_value(data, at, start, "text"))
        else:
            value = _value(data, at, start, kind)
    return key, value


def _value(data: memoryview, start: int, end: int, kind: str) -> Any:
    if kind == "int":
        return _signed(read_varint(data, start, end)[0])
    if kind == "float":
        return float(np.frombuffer(data[start:end], "<f4")[0])
    if kind == "bytes":
        return data[start:end]
    if kind == "text":
        try:
            return bytes(data[start:end]).decode()
        except UnicodeDecodeError:
            raise WireError("a name in it is no text") from None
    return _decode(data, start, end, kind)


def _integers(data: memoryview, start: int, end: int) -> list[int]:
    found = []
    while start < end:
        number, start = read_varint(data, start, end)
        found.append(_signed(number))
    return found


def _floats(data: memoryview, start: int, end: int) -> list[float]:
    if (end - start) % 4:
        raise WireError("it is cut off")
    return [float(number) for number in np.frombuffer(data[start:end], "<f4")]


_PACKED: Mapping[str, Callable[[memoryview, int, int], list[Any]]] = {"int": _integers, "float": _floats}


def _signed(number: int) -> int:
    return number - _RANGE if number >= _SIGN else number
