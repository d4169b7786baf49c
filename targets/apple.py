"""Apple devices: a Core ML package, and an ONNX model for ONNX Runtime's CoreML provider.

    model.mlpackage    an ML Program of iOS 18, macOS 15: float16 but for what overflows, weights as they were quantized
    model.onnx         with `onnx`: the same model for the CoreML provider, which has no compressed weights

Shapes are static: accelerators want them, and so does the provider. `apple-int8` stores the weights of convolutions,
linear layers and embeddings in 8 bits by channel, `apple-int4` those of linear layers and embeddings in 4 bits by
group; both are read by the package's own constants, and computed with in float16. Off macOS the package is run by an
interpreter in numpy that reads the bytes that were written, and the artifact says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.coreml.lowering import lower, unlowered
from qgraph.coreml.package import write_package
from qgraph.coreml.placement import package_placement
from qgraph.coreml.plain import without_compression
from qgraph.coreml.session import PackageSession, on_device
from qgraph.coreml.structure import examine
from qgraph.coreml.toolkit import toolkit
from qgraph.errors import UserError
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.runtime.placement import Placement
from qgraph.targets.base import Kernels, Session, Target, cleaned_up, float64_edges, repeated_outputs
from qgraph.targets.cpu_int4 import weight_passes

__all__ = ["AppleFp16", "AppleInt4", "AppleInt8"]

PACKAGE = "model.mlpackage"
_LOWER = "to-fp16,merge-duplicates,remove-unused,infer-shapes"
_CONVOLUTIONS = "rtn{bits=8,group=0,symmetric=true,embeddings=false,ops=[Conv,ConvTranspose]}"
_LARGEST_FILE = (1 << 31) - (1 << 20)
_COMPUTE = ("conv", "conv_transpose", "gru", "linear", "lstm", "matmul", "rnn")


class _CoreMl(Target):
    """What the precisions have in common."""

    extra: ClassVar[str] = "apple"
    onnx: bool

    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes, which keep every value."""
        return cleaned_up()

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in float16."""
        passes = f"coreml-operators,{_LOWER},coreml-partitions" if self.onnx else _LOWER
        return Pipeline.parse(f"infer-shapes,{passes}")

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return the nodes that have no form in an ML Program.

        Raises:
            UserError: a shape is not fixed.
        """
        _refuse_dynamic(model, self.name)
        return repeated_outputs(model) or float64_edges(model, "Core ML") or unlowered(model)

    def lower(self, model: ir.Model, folder: Path) -> list[str]:
        """Write the package and, where it is wanted, model.onnx.

        Raises:
            UserError: coremltools is not installed, or a node has no form in an ML Program.
        """
        write_package(lower(model), folder / PACKAGE)
        faults = examine(folder / PACKAGE).faults
        if faults:
            raise RuntimeError(f"the package is not well formed: {faults[0]}")
        if self.onnx:
            # The provider refuses nodes whose weights stand in a file of their own.
            qgraph.ir.save(without_compression(model), folder / "model.onnx", external_above=_LARGEST_FILE)
        return sorted(path.name for path in folder.iterdir())

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open the package: in Core ML on a Mac, elsewhere in the interpreter.

        Raises:
            UserError: the package is damaged, or coremltools is missing on a Mac.
        """
        del threads
        session: Session = PackageSession(folder / PACKAGE)
        return session

    def stand_in(self) -> str:
        """Return what runs the package off macOS."""
        return "" if on_device() else "an interpreter of the package in numpy (same operations; not run on a device)"

    def placement(self, folder: Path) -> Placement:
        """Return what the operations of the package compute, and what the provider would leave of model.onnx.

        Raises:
            UserError: the package is damaged.
        """
        model = folder / "model.onnx"
        return package_placement(folder / PACKAGE, qgraph.ir.load(model) if model.is_file() else None)

    def kernels(self, folder: Path) -> Kernels:
        """Count the operations of the package: those with compressed weights, other products, and the rest."""
        structure = examine(folder / PACKAGE)
        low_bit = dict(structure.reads_compressed)
        run = {kind: count for kind, count in structure.operations.items() if not kind.startswith("constexpr_")}
        left = {kind: count - low_bit.get(kind, 0) for kind, count in run.items()}
        return Kernels(
            integer={},
            floating={kind: left[kind] for kind in _COMPUTE if left.get(kind)},
            other={kind: count for kind, count in left.items() if count and kind not in _COMPUTE},
            low_bit=low_bit,
        )

    def footprint(self, folder: Path) -> Mapping[str, Any] | None:
        """Return how the weights are stored."""
        weights = examine(folder / PACKAGE).weights
        return {"weights": {form: dataclasses.asdict(one) for form, one in weights.items()}}


@dataclasses.dataclass(frozen=True)
class AppleFp16(_CoreMl):
    """Float16 on Apple devices."""

    name: ClassVar[str] = "apple-fp16"
    summary: ClassVar[str] = "float16 in Core ML on Apple devices, and in ONNX Runtime's CoreML provider"
    onnx: bool = dataclasses.field(default=True, metadata={"help": "write model.onnx for ONNX Runtime's provider too"})

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return nothing: float16 comes with lowering."""
        del model, context
        toolkit()
        return Pipeline([])


@dataclasses.dataclass(frozen=True)
class AppleInt8(_CoreMl):
    """Weights of 8 bits on Apple devices."""

    name: ClassVar[str] = "apple-int8"
    summary: ClassVar[str] = "weights of 8 bits by channel and float16 in Core ML on Apple devices"
    onnx: bool = dataclasses.field(default=False, metadata={"help": "write model.onnx, with weights in float16"})

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return rounding to nearest, with scales of least squared error."""
        del context
        toolkit()
        _refuse_dynamic(model, self.name)
        return Pipeline.parse("rtn{bits=8,group=0,symmetric=true,ops=[Conv,ConvTranspose,Gemm,MatMul]}")


@dataclasses.dataclass(frozen=True)
class AppleInt4(_CoreMl):
    """Weights of 4 bits on Apple devices."""

    name: ClassVar[str] = "apple-int4"
    summary: ClassVar[str] = "weights of 4 bits by group (convolutions: 8) and float16 in Core ML on Apple devices"
    onnx: bool = dataclasses.field(default=False, metadata={"help": "write model.onnx, with weights in float16"})

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return AWQ and GPTQ where there are calibration data, else rounding to nearest; convolutions in 8 bits."""
        toolkit()
        _refuse_dynamic(model, self.name)
        return Pipeline([*weight_passes(context), *Pipeline.parse(_CONVOLUTIONS)])


def _refuse_dynamic(model: ir.Model, target: str) -> None:
    """Raise before any work is done what Core ML would refuse in the end."""
    found = [
        value
        for value in model.graph.inputs
        if value.const_value is None and (value.shape is None or not value.shape.is_static())
    ]
    if not found:
        _refuse_empty(model, target)
        return
    texts = []
    for value in found:
        sizes = ",".join(str(size) if isinstance(size, int) else "1" for size in value.shape or ())
        texts.append(f"--shape {value.name}={sizes}")
    names = ", ".join(f"'{value.name}'" for value in found)
    raise UserError(
        f"{target} needs every size, and the shape of {names} is dynamic: fix it, for instance with {' '.join(texts)}"
    )


def _refuse_empty(model: ir.Model, target: str) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and 0 in value.shape.dims:
            shape = "x".join(map(str, value.shape))
            raise UserError(
                f"{target} cannot run this model: '{value.name}' is {shape}, and Core ML has no empty arrays"
            )
