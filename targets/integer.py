"""Integer arithmetic only, for microcontrollers, NPUs and FPGAs, with semantics that any implementation can be held to.

    model.onnx    standard ONNX; between QuantizeLinear at the inputs and DequantizeLinear at the outputs nothing is
                  floating point; `qgraph.Requantize` and its like are model-local functions of integer operators
    c/            with --emit c: C99 without floating point, an example and a Makefile
    tvm/          with --emit so: a library compiled by TVM, without floating-point instructions

Everything is quantized (`full-qdq`: 8 bits, 16 where 8 would hurt) and then written in integers (`integer-requantize`).
`check` proves from the types of the tensors that nothing else is floating point; what has no integer form is a
boundary, named with its reason in report and manifest, and with --strict an error.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.integer_functions import DOMAIN
from qgraph.analysis.integer_units import computes_floats
from qgraph.codegen.c_source import emit_c
from qgraph.codegen.flat_gathers import flatten_gathers
from qgraph.codegen.tvm_disassembly import can_disassemble, float_instructions
from qgraph.codegen.tvm_library import LIBRARY, emit_so
from qgraph.codegen.tvm_lowering import require_tvm
from qgraph.errors import UserError
from qgraph.passes.integer_requantize import BOUNDARY_KEY
from qgraph.pipeline import Context, Pipeline, Skipped
from qgraph.runtime.placement import Placement
from qgraph.runtime.session import CPU_PROVIDER, open_session
from qgraph.targets.base import Kernels, Session, Step, Target, cleaned_up
from qgraph.targets.integer_placement import functions_in_c, nodes_in_onnx

__all__ = ["Integer", "code_form"]

FOOTPRINT = "footprint.json"
_FORMS = {"c": "c", "so": "tvm"}

_PLAINER = (
    "infer-shapes,unroll-recurrent,conv-transpose-to-conv,resize-to-matmul,einsum-to-matmul,grid-sample-to-gather,"
    "decompose-norms,decompose-operators,fold-constants,infer-shapes,root-magnitudes,remove-unused"
)
_LADDER = (
    Step("activation ranges", ("full-qdq.method=percentile", "full-qdq.method=mse"), "activations"),
    Step("equalization", ("equalize < full-qdq",)),
    Step("more of 16 bits", ("full-qdq.sqnr=40", "full-qdq.sqnr=60"), "activations"),
    Step("bias correction", ("bias-correction{method=fast} > full-qdq",)),
    Step(
        "learned rounding",
        ("gptq{bits=8,group=0,symmetric=true,min_elements=0,ops=[Conv,Gemm,MatMul]} < full-qdq",),
        "weights",
    ),
)
"""What a search tries, the cheapest first."""


@dataclasses.dataclass(frozen=True)
class Integer(Target):
    """A graph of integer operators."""

    name: ClassVar[str] = "integer"
    summary: ClassVar[str] = "integer arithmetic only, exact to the bit: standard ONNX, and C or a TVM library from it"
    needs_calibration: ClassVar[bool] = True
    emit: tuple[str, ...] = dataclasses.field(default=(), metadata={"help": "code to write beside the model: c, so"})

    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes, and those that write operators as others with an integer form."""
        return cleaned_up(_PLAINER)

    def compress_passes(self, model: ir.Model, context: Context) -> Pipeline:
        """Return the quantization of everything."""
        del context
        if self.emit:
            _refuse_dynamic(model, self.emit)
        return Pipeline.parse("full-qdq")

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in integers."""
        return Pipeline.parse("integer-requantize,merge-duplicates,remove-unused")

    def ladder(self, compress: Pipeline) -> Sequence[Step]:
        """Return what brings integers nearer to float: other ranges, more 16-bit tensors, passes before and behind."""
        return _LADDER if any(one.name == "full-qdq" for one in compress) else ()

    def check(self, model: ir.Model) -> list[Skipped]:
        """Return the nodes that compute in float, or may do so for all that is known, and are no marked boundary.

        Raises:
            UserError: there are such nodes, and inputs whose sizes are open, from which that may follow.
        """
        found = []
        for node in qgraph.ir.walk(model):
            reason = _floating(node, model)
            if reason is not None and not _is_edge(node) and BOUNDARY_KEY not in node.metadata_props:
                found.append(Skipped(qgraph.ir.node_label(node), reason))
        if found:
            _refuse_open(model, found)
        return found

    @property
    def emits(self) -> tuple[str, ...]:
        """The forms of code that it writes."""
        return self.emit

    def emitting(self, forms: Sequence[str]) -> Integer:
        """Return the target that writes C sources (c), a library compiled by TVM (so), or both.

        Raises:
            UserError: it writes nothing in such a form, or TVM is needed and not installed.
        """
        wanted = tuple(dict.fromkeys(one for form in forms for one in form.split(",")))
        for form in wanted:
            if form not in _FORMS:
                raise UserError(f"--emit {form}: the target integer writes {' and '.join(_FORMS)}")
        if "so" in wanted:
            require_tvm()
        return dataclasses.replace(self, emit=wanted)

    def lower(self, model: ir.Model, folder: Path) -> list[str]:
        """Write model.onnx, and the code that was asked for into folders of its own.

        Raises:
            UserError: the model has no code: its shapes are dynamic, or something stays in float.
        """
        if self.emit:
            _refuse_boundaries(model, self.emit)
        files = super().lower(model, folder)
        if not self.emit:
            return files
        static = code_form(model)
        for form in self.emit:
            inner = folder / _FORMS[form]
            inner.mkdir()
            needs = _write_c(static, inner) if form == "c" else _write_library(static, inner)
            files += sorted(f"{inner.name}/{path.name}" for path in inner.iterdir())
            (inner / FOOTPRINT).write_text(json.dumps(needs, indent=2) + "\n", encoding="utf-8")
        return files

    def footprint(self, folder: Path) -> Mapping[str, Any] | None:
        """Return flash and RAM of the C code, and what was found in the library's instructions."""
        found: dict[str, Any] = {}
        for inner in _FORMS.values():
            path = folder / inner / FOOTPRINT
            if path.is_file():
                found.update(json.loads(path.read_text(encoding="utf-8")))
        return found or None

    def providers(self) -> Sequence[tuple[str, Mapping[str, str]]]:
        """Return the CPU provider, which computes the same integers as what the graph is meant for."""
        return [(CPU_PROVIDER, {})]

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open model.onnx in ONNX Runtime, which executes the functions by their bodies.

        Raises:
            UserError: it is not installed.
        """
        session: Session = open_session(folder / "model.onnx", threads=threads)
        return session

    def stand_in(self) -> str:
        """Return a note: what is meant to run this is not a processor with a runtime."""
        return "ONNX Runtime, which computes the same integers; not timed"

    def placement(self, folder: Path) -> Placement:
        """Return the functions of the C code, where it was emitted, else the nodes of the graph."""
        model = qgraph.ir.load(folder / "model.onnx")
        if (folder / _FORMS["c"]).is_dir():
            return functions_in_c(code_form(model))
        return nodes_in_onnx(model, library=(folder / _FORMS["so"]).is_dir())

    def kernels(self, folder: Path) -> Kernels:
        """Count the nodes of the integer graph, functions as one node each, and the boundaries."""
        placed = nodes_in_onnx(qgraph.ir.load(folder / "model.onnx"), library=False).nodes
        return Kernels.of(Placement(placed), {node.name: node.remark for node in placed if node.remark})


def code_form(model: ir.Model) -> ir.Model:
    """Return a copy of an integer graph as code needs it: shapes folded, gathers with constant strides flat."""
    static = model.clone()
    Pipeline.parse("infer-shapes,fold-constants,infer-shapes").run(static)
    flatten_gathers(static)
    Pipeline.parse("infer-shapes,remove-unused").run(static)
    return static


def _refuse_dynamic(model: ir.Model, forms: Sequence[str]) -> None:
    """Raise before any work is done what the code would refuse in the end."""
    for value in model.graph.inputs:
        if value.shape is None or not value.shape.is_static():
            dims = [] if value.shape is None else list(value.shape)
            example = ",".join(str(size) if isinstance(size, int) else "1" for size in dims)
            raise UserError(
                f"--emit {forms[0]}: input '{value.name}' has the shape {[str(size) for size in dims]}, and code needs "
                f"every size: fix it, for instance with --shape {value.name}={example}"
            )


def _refuse_open(model: ir.Model, found: Sequence[Skipped]) -> None:
    """Raise where sizes are open: with these unknown, branches and shapes stay in the graph, and so do their types."""
    inputs = [value for value in model.graph.inputs if value.shape is not None and not value.shape.is_static()]
    if not inputs:
        return
    names = ", ".join(f"'{value.name}'" for value in inputs)
    flags, letters = [], []
    for value in inputs:
        dims = [_letters(size) for size in value.shape or ()]
        letters += [one for one in dims if not one.isdecimal()]
        flags.append(f"--shape {value.name}={','.join(dims)}")
    node, reason = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise UserError(
        f"integer cannot run this model while sizes of {names} are open: '{node}'{more}: {reason}. Fix them with "
        f"{' '.join(flags)}, with numbers for {', '.join(dict.fromkeys(letters))}"
    )


def _letters(size: int | ir.SymbolicDim) -> str:
    return str(size) if isinstance(size, int) else (size.value or "N").upper()


def _refuse_boundaries(model: ir.Model, forms: Sequence[str]) -> None:
    fast = next((node for node in qgraph.ir.walk(model) if node.op_type.startswith(("QLinear", "QGemm"))), None)
    if fast is not None:
        raise UserError(
            f"--emit {forms[0]}: '{qgraph.ir.node_label(fast)}' is an operator of ONNX Runtime, which has no code: "
            "leave integer-requantize at form=exact"
        )
    told = [node for node in qgraph.ir.walk(model) if BOUNDARY_KEY in node.metadata_props]
    if told:
        more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
        raise UserError(
            f"--emit {forms[0]}: code computes in integers only, and '{qgraph.ir.node_label(told[0])}'{more} stays in "
            f"float: {told[0].metadata_props[BOUNDARY_KEY]}. Without --emit it runs as an ONNX model"
        )


def _write_c(model: ir.Model, folder: Path) -> dict[str, Any]:
    needs = emit_c(model, folder)
    return {"flash": needs.flash, "ram": needs.ram, "kernels": needs.kernels}


def _write_library(model: ir.Model, folder: Path) -> dict[str, Any]:
    emit_so(model, folder)
    if not can_disassemble():
        return {"library": "its instructions were not looked at: no objdump here"}
    found = float_instructions(folder / LIBRARY)
    if found:
        raise RuntimeError(f"{found[0].function} computes in float ({found[0].mnemonic})")
    return {"library": "no floating-point instruction"}


def _floating(node: ir.Node, model: ir.Model) -> str | None:
    """Return why a node cannot be taken for integer, or None."""
    if node.op_identifier() in model.functions and node.domain != DOMAIN:
        return f"it calls {node.domain}.{node.op_type}, which may compute in float: put inline-functions before"
    if computes_floats(node):
        return "it computes in float, and is no boundary that was told"
    values = (value for value in (*node.inputs, *node.outputs) if value is not None and value.name)
    unknown = next((value for value in values if value.dtype is None), None)
    return None if unknown is None else f"the type of '{unknown.name}' is not known"


def _is_edge(node: ir.Node) -> bool:
    """Tell whether a node leads from float to integers or back."""
    return qgraph.ir.is_op(node, "QuantizeLinear", "DequantizeLinear")
