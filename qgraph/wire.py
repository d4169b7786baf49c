"""Reading and writing the protobuf wire format of ONNX files around their weights.

A model file is a small graph with large byte strings (`TensorProto.raw_data`) in between. `skeleton` returns the
file without those strings, each replaced by a reference to where it lies; so a model is parsed in time and memory
that follow its graph, and its weights stay on disk. Field numbers are those of onnx.proto; the wire format is that of
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["HERE", "WireError", "length_delimited", "read_varint", "skeleton", "varint"]

HERE = "\x00here"
"""The location of external data that stands for the model file itself; no file can have this name."""

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _FUNCTION = range(6)
_PARTS: Mapping[int, Mapping[int, int]] = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH},
    _TENSOR: {},
    _FUNCTION: {7: _NODE},
}
"""Which fields of a message hold messages that may hold weights."""

_RAW_DATA = 9
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes do not follow the wire format, or end too early."""


def varint(number: int) -> bytes:
    """Encode an unsigned integer in 7-bit groups, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def length_delimited(field: int, length: int) -> bytes:
    """Encode what stands before `length` bytes of a field: its tag and the length."""
    return varint(field << 3 | _DELIMITED) + varint(length)


def skeleton(data: memoryview, minimum: int) -> bytes:
    """Return a serialized ModelProto without the raw data of tensors of at least `minimum` bytes.

    Each such tensor refers to `HERE`, with offset and length in `data`, as external data.

    Raises:
        WireError: `data` is not a protobuf message, or is cut off.
    """
    return b"".join(_message(data, 0, len(data), _MODEL, minimum))


def _message(data: memoryview, start: int, end: int, kind: int, minimum: int) -> list[bytes]:
    parts = _PARTS[kind]
    pieces: list[bytes] = []
    references: list[bytes] = []
    copied = start
    for tag_at, field, payload, payload_end in _fields(data, start, end):
        if payload_end - payload < minimum:
            continue
        if kind == _TENSOR and field == _RAW_DATA:
            pieces.append(bytes(data[copied:tag_at]))
            references.append(_reference(payload, payload_end - payload))
        elif field in parts:
            inner = _message(data, payload, payload_end, parts[field], minimum)
            pieces += [bytes(data[copied:tag_at]), length_delimited(field, sum(map(len, inner))), *inner]
        else:
            continue
        copied = payload_end
    pieces.append(bytes(data[copied:end]))
    # References go last: some writers spell out `data_location = DEFAULT`, and of a field given twice the last holds.
    return pieces + references


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (where its tag starts, field number, where its bytes start, where they end) of length-delimited fields."""
    position = start
    while position < end:
        tag_at = position
        tag, position = read_varint(data, position, end)
        kind = tag & 7
        if kind == _DELIMITED:
            length, position = read_varint(data, position, end)
            if length > end - position:
                raise WireError("it is cut off")
            yield tag_at, tag >> 3, position, position + length
            position += length
        elif kind == _VARINT:
            position = read_varint(data, position, end)[1]
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
            if position > end:
                raise WireError("it is cut off")
        else:
            raise WireError("its bytes are no protobuf message")


def read_varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    """Return an unsigned integer at `position` of `data`, and where it ends.

    Raises:
        WireError: it goes on behind `end`, or is longer than 64 bits.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise WireError("it is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise WireError("its bytes are no protobuf message")


def _reference(offset: int, length: int) -> bytes:
    """Encode TensorProto.external_data (13, StringStringEntryProto) and data_location (14) = EXTERNAL (1)."""
    entries = [("location", HERE), ("offset", str(offset)), ("length", str(length))]
    return b"".join(_entry(key, value) for key, value in entries) + varint(14 << 3 | _VARINT) + varint(1)


def _entry(key: str, value: str) -> bytes:
    texts = (key.encode(), value.encode())
    entry = b"".join(length_delimited(field, len(text)) + text for field, text in enumerate(texts, start=1))
    return length_delimited(13, len(entry)) + entry
