"""Small graphs for the C generator, and their code as functions on arrays."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis.shapes import Shapes
from qgraph.codegen.c_graph import IntegerGraph
from qgraph.codegen.c_source import emit_c

GCC = shutil.which("gcc")
FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Werror")
needs_gcc = pytest.mark.skipif(GCC is None, reason="gcc is not installed")

Feeds = Mapping[str, np.ndarray]


class Graph:
    """A graph built node by node; arrays that are given to nodes become initializers."""

    def __init__(self, **feeds: np.ndarray) -> None:
        self.feeds = feeds
        self.inputs = {
            name: ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
            )
            for name, array in feeds.items()
        }
        self.model = ir.Model(
            ir.Graph(list(self.inputs.values()), [], nodes=[], opset_imports={"": 21, "qgraph": 1}, name="g"),
            ir_version=10,
        )

    def op(
        self,
        op_type: str,
        *inputs: str | ir.Value | np.ndarray | None,
        domain: str = "",
        count: int = 1,
        **attributes: object,
    ) -> ir.Value:
        node = ir.node(op_type, [self._value(one) for one in inputs], attributes, domain=domain, num_outputs=count)
        for output in node.outputs:
            output.name = qgraph.ir.fresh_name(self.model.graph, op_type.lower())
        self.model.graph.append(node)
        return node.outputs[0]

    def _value(self, one: str | ir.Value | np.ndarray | None) -> ir.Value | None:
        if isinstance(one, str):
            return self.inputs[one]
        return qgraph.ir.initializer(self.model.graph, "c", one) if isinstance(one, np.ndarray | np.generic) else one

    def gives(self, *outputs: ir.Value) -> Graph:
        shapes = Shapes(self.model).run()
        for value in outputs:
            value.type = ir.TensorType(shapes.dtype(value))
            value.shape = ir.Shape(shapes.dims(value))
        self.model.graph.outputs.extend(outputs)
        return self


def run_onnx(model: ir.Model, feeds: Feeds) -> list[np.ndarray]:
    """Return what ONNX Runtime gives, without its optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(feeds))


class Library:
    """Models compiled into one shared library."""

    def __init__(self, models: Mapping[str, ir.Model], folder: Path, flags: Sequence[str] = FLAGS) -> None:
        self._graphs = {name: IntegerGraph(model) for name, model in models.items()}
        sources = []
        for name, model in models.items():
            (folder / name).mkdir()
            emit_c(model, folder / name, name)
            sources.append(str(folder / name / f"{name}.c"))
        assert GCC is not None
        command = [GCC, *flags, "-shared", "-fPIC", "-o", str(folder / "models.so"), *sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:3000]
        self._library = ctypes.CDLL(str(folder / "models.so"))

    def run(self, name: str, feeds: Feeds) -> list[np.ndarray]:
        graph = self._graphs[name]
        reads = [np.ascontiguousarray(feeds[port.source]) for port in graph.inputs]
        for array, port in zip(reads, graph.inputs, strict=True):
            assert (array.dtype, array.shape) == (port.dtype, port.shape)
        # Filled, so that an element that is not written shows.
        writes = [np.full(port.shape, 85, port.dtype) for port in graph.outputs]
        getattr(self._library, f"{name}_run")(*(array.ctypes.data_as(ctypes.c_void_p) for array in [*reads, *writes]))
        return writes


def sanitizers(folder: Path) -> bool:
    """Tell whether gcc can check addresses and arithmetic."""
    (folder / "probe.c").write_text("int main(void) { return 0; }", encoding="utf-8")
    command = [str(GCC), "-fsanitize=address,undefined", "-o", "probe", "probe.c"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


def run_checked(models: Mapping[str, tuple[ir.Model, Feeds]], folder: Path) -> dict[str, list[np.ndarray]]:
    """Run models in a process of their own that stops where memory or arithmetic goes wrong; return their outputs."""
    calls, sources, ports = [], [], []
    for name, (model, feeds) in models.items():
        (folder / name).mkdir()
        emit_c(model, folder / name, name)
        sources.append(f"{name}/{name}.c")
        graph = IntegerGraph(model)
        (folder / name / "in").write_bytes(b"".join(feeds[port.source].tobytes() for port in graph.inputs))
        # On the heap, where the sanitizer sees what is read and written beside each.
        names = [f"memory(reading, {port.nbytes})" for port in graph.inputs]
        calls.append(
            _CALL.format(
                name=name,
                reads="".join(f"p[{i}] = {text}; " for i, text in enumerate(names)),
                writes="".join(
                    f"p[{len(names) + i}] = memory(NULL, {port.nbytes}); " for i, port in enumerate(graph.outputs)
                ),
                arguments=", ".join(f"p[{i}]" for i in range(len(names) + len(graph.outputs))),
                saves="".join(
                    f"fwrite(p[{len(names) + i}], 1, {port.nbytes}, writing); " for i, port in enumerate(graph.outputs)
                ),
            )
        )
        ports.append((name, graph.outputs))
    headers = "".join(f'#include "{name}/{name}.h"\n' for name in models)
    (folder / "all.c").write_text(headers + _MAIN.format(calls="".join(calls)), encoding="utf-8")
    assert GCC is not None
    command = [
        GCC,
        "-std=c99",
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-o",
        "all",
        "all.c",
    ]
    run = {"cwd": folder, "capture_output": True, "text": True, "check": False}
    built = subprocess.run([*command, *sources], **run)
    assert built.returncode == 0, built.stderr[:3000]
    done = subprocess.run(["./all"], env={"ASAN_OPTIONS": "detect_leaks=0"}, **run)
    assert done.returncode == 0, done.stderr[:3000]
    found = {}
    for name, outputs in ports:
        data, at = (folder / name / "out").read_bytes(), 0
        found[name] = []
        for port in outputs:
            found[name].append(np.frombuffer(data[at : at + port.nbytes], port.dtype).reshape(port.shape))
            at += port.nbytes
    return found


_CALL = """    {{
        FILE *reading = fopen("{name}/in", "rb"), *writing = fopen("{name}/out", "wb");
        void *p[16];
        {reads}{writes}
        {name}_run({arguments});
        {saves}
        fclose(reading);
        fclose(writing);
    }}
"""
_MAIN = """#include <stdio.h>
#include <stdlib.h>
static void *memory(FILE *file, size_t size)
{{
    void *data = malloc(size);
    return file == NULL || fread(data, 1, size, file) == size ? data : NULL;
}}
int main(void)
{{
{calls}    return 0;
}}
"""
