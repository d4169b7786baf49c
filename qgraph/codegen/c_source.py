"""An integer graph as C99 source: no floating point, no heap, no library but `string.h`.

    NAME.c, NAME.h      the model: void NAME_run(const uint8_t *input0, ..., uint8_t *output0, ...)
    NAME_weights.h      its constants
    main.c, Makefile    an example that runs it on a file

Any compiler of C99 gives the same bits: no number overflows, no negative one is shifted. One liberty is taken: tensors
of different types take turns in the same memory, for which the Makefile sets -fno-strict-aliasing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qgraph.codegen.c_files import example_text, header_text, makefile_text
from qgraph.codegen.c_fusion import producer_of
from qgraph.codegen.c_graph import IntegerGraph, Port
from qgraph.codegen.c_program import Program
from qgraph.errors import UserError

__all__ = ["Footprint", "c_functions", "emit_c"]


@dataclass(frozen=True)
class Footprint:
    """What the generated code needs.

    Attributes:
        flash: bytes of constants; the instructions come on top.
        ram: bytes of the arena: what lies between inputs and outputs, with the scratch memory of kernels.
        inputs: what the function reads, in order.
        outputs: what it writes.
        kernels: number of functions that it calls.
    """

    flash: int
    ram: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    kernels: int


def emit_c(model: ir.Model, folder: Path, name: str = "model") -> Footprint:
    """Write an integer graph as C source into `folder`.

    Args:
        model: of standard integer operators and functions of domain "qgraph", with constants folded. Float tensors
            only as inputs that QuantizeLinear reads, and as outputs that DequantizeLinear makes.
        folder: gets NAME.c, NAME.h, NAME_weights.h, main.c and Makefile; must exist.
        name: a C identifier.

    Returns:
        Bytes needed, and the tensors at the edges.

    Raises:
        UserError: a shape is dynamic, an operator has no integer code or computes in float, or the name is no
            identifier.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UserError(f"'{name}' is no name for C code: use letters, digits and underscores")
    program = Program(IntegerGraph(model), name)
    files = {
        f"{name}.c": program.source_text(),
        f"{name}_weights.h": program.weights_text(),
        f"{name}.h": header_text(program),
        "main.c": example_text(program),
        "Makefile": makefile_text(program),
    }
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    inputs, outputs = tuple(program.graph.inputs), tuple(program.graph.outputs)
    return Footprint(program.constants.nbytes, program.arena, inputs, outputs, len(program.kernels))


def c_functions(model: ir.Model) -> list[tuple[str, list[ir.Node]]]:
    """Return the functions that the C source has for a graph, in the order in which they run, with their nodes.

    The last node of each is the one whose operator writes the loops.

    Args:
        model: as for `emit_c`.

    Raises:
        UserError: as `emit_c` does.
    """
    found = []
    for kernel in Program(IntegerGraph(model), "model").kernels:
        fused = kernel.fused
        driver = producer_of(fused.driver or fused.output)
        nodes = {producer_of(value): None for value in (*fused.inlined, fused.output)}
        found.append((kernel.name, [*(node for node in nodes if node is not driver), driver]))
    return found
