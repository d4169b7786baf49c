"""ONNX files: reading them without reading their weights, writing them one weight at a time, all or nothing.

    read    parses the graph; every large tensor stays a `MappedTensor`, whether it lies in the model file or beside it
    write   streams the initializers, lazy ones included, into temporary files and renames these at the end

Memory follows the largest tensor. A single file holds at most 2 GiB (protobuf's limit); beyond, or above a chosen
size, the weights go to a file beside the graph, as the ONNX specification of external data lays down.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import math
import mmap
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, ClassVar

import numpy as np
import onnx
import onnx.defs
import onnx_ir as ir

from qgraph import wire
from qgraph.errors import UserError
from qgraph.lazy_tensors import JointTensor, evaluated

__all__ = ["MappedTensor", "StreamedTensor", "forget_pages", "read", "write"]

STREAMED_FROM = 1024
"""Tensors of fewer bytes are parsed and written with the graph; mapping them one by one would cost more."""
ALIGNMENT = 64
"""Tensors in a weight file start at multiples of this, so that vector loads from the mapped file are aligned."""

# What onnx_ir warns of while it reads a broken model, `qgraph.ir.load` refuses in words.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())

_LARGEST_PROTOBUF = (1 << 31) - 1
_CHUNK = 1 << 24
_TEXT_FORMATS = {".json", ".onnxjson", ".onnxtext", ".onnxtxt", ".pbtxt", ".prototxt", ".textproto", ".txtpb"}
_OLDEST_IR = 3
_SETTLED = 60.0
"""Seconds after which a file that its writer left behind counts as abandoned."""


class MappedFile:
    """A file mapped into memory for reading."""

    _open: ClassVar[weakref.WeakSet[MappedFile]] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        self._open.add(self)

    def bytes_at(self, offset: int, length: int) -> np.ndarray:
        """Return `length` bytes as a read-only uint8 array that is not yet read from disk."""
        if not length:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._map, dtype=np.uint8, count=length, offset=offset)

    def view(self) -> memoryview:
        """Return all bytes, unread."""
        return memoryview(self._map)

    def forget(self) -> None:
        """Take the pages that were read out of the resident set; reading them again is allowed."""
        if isinstance(self._map, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def forget_pages() -> None:
    """Take the pages of all mapped weights out of the resident set, for instance after one layer is done.

    Arrays and tensors stay valid: what is read again comes from the file cache.
    """
    for file in list(MappedFile._open):  # noqa: SLF001 - of this module
        file.forget()


class StreamedTensor(ir.TensorProtocol):
    """A tensor whose `tofile` writes it piece by piece through `file.write`, so that it is never whole in memory."""

    def tofile(self, file: Any) -> None:
        """Write the bytes to a binary file."""
        raise NotImplementedError


class MappedTensor(StreamedTensor):
    """A tensor whose bytes lie in a mapped file; nothing is read before, or kept after, somebody uses them.

    Attributes:
        external: whether the file is one beside the model, not the model itself.
    """

    def __init__(
        self, file: MappedFile, offset: int, dtype: ir.DataType, shape: ir.Shape, name: str | None, *, external: bool
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.shape: ir.Shape = shape
        self.doc_string = None
        self.metadata_props: MutableMapping[str, str] = {}
        self.meta: MutableMapping[str, Any] = {}
        self.external = external
        self._file = file
        self._offset = offset

    @property
    def path(self) -> Path:
        """The file that holds the bytes."""
        return self._file.path

    @property
    def offset(self) -> int:
        """Where in the file they begin."""
        return self._offset

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape.numpy())

    @property
    def nbytes(self) -> int:
        """The number of bytes, packed as the specification lays down."""
        return (self.size * self.dtype.bitwidth + 7) // 8

    @property
    def raw(self) -> np.ndarray:
        """The bytes as they lie in the file, uint8 [nbytes], read-only."""
        return self._file.bytes_at(self._offset, self.nbytes)

    def numpy(self) -> np.ndarray:
        """Return a read-only array that views the file (a copy for elements of less than a byte)."""
        if self.dtype.bitwidth < 8:
            return np.asarray(ir.PackedTensor(self.raw, self.dtype, shape=self.shape).numpy())
        return self.raw.view(self.dtype.numpy().newbyteorder("<")).reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return np.array(array, dtype=dtype) if copy else np.asarray(array, dtype=dtype)

    def __dlpack__(self, *, stream: Any = ...) -> Any:
        del stream
        return self.numpy().copy().__dlpack__()

    def __dlpack_device__(self) -> Any:
        return np.empty(0).__dlpack_device__()

    def tobytes(self) -> bytes:
        """Return the bytes in the order of the specification (little endian)."""
        return self.raw.tobytes()

    def tofile(self, file: Any) -> None:
        """Write the bytes to a binary file, some megabytes at a time."""
        for start in range(0, self.nbytes, _CHUNK):
            file.write(self._file.bytes_at(self._offset + start, min(_CHUNK, self.nbytes - start)).data)

    def __repr__(self) -> str:
        return f"MappedTensor<{self.dtype},{self.shape}>(name={self.name!r}, path={str(self.path)!r})"


def read(path: Path) -> ir.Model:
    """Read a model; see `qgraph.ir.load`."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the .onnx file in it")
    try:
        if path.suffix.lower() in _TEXT_FORMATS:
            file, proto = None, _parse_text(path)
        else:
            file = MappedFile(path)
            proto = _parse(file)
        _refuse(proto)
        model = ir.from_proto(proto)
        _resolve_tensors(model, path, file)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise UserError(f"{path} is not a valid ONNX model: {_first_line(error)}") from error
    return model


def _parse_text(path: Path) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx calls its text formats experimental
        return onnx.load(path, load_external_data=False)


def _parse(file: MappedFile) -> onnx.ModelProto:
    if not file.size:
        raise UserError(f"{file.path} is empty: it was not written to the end, or not downloaded")
    if bytes(file.bytes_at(0, min(file.size, 24))).startswith(b"version https://git-lfs"):
        raise UserError(f"{file.path} is a Git LFS pointer, not the model: run `git lfs pull`")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(wire.skeleton(file.view(), STREAMED_FROM))
    except wire.WireError as error:
        raise UserError(f"{file.path} is not a valid ONNX model: {error}. Export or download it again.") from error
    except Exception as error:
        raise UserError(f"{file.path} is not a valid ONNX model: {_first_line(error)}") from error
    if not proto.HasField("graph"):
        raise UserError(f"{file.path} is not an ONNX model: it holds no graph")
    return proto


def _first_line(error: BaseException) -> str:
    """Return the innermost cause in one line: the errors of onnx_ir wrap it in a trace of what was being read."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _refuse(proto: onnx.ModelProto) -> None:
    """Refuse what the IR cannot represent, in words, before it stumbles over it or drops it silently."""
    if proto.ir_version < _OLDEST_IR:
        raise UserError(
            f"the model has IR version {proto.ir_version}, but must have {_OLDEST_IR} (2017) or later: export it again"
        )
    if proto.ir_version > onnx.IR_VERSION:
        raise UserError(
            f"the model has IR version {proto.ir_version}, and the installed onnx {onnx.__version__} knows "
            f"{onnx.IR_VERSION} at most: upgrade onnx"
        )
    known = onnx.defs.onnx_opset_version()
    for opset in [*proto.opset_import, *(opset for function in proto.functions for opset in function.opset_import)]:
        if opset.domain in ("", "ai.onnx") and opset.version < 1:
            raise UserError(f"the model is written for opset {opset.version}, which does not exist: export it again")
        if opset.domain in ("", "ai.onnx") and opset.version > known:
            raise UserError(
                f"the model is written for opset {opset.version}, and the installed onnx {onnx.__version__} knows "
                f"{known} at most: upgrade onnx, or export for an older opset"
            )
    for tensor in proto.graph.sparse_initializer:
        raise UserError(
            f"the initializer '{tensor.values.name}' is stored sparse, which is not supported: store it dense "
            "(compression to sparse weights is a pass's work)"
        )
    names = [tensor.name for tensor in proto.graph.initializer]
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise UserError(f"the initializer '{twice}' is there twice: export the model again")
    for value in [*proto.graph.input, *proto.graph.output]:
        if value.type.HasField("map_type"):
            raise UserError(f"'{value.name}' is a map, which is not supported: export without ZipMap")


def _resolve_tensors(model: ir.Model, path: Path, file: MappedFile | None) -> None:
    """Put mapped tensors where the deserialized model refers to files, and check that the rest is whole."""
    files: dict[str, MappedFile] = {}

    def resolve(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        where = f"{path}: tensor '{tensor.name}'"
        if any(dim < 0 for dim in tensor.shape.numpy()):
            raise UserError(f"{where} has a negative dimension: {list(tensor.shape.numpy())}")
        if not isinstance(tensor, ir.ExternalTensor):
            tensor.numpy()
            return tensor
        if file is not None and tensor.location == wire.HERE:
            source = file
        else:
            source = _beside(path, os.fspath(tensor.location), files, where)
        return _map(tensor, source, where, external=source is not file)

    for graph in (*_graphs(model), *(function.graph for function in model.functions.values())):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = resolve(value.const_value)
        for node in graph:
            _resolve_attributes(node, resolve)


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    yield from model.graph.subgraphs()


def _resolve_attributes(node: ir.Node, resolve: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            node.attributes[name] = ir.AttrTensor(name, resolve(attribute.as_tensor()))
        elif attribute.type == ir.AttributeType.TENSORS:
            node.attributes[name] = ir.AttrTensors(name, [resolve(tensor) for tensor in attribute.as_tensors()])


def _map(tensor: ir.ExternalTensor, source: MappedFile, where: str, *, external: bool) -> ir.TensorProtocol:
    offset, length = tensor.offset or 0, tensor.length
    if tensor.dtype == ir.DataType.STRING:
        raise UserError(f"{where} holds text as raw data, which ONNX does not allow")
    needed = tensor.nbytes
    if length is not None and length != needed:
        raise UserError(f"{where} has {length} bytes, but {tensor.dtype} {list(tensor.shape.numpy())} needs {needed}")
    if offset < 0 or offset + needed > source.size:
        raise UserError(
            f"{where} ends at byte {offset + needed} of {source.path.name}, which has only {source.size}: the file is "
            "cut off, or belongs to another model"
        )
    return MappedTensor(source, offset, tensor.dtype, tensor.shape, tensor.name, external=external)


def _beside(path: Path, location: str, files: dict[str, MappedFile], where: str) -> MappedFile:
    """Open a file of external data; it must lie in the model's folder, symbolic links followed."""
    if location in files:
        return files[location]
    if not location or "\0" in location:
        raise UserError(f"{where} says that its data lie in another file, but not in which")
    folder = path.parent.resolve()
    pure = PurePosixPath(location)
    if pure.is_absolute() or PureWindowsPath(location).is_absolute() or ".." in pure.parts:
        raise UserError(f"{where} lies in '{location}', outside the model's folder: put the file beside the model")
    target = (folder / location).resolve()
    if not target.is_relative_to(folder):
        raise UserError(
            f"{where} lies in '{location}', a link that leads outside the model's folder: copy the file itself there"
        )
    if not target.is_file():
        raise UserError(f"{where} lies in '{location}', which is missing: copy it to {folder}")
    files[location] = MappedFile(target)
    return files[location]


def write(model: ir.Model, path: Path, external_above: int) -> None:
    """Write a model; see `qgraph.ir.save`."""
    streamed = [
        (value, value.const_value)
        for value in model.graph.initializers.values()
        if value.const_value is not None and _is_streamed(value.const_value)
    ]
    proto = _serialize(model, streamed)
    total = sum(tensor.nbytes for _, tensor in streamed)
    tensors = [tensor for _, tensor in streamed]
    data_path = path.with_name(path.name + ".data")
    try:
        if total > external_above or total + proto.ByteSize() > _LARGEST_PROTOBUF:
            # The graph appears last: without it, nobody takes what is there for a model.
            with _replacing(path) as file, _replacing(data_path) as data:
                _write_beside(proto, tensors, data, data_path.name)
                file.write(proto.SerializeToString(deterministic=True))
                file.flush()
        else:
            with _replacing(path) as file:
                _write_inside(proto, tensors, file)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _is_streamed(tensor: ir.TensorProtocol) -> bool:
    if isinstance(tensor, ir.ExternalTensor | JointTensor):
        return True
    return tensor.nbytes >= STREAMED_FROM if tensor.dtype != ir.DataType.STRING else False


def _serialize(model: ir.Model, streamed: list[tuple[ir.Value, ir.TensorProtocol]]) -> onnx.ModelProto:
    """Serialize everything but the data of `streamed`, which are marked as external."""
    try:
        for value, tensor in streamed:
            value.const_value = ir.ExternalTensor(
                wire.HERE, 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name or ""
            )
        return ir.to_proto(model)
    finally:
        for value, tensor in streamed:
            value.const_value = tensor
            tensor.name = value.name


def _is_stand_in(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.external_data[0].value == wire.HERE


def _write_inside(proto: onnx.ModelProto, tensors: list[ir.TensorProtocol], file: BinaryIO) -> None:
    """Write one file: the graph's bytes, then its initializers one by one, as parts of the same message."""
    parts: list[tuple[bytes, ir.TensorProtocol | None]] = []
    waiting = iter(tensors)
    for initializer in proto.graph.initializer:
        tensor = next(waiting) if _is_stand_in(initializer) else None
        if tensor is not None:
            initializer.ClearField("external_data")
            initializer.ClearField("data_location")
        head = initializer.SerializeToString(deterministic=True)
        if tensor is not None:
            head += wire.length_delimited(9, tensor.nbytes)
        length = len(head) + (tensor.nbytes if tensor is not None else 0)
        parts.append((wire.length_delimited(5, length) + head, tensor))
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    file.write(proto.SerializeToString(deterministic=True))
    length = len(graph) + sum(len(head) + (tensor.nbytes if tensor is not None else 0) for head, tensor in parts)
    file.write(wire.length_delimited(7, length))
    file.write(graph)
    with contextlib.closing(evaluated(tensors, finished=forget_pages)) as contents:
        for head, tensor in parts:
            file.write(head)
            if tensor is not None:
                _write_tensor(tensor, next(contents), file)


def _write_beside(proto: onnx.ModelProto, tensors: list[ir.TensorProtocol], data: BinaryIO, name: str) -> None:
    """Write the streamed tensors to a weight file and refer to them in `proto`."""
    waiting = iter(tensors)
    with contextlib.closing(evaluated(tensors, finished=forget_pages)) as contents:
        for initializer in filter(_is_stand_in, proto.graph.initializer):
            tensor = next(waiting)
            data.write(bytes(-data.tell() % ALIGNMENT))
            initializer.ClearField("external_data")
            for key, value in (("location", name), ("offset", str(data.tell())), ("length", str(tensor.nbytes))):
                initializer.external_data.add(key=key, value=value)
            _write_tensor(tensor, next(contents), data)


def _write_tensor(tensor: ir.TensorProtocol, content: ir.TensorProtocol, file: BinaryIO) -> None:
    """Write `content`, which is what the perhaps lazy `tensor` has announced."""
    before = file.tell()
    if isinstance(content, StreamedTensor):
        content.tofile(file)
    else:
        # An array's own tofile() would not say why it failed.
        file.write(_bytes_of(content))
    written = file.tell() - before
    if written != tensor.nbytes:
        raise ValueError(f"tensor '{tensor.name}' announced {tensor.nbytes} bytes and has {written}")
    forget_pages()


def _bytes_of(tensor: ir.TensorProtocol) -> Any:
    """Return the bytes of a tensor in the order of the specification, without a copy where the array has them."""
    if not isinstance(tensor, ir.Tensor) or tensor.dtype.bitwidth < 8 or sys.byteorder != "little":
        return tensor.tobytes()
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary sibling of `path` and rename it to `path` at the end, or remove it if anything fails."""
    _remove_left_over(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb", buffering=1 << 20) as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_left_over(path: Path) -> None:
    """Remove what a killed process had written of `path`: its process is gone, and nobody writes to it any more."""
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = file.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if process.isdecimal() and not _is_running(int(process)):
            with contextlib.suppress(OSError):
                # Another machine may write to the same disk; then the file has just changed.
                if time.time() - file.stat().st_mtime > _SETTLED:
                    file.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
