"""Weights that a long pass has finished, kept so that a run that was killed goes on where it was.

Each is a file of its own in `Context.work_folder`, written whole or not at all. Its name holds a fingerprint of all
that could change it: the pass with its options, the model with its weights, and the calibration samples. So nothing
stale is ever taken up. Without a work folder they are kept in memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError, is_disk_full
from qgraph.numerics.packing import pack_bits, unpack_bits
from qgraph.numerics.weights import QuantizedWeight, WeightScheme
from qgraph.onnx_file import MappedTensor
from qgraph.pipeline import Context

__all__ = ["Finished", "FinishedLayers", "fingerprint", "likeness"]


class Finished(NamedTuple):
    """A finished weight: what gives it back, and what was told about it (JSON values)."""

    produce: Callable[[], QuantizedWeight]
    facts: Mapping[str, Any]


class FinishedLayers:
    """Quantized weights by the order in which they are made.

    Args:
        model: as it is before the pass.
        context: its work folder and samples.
        settings: the pass and its options as text.
    """

    def __init__(self, model: ir.Model, context: Context, settings: str) -> None:
        self._folder = context.work_folder
        self._prefix = ""
        if self._folder is not None:
            self._make_folder(self._folder)
            self._prefix = fingerprint(model, context, settings)

    @staticmethod
    def _make_folder(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the work folder {folder} cannot be made: {error.strerror}") from error

    def find(self, name: str, scheme: WeightScheme) -> Finished | None:
        """Return the weight that was finished under `name`, or None if there is none, or a damaged one."""
        if self._folder is None:
            return None
        path = self._path(name)
        try:
            # Its checksums are looked at now: later there would be no way back.
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:
                    return None
            with np.load(path, allow_pickle=False) as arrays:
                facts = json.loads(str(arrays["facts"]))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        return Finished(lambda: _read(path, scheme), facts)

    def keep(self, name: str, weight: QuantizedWeight, facts: Mapping[str, Any]) -> Finished:
        """Keep a weight and what is to be told about it.

        Raises:
            UserError: the disk is full.
        """
        if self._folder is None:
            return Finished(lambda: weight, facts)
        path = self._path(name)
        unfinished = path.with_suffix(".unfinished")
        try:
            with unfinished.open("wb") as file:
                _write(file, weight, facts)
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            if error.errno == errno.ENOENT:
                raise _removed(self._folder) from error
            if not is_disk_full(error):
                raise
            raise UserError(
                f"the disk is full: {self._folder} has no room for another finished layer. Those that are done are "
                "kept: free some room and run again with --resume."
            ) from error
        scheme = weight.scheme  # the weight itself need not stay in memory
        return Finished(lambda: _read(path, scheme), facts)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        short = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        return self._folder / f"{self._prefix}-{short}.npz"


def _width(scheme: WeightScheme) -> int:
    return next(width for width in (2, 4, 8) if width >= scheme.bits)


def _write(file: BinaryIO, weight: QuantizedWeight, facts: Mapping[str, Any]) -> None:
    arrays = {"codes": pack_bits(weight.codes, _width(weight.scheme)), "scale": weight.scale}
    if weight.zero_point is not None:
        arrays["zero_point"] = weight.zero_point
    arrays |= {"inputs": np.array(weight.codes.shape[1]), "facts": np.array(json.dumps(facts))}
    np.savez(file, **arrays)  # type: ignore[arg-type]  # a keyword of its own might be meant


def _read(path: Path, scheme: WeightScheme) -> QuantizedWeight:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            codes = unpack_bits(arrays["codes"], _width(scheme), int(arrays["inputs"]))
            zero_point = arrays["zero_point"] if "zero_point" in arrays.files else None
            return QuantizedWeight(np.ascontiguousarray(codes), arrays["scale"], zero_point, scheme)
    except FileNotFoundError as error:
        raise _removed(path.parent) from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"the finished layer {path} cannot be read: {error}. Remove it and run again.") from error


def _removed(folder: Path) -> UserError:
    return UserError(
        f"what was kept in the work folder {folder} was removed during this run, perhaps by another one with the same "
        "output. Give each its own -o, and run this again."
    )


def fingerprint(model: ir.Model, context: Context, settings: str) -> str:
    """Return 32 hexadecimal digits that change with the nodes and weights of a model, the samples and `settings`."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    _add_model(digest, model, lambda tensor: _add(digest, tensor.numpy()))
    for feed in context.samples("a pass that resumes"):
        for name in sorted(feed):
            digest.update(name.encode())
            _add(digest, feed[name])
    return digest.hexdigest()


def likeness(model: ir.Model) -> str:
    """Return 32 hexadecimal digits that models of the same nodes, inputs and weights have in common in this process.

    A weight that lies in a file is known by its place there: nobody changes the file of a model that is being read.
    """
    digest = hashlib.blake2b(str(model.graph.opset_imports).encode(), digest_size=16)

    def add(tensor: ir.TensorProtocol) -> None:
        if isinstance(tensor, MappedTensor):
            digest.update(f"{tensor.path}\0{tensor.offset}\0{tensor.dtype}{tensor.shape}".encode())
        else:
            _add(digest, tensor.numpy())

    for value in (*model.graph.inputs, *model.graph.outputs):
        digest.update(f"{value.name}\0{value.type}\0{value.shape}".encode())
    _add_model(digest, model, add)
    return digest.hexdigest()


def _add_model(digest: hashlib.blake2b, model: ir.Model, add: Callable[[ir.TensorProtocol], None]) -> None:
    for node in qgraph.ir.walk(model):
        parts = [node.domain, node.op_type, *(value.name or "" if value is not None else "" for value in node.inputs)]
        parts += [value.name or "" for value in node.outputs]
        parts += [f"{name}={one.value}" for name, one in node.attributes.items() if _is_plain(one)]
        parts += [f"{name}={one}" for name, one in sorted(node.metadata_props.items())]
        digest.update("\0".join(parts).encode())
        for attribute in node.attributes.values():
            if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                add(attribute.as_tensor())
    for graph in qgraph.ir.all_graphs(model):
        for name, value in graph.initializers.items():
            digest.update(name.encode())
            if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING:
                add(value.const_value)
                qgraph.ir.forget_pages()


def _is_plain(attribute: ir.Attr) -> bool:
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return not attribute.is_ref() and attribute.type not in (*graphs, ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)


def _add(digest: hashlib.blake2b, array: np.ndarray) -> None:
    digest.update(f"{array.dtype}{array.shape}".encode())
    if array.dtype == np.object_:
        array = array.astype(np.str_)  # texts
    digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
