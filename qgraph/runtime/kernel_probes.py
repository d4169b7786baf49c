"""One-node models of every operator that the installed ONNX Runtime knows, with every type: what has a kernel?

A probe differs from another of its operator in the type that one type parameter stands for; the others stand for types
of which the table has a kernel. Operators that need more than inputs of the right types have a recipe; those without
one that the runtime takes are counted as not built. Nothing is known of what only shapes or values decide.
"""

from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import onnx_ir as ir

from qgraph.analysis.kernel_support import unsupported
from qgraph.capabilities import DEFAULT_DOMAINS, Table, operator_name
from qgraph.runtime.kernel_registry import runtime_schemas, type_word

__all__ = ["Outcome", "Probe", "outcomes", "probe_model", "probes"]

_OLDEST = 7
"""Opsets before that are converted by every target."""
_CONTRIB = "com.microsoft"
_IR_VERSION = 13
_TYPES = {dtype.name.lower(): dtype for dtype in ir.DataType} | {
    "float32": ir.DataType.FLOAT,
    "float64": ir.DataType.DOUBLE,
}

State = Literal["ran", "loaded", "none", "not built"]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A model with one node.

    Attributes:
        name: of the operator, as tables call it.
        opset: of the default domain.
        types: of the inputs; '' for one that is left out.
        model: the operator alone in its graph.
    """

    name: str
    opset: int
    types: tuple[str, ...]
    model: ir.Model = dataclasses.field(repr=False, compare=False)

    def refusal(self, table: Table) -> str | None:
        """Return why the table has no kernel for it."""
        return next((one.reason for one in unsupported(self.model, table)), None)


class Outcome(NamedTuple):
    """What became of a probe: run, loaded only, without a kernel, or not built, with the runtime's words."""

    state: State
    message: str = ""


class _Recipe(NamedTuple):
    """What a node needs; `inputs` tells which are there, from the first on; an empty one means those required."""

    attributes: Mapping[str, Any] = {}
    inputs: str = ""
    outputs: int = 0


_RECURRENT = _Recipe({"hidden_size": 4})
_POOL = _Recipe({"kernel_shape": [2, 2]})
_SEVEN = _Recipe(inputs="xxxxx")
_RECIPES: Mapping[str, _Recipe] = {
    "BitShift": _Recipe({"direction": "LEFT"}),
    "GRU": _RECURRENT,
    "LSTM": _RECURRENT,
    "RNN": _RECURRENT,
    "RegexFullMatch": _Recipe({"pattern": "1"}),
    "Resize": _Recipe(inputs="x-x"),
    "com.microsoft.DynamicQuantizeLSTM": _RECURRENT,
    "com.microsoft.EmbedLayerNormalization": _Recipe(outputs=2),
    "com.microsoft.FusedGemm": _Recipe({"activation": "Relu"}),
    "com.microsoft.MaxpoolWithMask": _POOL,
    "com.microsoft.QLinearLeakyRelu": _SEVEN,
    "com.microsoft.QLinearSigmoid": _SEVEN,
    "AveragePool": _POOL,
    "LpPool": _POOL,
    "MaxPool": _POOL,
}
_FILLERS: Mapping[str, Any] = {"INT": 1, "INTS": [1], "FLOAT": 1.0, "FLOATS": [1.0], "STRING": "x"}


def probes(table: Table, *, every_version: bool = False) -> Iterator[Probe]:
    """Yield the probes of all operators of the default and of ONNX Runtime's own domain.

    Args:
        table: what is known; says which types to start from.
        every_version: of each operator, from opset 7 on, or the newest alone.

    Raises:
        UserError: ONNX Runtime is not installed.
    """
    highest = table.opset or max(max(versions) for (domain, _), versions in runtime_schemas().items() if not domain)
    for (domain, op_type), versions in sorted(runtime_schemas().items()):
        if domain not in (*DEFAULT_DOMAINS, _CONTRIB) or op_type == "Constant":
            continue
        for version, schema in sorted(versions.items()):
            if not every_version and version != max((one for one in versions if one <= highest), default=0):
                continue
            after = min((later for later in versions if later > version), default=highest + 1) - 1
            opset = highest if domain == _CONTRIB else min(after, highest)
            if not schema.deprecated and opset >= max(_OLDEST, version if domain != _CONTRIB else 0):
                yield from _of_schema(table, schema, domain, op_type, opset)


def _of_schema(table: Table, schema: Any, domain: str, op_type: str, opset: int) -> Iterator[Probe]:
    recipe = _RECIPES.get(operator_name(domain, op_type), _Recipe())
    attributes = {name: _FILLERS.get(one.type.name) for name, one in schema.attributes.items() if one.required} | dict(
        recipe.attributes
    )
    present = recipe.inputs or "x" * max(schema.min_input, min(1, schema.max_input))
    formal = list(schema.inputs)[: len(present)]
    allowed = {
        one.type_param_str: [type_word(word) for word in one.allowed_type_strs] for one in schema.type_constraints
    }
    if None in attributes.values() or len(formal) < len(present):
        return
    parameters = [one.typeStr for one, there in zip(formal, present, strict=True) if there == "x"]
    parameters = [name for name in dict.fromkeys(parameters) if name in allowed]
    entries = table.operators.get(operator_name(domain, op_type), ())
    base = {name: _likely(name, formal, allowed[name], entries, opset) for name in parameters}
    variants = [base]
    variants += [{**base, name: word} for name in parameters for word in allowed[name] if word != base[name]]
    for variant in variants:
        words = [
            "" if there == "-" else variant.get(one.typeStr, type_word(one.typeStr))
            for one, there in zip(formal, present, strict=True)
        ]
        if all(not word or _type(word) is not None for word in words):
            outputs = recipe.outputs or max(schema.min_output, 1)
            yield probe_model(domain, op_type, opset, words, attributes, outputs)


def _likely(name: str, formal: Sequence[Any], words: Sequence[str], entries: Iterable[Any], opset: int) -> str:
    """Return a type of which there is a kernel, float32 or else int64 if there is one for it."""
    index = next(index for index, one in enumerate(formal) if one.typeStr == name)
    fitting = [entry for entry in entries if entry.since <= opset and (entry.until is None or opset <= entry.until)]
    good = [word for word in words for entry in fitting if word in (entry.inputs.of(index) or words)]
    good = good or list(words)
    return next((word for word in ("float32", "int64") if word in good), good[0])


def probe_model(
    domain: str, op_type: str, opset: int, words: Sequence[str], attributes: Mapping[str, Any], outputs: int = 1
) -> Probe:
    """Return a probe whose inputs are of the types `words`, without shapes."""
    values = [ir.Value(name=f"x{index}", type=_type(word)) if word else None for index, word in enumerate(words)]
    node = ir.node(op_type, values, attributes, domain=domain, num_outputs=outputs)
    for index, value in enumerate(node.outputs):
        value.name = f"y{index}"
    graph = ir.Graph(
        [value for value in values if value is not None],
        node.outputs,
        nodes=[node],
        opset_imports={"": opset, **({domain: 1} if domain else {})},
        name="probe",
    )
    model = ir.Model(graph, ir_version=_IR_VERSION)
    return Probe(operator_name(domain, op_type), opset, tuple(words), model)


def _type(word: str) -> ir.TypeProtocol | None:
    """Return the type that a table calls `word`; None for maps and sparse tensors."""
    for prefix, kind in (("seq(", ir.SequenceType), ("optional(", ir.OptionalType)):
        if word.startswith(prefix):
            inner = _type(word.removeprefix(prefix).removesuffix(")"))
            return None if inner is None else kind(inner)
    return ir.TensorType(_TYPES[word]) if word in _TYPES else None


def outcomes(models: Iterable[ir.Model], worker_module: str = "qgraph.runtime.probe_worker") -> Iterator[Outcome]:
    """Load, and where it can be, run each model, in a process of their own that may die of one.

    Args:
        models: with a node each.
        worker_module: what the process runs; answers as `probe_worker` does.
    """
    worker: subprocess.Popen[bytes] | None = None
    try:
        for model in models:
            if worker is None:
                worker = _start(worker_module)
            outcome, alive = _ask(worker, ir.to_proto(model).SerializeToString())
            if not alive:
                _stop(worker)
                worker = None
            yield outcome
    finally:
        if worker is not None:
            _stop(worker)


def _start(module: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _stop(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.communicate()


def _ask(worker: subprocess.Popen[bytes], model: bytes) -> tuple[Outcome, bool]:
    """Return what became of a model, and whether the process lives on."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(struct.pack("<I", len(model)) + model)
    worker.stdin.flush()
    word, _, message = worker.stdout.readline().decode("utf-8", errors="replace").strip().partition(" ")
    if word == "none":
        return Outcome("none", message), True
    if word != "loaded":
        return Outcome("not built", message or "the runtime aborted"), bool(word)
    ran, _, message = worker.stdout.readline().decode("utf-8", errors="replace").strip().partition(" ")
    return (Outcome("ran"), True) if ran == "ran" else (Outcome("loaded", message), bool(ran))
