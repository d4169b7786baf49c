"""Reading safetensors, the format that Hugging Face folders keep weights in, without reading the weights.

    8 bytes   length n of the header, little endian
    n bytes   JSON: {"name": {"dtype": "BF16", "shape": [4096, 1024], "data_offsets": [begin, end]}, ...}
    the rest  the tensors; offsets count from here

A folder holds `model.safetensors`, or several files with `model.safetensors.index.json`, whose "weight_map" says which
file has which tensor. Files are mapped: a tensor's bytes are read when it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import onnx_ir as ir

from qgraph.errors import UserError, nearest
from qgraph.onnx_file import MappedFile, MappedTensor

__all__ = ["SafeTensors", "open_safetensors"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LENGTH = 8
_LARGEST_HEADER = 100_000_000
_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32,
    "I16": ir.DataType.INT16,
    "I8": ir.DataType.INT8,
    "U64": ir.DataType.UINT64,
    "U32": ir.DataType.UINT32,
    "U16": ir.DataType.UINT16,
    "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
}
_WEIGHTS = ("F32", "F16", "BF16")


class SafeTensors(Mapping[str, MappedTensor]):
    """The tensors of one or several files, by name, in the order in which they are stored.

    Looking one up gives a float32, float16 or bfloat16 tensor whose bytes are still in the file.

    Raises:
        UserError: on looking up, there is no such tensor, or its type is none of these.
    """

    def __init__(self, where: Path, entries: Mapping[str, _Entry]) -> None:
        self._where = where
        self._entries = entries

    def __getitem__(self, name: str) -> MappedTensor:
        if name not in self._entries:
            raise UserError(f"{self._where} has no tensor '{name}'.{nearest(name, self._entries)}")
        return self._entries[name].tensor(name)

    def rows(self, name: str, begin: int, end: int) -> MappedTensor:
        """Return some rows (along the first axis) of a tensor, as little read as the whole.

        Raises:
            UserError: as on looking up.
        """
        whole = self[name]
        count, *others = whole.shape.numpy()
        row = whole.nbytes // count
        shape = ir.Shape([end - begin, *others])
        file = self._entries[name].file
        return MappedTensor(file, whole.offset + begin * row, whole.dtype, shape, name, external=False)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _Entry:
    """Where a tensor lies."""

    def __init__(self, file: MappedFile, dtype: str, shape: Sequence[int], begin: int, end: int) -> None:
        self.file = file
        self.dtype = dtype
        self.shape = shape
        self.begin = begin
        self.end = end

    def tensor(self, name: str) -> MappedTensor:
        if self.dtype not in _WEIGHTS:
            raise UserError(
                f"{self.file.path}: tensor '{name}' is {self.dtype}, and weights must be {', '.join(_WEIGHTS)}: "
                "take the checkpoint that is not quantized"
            )
        return MappedTensor(self.file, self.begin, _TYPES[self.dtype], ir.Shape(self.shape), name, external=False)


def open_safetensors(path: Path) -> SafeTensors:
    """Open a .safetensors file, or the folder that holds one or several.

    Raises:
        UserError: nothing is there; a file is truncated or damaged; tensors overlap, or one is there twice; the index
            names a file or a tensor that is missing.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_file():
        return SafeTensors(path, _read_file(path))
    if (path / _INDEX).is_file():
        return SafeTensors(path, _read_shards(path))
    if (path / _SINGLE).is_file():
        return SafeTensors(path / _SINGLE, _read_file(path / _SINGLE))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} holds no .safetensors file: download the weights in this format, or convert them")
    if len(files) > 1:
        raise UserError(f"{path} holds {len(files)} .safetensors files and no {_INDEX}, which says what is in which")
    return SafeTensors(files[0], _read_file(files[0]))


def _read_shards(folder: Path) -> dict[str, _Entry]:
    index = folder / _INDEX
    named = _json(index, index.read_bytes()).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise UserError(f'{index} has no "weight_map" from tensors to files: download it again')
    entries: dict[str, _Entry] = {}
    for file in sorted(set(named.values())):
        if Path(file).name != file:
            raise UserError(f"{index} names the file '{file}', outside its folder")
        if not (folder / file).is_file():
            raise UserError(f"{folder} lacks {file}, which {_INDEX} names: download it")
        for name, entry in _read_file(folder / file).items():
            if name in entries:
                raise UserError(f"tensor '{name}' is there twice: in {entries[name].file.path} and {folder / file}")
            entries[name] = entry
    for name, file in named.items():
        if name not in entries or entries[name].file.path.name != file:
            raise UserError(f"{folder / file} lacks the tensor '{name}' that {_INDEX} says it has: download both again")
    return entries


def _read_file(path: Path) -> dict[str, _Entry]:
    file = MappedFile(path)
    start = bytes(file.bytes_at(0, min(file.size, 24)))
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
    length = int.from_bytes(start[:_LENGTH], "little")
    if file.size < _LENGTH or (length <= _LARGEST_HEADER and _LENGTH + length > file.size):
        raise UserError(f"{path} is cut off in its header: it has {file.size} bytes. Download it again.")
    if length > _LARGEST_HEADER:
        raise UserError(f"{path} is no safetensors file: its header would have {length} bytes")
    header = _json(path, bytes(file.bytes_at(_LENGTH, length)))
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, _LENGTH + length) for name, value in header.items()}
    _refuse_overlaps(path, entries)
    return entries


def _entry(file: MappedFile, name: str, value: Any, data: int) -> _Entry:
    where = f"{file.path}: tensor '{name}'"
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if dtype not in _TYPES:
        raise UserError(f"{where} is of type {dtype!r}, which is not known (there are: {', '.join(_TYPES)})")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise UserError(f"{where} has no valid shape and data_offsets in the header: download the file again")
    begin, end = data + offsets[0], data + offsets[1]
    needed = math.prod(shape) * _TYPES[dtype].bitwidth // 8
    if end > file.size:
        raise UserError(
            f"{where} ends at byte {end}, but the file has only {file.size}: it is cut off. Download it again."
        )
    if end - begin != needed:
        raise UserError(f"{where} has {end - begin} bytes, but {dtype} {shape} needs {needed}: the file is damaged")
    return _Entry(file, dtype, shape, begin, end)


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _refuse_overlaps(path: Path, entries: Mapping[str, _Entry]) -> None:
    last, end = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end and entry.begin != entry.end:
            raise UserError(f"{path}: tensors '{last}' and '{name}' overlap: the file is damaged, download it again")
        last, end = name, max(end, entry.end)


def _json(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise UserError(f"{path}: '{twice}' is there twice: the file is damaged")
        return found

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} does not hold valid JSON where it should: {error}. Download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__} where a JSON object should be: download it again")
    return value
