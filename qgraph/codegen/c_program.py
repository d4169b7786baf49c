"""The whole program of a graph: its kernels, where their tensors lie, and the function that calls them in order."""

from __future__ import annotations

import importlib
import math

import onnx_ir as ir

from qgraph.codegen import arena, c_text
from qgraph.codegen.c_constants import Constants
from qgraph.codegen.c_fusion import Fused, fuse, producer_of, view_source
from qgraph.codegen.c_graph import IntegerGraph, Port
from qgraph.codegen.c_kernel import Kernel
from qgraph.codegen.c_rules import Kind, rule_of
from qgraph.codegen.c_runtime import FUNCTIONS, runtime_text

__all__ = ["Program"]

for _module in ("c_convolutions", "c_elementwise", "c_gather", "c_matrices", "c_movement", "c_reductions",
                "c_scatter"):  # fmt: skip
    importlib.import_module(f"qgraph.codegen.{_module}")  # for the operators that it registers


_ARENA = """\
/* Tensors of different types take turns here: compile with -fno-strict-aliasing. */
static int64_t arena[{count}];

"""


class Program:
    """The C text of a graph.

    Attributes:
        graph: what it is of.
        name: of the program: a C identifier.
        constants: its constant arrays.
        kernels: in the order in which they run.
        arena: the bytes of memory that it needs for what it computes.
    """

    def __init__(self, graph: IntegerGraph, name: str) -> None:
        self.graph = graph
        self.name = name
        self._names = c_text.Names([name, f"{name}_run", *FUNCTIONS, *c_text.C_TYPES.values()])
        self.inputs = [self._names.unique(f"input{number}") for number in range(len(graph.inputs))]
        self.outputs = [self._names.unique(f"output{number}") for number in range(len(graph.outputs))]
        self.constants = Constants(self._names)
        self.kernels = [self._kernel(fused) for fused in fuse(graph)]
        self._in_place = self._reuse()
        self._places = self._edges()
        buffers = self._buffers()
        planned = arena.plan(buffers)
        self.arena = planned.size
        self._offsets = planned.offsets

    def _kernel(self, fused: Fused) -> Kernel:
        scalars = [value for value in fused.inlined if rule_of(self.graph, producer_of(value)).kind is Kind.SCALAR]
        operator = producer_of(fused.driver or next(iter(scalars), fused.output)).op_type
        words = "".join(f"_{letter}" if letter.isupper() else letter for letter in operator)
        kernel = Kernel(self.graph, fused, self._names.unique(f"{c_text.identifier(words)}_0"), self.constants)
        kernel.write()
        return kernel

    # --- memory ------------------------------------------------------------------------------------------------------

    def _edges(self) -> dict[ir.Value, str]:
        """Return the tensors that lie in memory of the caller."""
        places = dict(zip((port.value for port in self.graph.inputs), self.inputs, strict=True))
        for port, name in zip(self.graph.outputs, self.outputs, strict=True):
            source = view_source(self.graph, port.value)
            if self.graph.constant(source) is None:
                places.setdefault(source, name)
        return places

    def _last_reads(self) -> dict[ir.Value, int]:
        last = {kernel.fused.output: step for step, kernel in enumerate(self.kernels)}
        for step, kernel in enumerate(self.kernels):
            last.update(dict.fromkeys(kernel.reads, step))
        for port in self.graph.outputs:
            source = view_source(self.graph, port.value)
            if source in last:
                last[source] = len(self.kernels)
        return last

    def _reuse(self) -> dict[ir.Value, ir.Value]:
        """Return the outputs that take the place of an input which nobody reads afterwards."""
        last, edges = self._last_reads(), set(self._edges())
        found: dict[ir.Value, ir.Value] = {}
        for step, kernel in enumerate(self.kernels):
            output = kernel.fused.output
            if not kernel.in_step or output in edges:
                continue
            width = self.graph.dtype(output).itemsize
            for parameter in kernel.reads.values():
                value = parameter.value
                same = parameter.in_step and self.graph.dtype(value).itemsize == width
                if same and last[value] == step and value not in edges:
                    found[output] = value
                    break
        return found

    def _owner(self, value: ir.Value) -> ir.Value:
        while value in self._in_place:
            value = self._in_place[value]
        return value

    def _buffers(self) -> list[arena.Buffer]:
        last = self._last_reads()
        spans: dict[ir.Value, list[int]] = {}
        for step, kernel in enumerate(self.kernels):
            output = kernel.fused.output
            if output not in self._places:
                span = spans.setdefault(self._owner(output), [step, step])
                span[1] = max(span[1], last[output])
        buffers = [
            arena.Buffer(value, self.graph.size(value) * self.graph.dtype(value).itemsize, *span)
            for value, span in spans.items()
        ]
        for step, kernel in enumerate(self.kernels):
            for name, (dtype, size) in kernel.scratch.items():
                buffers.append(arena.Buffer((kernel.name, name), size * dtype.itemsize, step, step))
        return buffers

    # --- text --------------------------------------------------------------------------------------------------------

    def source_text(self) -> str:
        """Return the program but for its constants."""
        helpers = {name for kernel in self.kernels for name in kernel.helpers}
        parts = [
            f'#include "{self.name}.h"\n\n#include <string.h>\n\n#include "{self.name}_weights.h"\n',
            runtime_text(helpers),
            *(self._function(kernel) for kernel in self.kernels),
            self._run(),
        ]
        return "\n".join(part for part in parts if part)

    def weights_text(self) -> str:
        """Return the constants."""
        guard = f"{self.name.upper()}_WEIGHTS_H"
        arrays = [c_text.array_text(name, array) for name, array in self.constants.arrays.items()]
        return "\n".join([f"#ifndef {guard}\n#define {guard}\n\n#include <stdint.h>\n", *arrays, "#endif\n"])

    def _function(self, kernel: Kernel) -> str:
        output = kernel.fused.output
        in_place = self._in_place.get(output)
        restrict = "restrict " if in_place is None else ""
        reads = [f"const {self._type(p.value)} *{restrict}{p.name}" for p in kernel.reads.values()]
        scratch = [f"{c_text.C_TYPES[dtype]} *restrict {name}" for name, (dtype, _) in kernel.scratch.items()]
        parameters = ", ".join([*reads, f"{self._type(output)} *{restrict}y", *scratch])
        body = "\n".join(kernel.lines)
        return f"/* {c_text.comment(kernel.title)} */\nstatic void {kernel.name}({parameters})\n{{\n{body}\n}}\n"

    def _type(self, value: ir.Value) -> str:
        return c_text.C_TYPES[self.graph.dtype(value)]

    def _pointer(self, value: ir.Value) -> str:
        """Return the place of a tensor in memory."""
        source = view_source(self.graph, value)
        if source in self._places:
            return self._places[source]
        return f"({self._type(source)} *)(memory + {self._offsets[self._owner(source)]})"

    def _call(self, kernel: Kernel) -> str:
        scratch = [
            f"({c_text.C_TYPES[dtype]} *)(memory + {self._offsets[kernel.name, name]})"
            for name, (dtype, _) in kernel.scratch.items()
        ]
        reads = [self._pointer(parameter.value) for parameter in kernel.reads.values()]
        return f"    {kernel.name}({', '.join([*reads, self._pointer(kernel.fused.output), *scratch])});"

    def signature(self) -> str:
        """Return the head of the function that runs the program."""
        reads = [
            f"const {c_text.C_TYPES[port.dtype]} *{name}"
            for port, name in zip(self.graph.inputs, self.inputs, strict=True)
        ]
        writes = [
            f"{c_text.C_TYPES[port.dtype]} *{name}" for port, name in zip(self.graph.outputs, self.outputs, strict=True)
        ]
        return f"void {self.name}_run({', '.join([*reads, *writes]) or 'void'})"

    def _run(self) -> str:
        lines = [self.signature(), "{"]
        if self.arena:
            # Compilers must not see through to the array: GCC 12 then reckons with twice its address and drops stores.
            lines += ["    uint8_t *volatile start = (uint8_t *)arena;", "    uint8_t *const memory = start;"]
        used = {value for kernel in self.kernels for value in kernel.reads}
        used |= {view_source(self.graph, port.value) for port in self.graph.outputs}
        pairs = zip(self.graph.inputs, self.inputs, strict=True)
        lines += [f"    (void){name};" for port, name in pairs if port.value not in used]
        lines += [self._call(kernel) for kernel in self.kernels]
        for port, name in zip(self.graph.outputs, self.outputs, strict=True):
            lines += self._copy(port, name)
        lines.append("}")
        return _ARENA.format(count=math.ceil(self.arena / 8)) * (self.arena > 0) + "\n".join(lines) + "\n"

    def _copy(self, port: Port, name: str) -> list[str]:
        """Return what fills an output that no kernel writes: an input, a constant, or another output again."""
        array = self.graph.constant(port.value)
        if array is not None:
            return [f"    memcpy({name}, {self.constants.name(name, array, array.dtype)}, {port.nbytes});"]
        source = self._pointer(port.value)
        return [] if source == name else [f"    memcpy({name}, {source}, {port.nbytes});"]
