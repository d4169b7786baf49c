"""Samples from .npz files."""

from __future__ import annotations

import dataclasses
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from qgraph.errors import UserError, nearest
from qgraph.feeds import LABELS, InputSpec, cast, conform_feed, fits, quoted, show_shape
from qgraph.pipeline import Feeds
from qgraph.sample_images import Preset, find_preset

__all__ = ["NpzFile", "NpzFolder"]

_LOCAL_HEADER = 30


class _Array(Protocol):
    """An array of a .npz file, read row by row where its storage allows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[np.generic]: ...

    def rows(self, start: int, stop: int) -> np.ndarray: ...

    def whole(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array that lies in the file as it is: rows are read where they lie, and none is kept."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def rows(self, start: int, stop: int) -> np.ndarray:
        row = int(np.prod(self.shape[1:], dtype=np.int64))
        with self.path.open("rb") as file:
            file.seek(self.offset + start * row * self.dtype.itemsize)
            flat = np.fromfile(file, self.dtype, (stop - start) * row)
        if flat.size != (stop - start) * row:
            raise UserError(f"{self.path} is truncated")
        return flat.reshape(stop - start, *self.shape[1:])

    def whole(self) -> np.ndarray:
        return self.rows(0, self.shape[0]) if self.shape else self._scalar()

    def _scalar(self) -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return np.fromfile(file, self.dtype, 1).reshape(())


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """An array that is compressed: it is kept in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self.array.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]

    def whole(self) -> np.ndarray:
        return self.array


def _open_arrays(path: Path) -> dict[str, _Array]:
    """Return the arrays of a .npz file by name.

    Raises:
        UserError: it cannot be read, or an array holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return {
                info.filename.removesuffix(".npy"): _open_array(path, file, info)
                for info in file.infolist()
                if info.filename.endswith(".npy")
            }
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, struct.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _open_array(path: Path, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Array:
    with file.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version in readers and info.compress_type == zipfile.ZIP_STORED:
            shape, fortran, dtype = readers[version](stream)
            header = stream.tell()
            if not (fortran or dtype.hasobject):
                return _Stored(path, _data_offset(path, info) + header, shape, dtype)
    with file.open(info) as stream:
        return _Loaded(np.lib.format.read_array(stream, allow_pickle=False))


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)
    name, extra = struct.unpack("<HH", local[26:30])
    return info.header_offset + _LOCAL_HEADER + int(name) + int(extra)


@dataclasses.dataclass(frozen=True)
class _Column:
    """How one array feeds one input: feed i takes the rows from i * step on."""

    spec: InputSpec
    array: _Array
    step: int
    """Rows to a feed; 0 for an array that goes into every feed as it is."""
    stacked: bool
    """The rows are whole inputs, not samples along the input's first axis."""
    preset: Preset | None
    where: str

    def __len__(self) -> int:
        return self.array.shape[0] // self.step

    def feed(self, index: int) -> np.ndarray:
        if not self.step:
            return cast(self.array.whole(), self.spec, self.where)
        rows = self.array.rows(index * self.step, (index + 1) * self.step)
        if self.preset is not None:
            rows = self.preset.arrays(rows, self.spec, self.where)
        return cast(rows[0] if self.stacked else rows, self.spec, self.where)


class NpzFile:
    """A .npz file whose arrays' first axis counts the samples.

    Args:
        path: the file.
        inputs: what the model takes.
        rename: array name -> input name.
        preprocess: preset for arrays of uint8 images, [n, height, width, 3], [n, 3, height, width] or
            [n, height, width].
        batch: samples to a feed where the inputs leave that open.

    Raises:
        UserError: it cannot be read or does not fit the inputs.
    """

    def __init__(
        self, path: Path, inputs: Sequence[InputSpec], rename: Mapping[str, str], preprocess: str | None, batch: int
    ) -> None:
        self._path = path
        self._arrays = _open_arrays(path)
        named = _renamed(path, self._arrays, rename, inputs)
        preset = None if preprocess is None else find_preset(preprocess)
        self._columns = [self._column(spec, named, preset, batch) for spec in inputs]
        counts = {column.spec.name: len(column) for column in self._columns if column.step}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"'{name}' {count}" for name, count in counts.items())
            raise UserError(f"{path}: the arrays hold different numbers of samples: {told}")
        self._count = next(iter(counts.values()), 1 if self._columns else 0)
        self._step = next((column.step for column in self._columns if column.step), 1)

    def __len__(self) -> int:
        return self._count

    def feeds(self, indices: Sequence[int]) -> Iterator[Feeds]:
        """See `qgraph.samples.Source`."""
        for index in indices:
            yield {column.spec.name: column.feed(index) for column in self._columns}

    def labels(self, name: str | None, indices: Sequence[int]) -> np.ndarray | None:
        """See `qgraph.samples.Source`."""
        array = _labels(self._path, self._arrays, name)
        if array is None:
            return None
        if not array.shape or array.shape[0] < self._count * self._step:
            raise UserError(
                f"{self._path}: '{name or LABELS}' has shape {show_shape(array.shape)}, "
                f"but there are {self._count * self._step} samples"
            )
        whole = array.whole()
        return np.concatenate([whole[index * self._step : (index + 1) * self._step] for index in indices])

    def _column(self, spec: InputSpec, arrays: Mapping[str, _Array], preset: Preset | None, batch: int) -> _Column:
        if spec.name not in arrays:
            raise UserError(_missing(self._path, spec.name, self._arrays))
        array, shape, wanted = arrays[spec.name], arrays[spec.name].shape, spec.shape
        where = f"{self._path}: array '{spec.name}'"
        if preset is not None and array.dtype == np.uint8 and wanted is not None and len(wanted) == 4:
            return _Column(spec, array, wanted[0] or batch, stacked=False, preset=preset, where=where)
        if shape == () and wanted in ((), None):
            return _Column(spec, array, 0, stacked=False, preset=None, where=where)
        if wanted is not None and len(shape) == len(wanted) + 1 and fits(shape[1:], wanted):
            return _Column(spec, array, 1, stacked=True, preset=None, where=where)
        step = batch if wanted is None else (wanted[0] or batch) if wanted else 0
        if not step or not shape or (wanted is not None and not fits((step, *shape[1:]), (step, *wanted[1:]))):
            raise UserError(_misshapen(where, shape, spec))
        if shape[0] < step:
            raise UserError(f"{where} holds {shape[0]} samples, but input '{spec.name}' takes {step} at once")
        return _Column(spec, array, step, stacked=False, preset=None, where=where)


class NpzFolder:
    """A folder of .npz files, each of which holds one feed.

    Args:
        files: in order; at least one.
        inputs: what the model takes.
        rename: array name -> input name.

    Raises:
        UserError: the first file cannot be read or does not fit the inputs; the others are looked at when they are
            needed.
    """

    def __init__(self, files: Sequence[Path], inputs: Sequence[InputSpec], rename: Mapping[str, str]) -> None:
        self._files = files
        self._inputs = inputs
        self._rename = rename
        next(self.feeds((0,)))

    def __len__(self) -> int:
        return len(self._files)

    def feeds(self, indices: Sequence[int]) -> Iterator[Feeds]:
        """See `qgraph.samples.Source`."""
        for index in indices:
            path = self._files[index]
            arrays = _open_arrays(path)
            named = _renamed(path, arrays, self._rename, self._inputs)
            for spec in self._inputs:
                if spec.name not in named:
                    raise UserError(_missing(path, spec.name, arrays))
            wanted = {spec.name: named[spec.name].whole() for spec in self._inputs}
            yield conform_feed(wanted, self._inputs, str(path))

    def labels(self, name: str | None, indices: Sequence[int]) -> np.ndarray | None:
        """See `qgraph.samples.Source`."""
        rows = []
        for index in indices:
            array = _labels(self._files[index], _open_arrays(self._files[index]), name)
            if array is None:
                return None
            rows.append(np.atleast_1d(array.whole()))
        return np.concatenate(rows)


def _labels(path: Path, arrays: Mapping[str, _Array], name: str | None) -> _Array | None:
    if name is not None and name not in arrays:
        raise UserError(f"{path} has no array '{name}' for labels (it has: {quoted(arrays)})")
    return arrays.get(name or LABELS)


def _renamed(
    path: Path, arrays: Mapping[str, _Array], rename: Mapping[str, str], inputs: Sequence[InputSpec]
) -> dict[str, _Array]:
    names = [spec.name for spec in inputs]
    for array, name in rename.items():
        if array not in arrays:
            raise UserError(f"--map {array}={name}: {path} has no array '{array}' (it has: {quoted(arrays)})")
        if name not in names:
            raise UserError(f"--map {array}={name}: the model has no input '{name}'.{nearest(name, names)}")
    return {rename.get(name, name): array for name, array in arrays.items()}


def _missing(path: Path, name: str, arrays: Mapping[str, _Array]) -> str:
    others = [array for array in arrays if array != LABELS] or ["ARRAY"]
    guess = max(others, key=lambda other: _common(other.lower(), name.lower()))
    return (
        f"{path} has no array for input '{name}' (it has: {quoted(arrays)}). Rename it, or pass --map {guess}={name}."
    )


def _common(one: str, other: str) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))


def _misshapen(where: str, shape: tuple[int, ...], spec: InputSpec) -> str:
    told = f"{where} has shape {show_shape(shape)}, but input '{spec.name}' takes {show_shape(spec.shape)}"
    if spec.shape is None or len(shape) != len(spec.shape):
        return told + ". Its first axis counts the samples."
    last_first = (shape[0], shape[-1], *shape[1:-1])
    if fits(last_first[1:], spec.shape[1:]):
        return told + f". Move its channels to the front: np.moveaxis(array, -1, 1) is {show_shape(last_first)}."
    return told
