"""Write the table of ONNX Runtime's CPU provider from the installed runtime.

    python benchmarks/capability_table.py [qgraph/capabilities/onnxruntime-cpu.toml]

The kernels come from its registry. Operators without a kernel that it expands by their definition, and what it makes of
several nodes, come from probes: small models that are loaded and run. What the table says in `constraints` and `note`
was found otherwise and is kept. `qgraph doctor --probe` holds the table against the runtime.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qgraph import capabilities
from qgraph.capabilities import Constraint, Entry, Fusion, Table, Types
from qgraph.runtime.fusion_probes import found_fusions
from qgraph.runtime.kernel_probes import outcomes, probes
from qgraph.runtime.kernel_registry import joined, registry_entries, runtime_schemas
from qgraph.runtime.session import CPU_PROVIDER

__all__ = ["definitions", "table_text"]

NAME = "onnxruntime-cpu"
FILE = Path(__file__).resolve().parent.parent / "qgraph" / "capabilities" / f"{NAME}.toml"
HIGHEST_OPSET = 26
SOURCES = {
    "registry": "the kernel registry of the installed runtime",
    "definition": "no kernel, but expanded by its definition: one-node models loaded",
    "probe": "a small model loaded, and the graph that really runs looked at",
}
CONVERSIONS = {"float16": "float32"}
"""Nodes without a float16 kernel run in float32 between two Cast."""
CONSTRAINTS: Mapping[str, tuple[str, ...]] = {
    "com.microsoft.GatherBlockQuantized": (
        "attribute bits in none, 2, 4, 8",
        "attribute block_size in none, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192",
    ),
    "com.microsoft.MatMulNBits": (
        "attribute bits in none, 2, 4, 8",
        "attribute block_size in none, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192",
    ),
}
_FLOAT8 = ["float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"]
_PLAIN = ["bfloat16", "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "string", "uint8",
          "uint16", "uint32", "uint64"]  # fmt: skip
GROUPS: Mapping[str, Sequence[str]] = {
    "plain": _PLAIN,
    "sequences": [f"seq({one})" for one in _PLAIN],
    "optionals": [f"optional({one})" for one in _PLAIN],
    "optional_sequences": [f"optional(seq({one}))" for one in _PLAIN],
    "integers": ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"],
    "float8": _FLOAT8,
    "float8_sequences": [f"seq({one})" for one in _FLOAT8],
    "words": ["int32", "int64"],
    "unsigned_words": ["uint32", "uint64"],
    "floats": ["float32", "float64"],
    "bytes": ["int8", "uint8"],
    "shorts": ["int16", "uint16"],
    "nibbles": ["int4", "uint4"],
    "crumbs": ["int2", "uint2"],
}
"""Names for groups of types; the first that fit are used."""


def definitions(table: Table) -> list[Entry]:
    """Return what the runtime loads although the table has no kernel for it."""
    every = list(probes(table, every_version=True))
    loaded: dict[tuple[str, int, int | None], list[tuple[str, ...]]] = defaultdict(list)
    spans = _spans()
    for probe, outcome in zip(every, outcomes(one.model for one in every), strict=True):
        if outcome.state in ("ran", "loaded") and probe.refusal(table) is not None:
            since, until = next(
                span for span in spans[probe.name] if span[0] <= probe.opset <= (span[1] or probe.opset)
            )
            loaded[probe.name, since, until].append(probe.types)
    found = []
    for (name, since, until), types in sorted(loaded.items(), key=lambda item: item[0][:2]):
        slots = {index: tuple(sorted({one[index] for one in types})) for index in range(len(types[0]))}
        found.append(Entry(name, 0 if since == 1 else since, until, Types(slots), source="definition"))
    return [
        entry for name in sorted({one.name for one in found}) for entry in joined(e for e in found if e.name == name)
    ]


def _spans() -> Mapping[str, Sequence[tuple[int, int | None]]]:
    """Return operator -> the opsets at which each of its versions holds."""
    spans = {}
    for (domain, op_type), versions in runtime_schemas().items():
        since = sorted(versions)
        until = [later - 1 for later in since[1:]]
        spans[capabilities.operator_name(domain, op_type)] = list(zip(since, [*until, None], strict=True))
    return spans


def _constrained(entry: Entry, before: Mapping[str, tuple[Entry, ...]]) -> Entry:
    """Return an entry with what the table so far says of it beyond types."""
    same = next((one for one in before.get(entry.name, ()) if one.inputs == entry.inputs), None)
    words = tuple(map(capabilities.parse_constraint, CONSTRAINTS.get(entry.name, ())))
    constraints: tuple[Constraint, ...] = words or (same.constraints if same is not None else ())
    return dataclasses.replace(entry, constraints=constraints, note="" if same is None else same.note)


def table_text(table: Table, version: str) -> str:
    """Return a table as TOML: one line for each entry."""
    lines = [
        "# Written by benchmarks/capability_table.py; `qgraph doctor --probe` holds it against the installed runtime.",
        f'runtime = "{table.runtime}"',
        f'provider = "{table.provider}"',
        f'version = "{version}"',
        f"opset = {table.opset}",
        "",
        *(f'sources.{key} = "{text}"' for key, text in table.sources.items()),
        "",
        *(f"types.{name} = {_list(words)}" for name, words in GROUPS.items()),
        "",
        *(f'conversions.{one} = "{other}"' for one, other in table.conversions.items()),
        "",
        "operators = [",
        *(f"  {_entry(entry)}," for name in sorted(table.operators) for entry in table.operators[name]),
        "]",
        "",
        "fusions = [",
        *(f"  {_fusion(one)}," for one in table.fusions),
        "]",
    ]
    return "\n".join(lines) + "\n"


def _entry(entry: Entry) -> str:
    parts = [f'name = "{entry.name}"']
    parts += [f"since = {entry.since}"] if entry.since else []
    parts += [f"until = {entry.until}"] if entry.until is not None else []
    parts += [f"{key} = {_slots(types)}" for key, types in (("inputs", entry.inputs), ("outputs", entry.outputs))
              if types != Types()]  # fmt: skip
    parts += [f"constraints = {_list([one.text for one in entry.constraints])}"] if entry.constraints else []
    parts += [f'source = "{entry.source}"']
    parts += [f'note = "{entry.note}"'] if entry.note else []
    return f"{{ {', '.join(parts)} }}"


def _fusion(one: Fusion) -> str:
    parts = [f'pattern = "{one.pattern}"', f"when = {_list(one.when)}", f'kernel = "{one.kernel}"']
    parts += [f'arithmetic = "{one.arithmetic}"'] if one.arithmetic else []
    parts.append(f'source = "{one.source}"')
    return f"{{ {', '.join(parts)} }}"


def _slots(types: Types) -> str:
    parts = [f"{index} = {_list(_grouped(words))}" for index, words in types.by_index.items()]
    parts += [f'"*" = {_list(_grouped(types.others))}'] if types.others is not None else []
    return f"{{ {', '.join(parts)} }}"


def _grouped(words: Iterable[str]) -> list[str]:
    left, found = set(words), []
    for name, group in GROUPS.items():
        if left.issuperset(group):
            found.append(name)
            left -= set(group)
    return found + sorted(left)


def _list(words: Iterable[str]) -> str:
    return f"[{', '.join(json.dumps(word) for word in words)}]"


def main() -> None:
    import onnxruntime

    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    before = capabilities.table(NAME).operators if NAME in capabilities.names() else {}
    operators: dict[str, tuple[Entry, ...]] = {}
    for entry in registry_entries():
        operators[entry.name] = (*operators.get(entry.name, ()), _constrained(entry, before))
    table = Table(NAME, "ONNX Runtime", CPU_PROVIDER, onnxruntime.__version__, HIGHEST_OPSET, SOURCES, operators,
                  CONVERSIONS)  # fmt: skip
    for entry in definitions(table):
        operators[entry.name] = (*operators.get(entry.name, ()), entry)
    table = dataclasses.replace(table, operators=operators, fusions=tuple(found_fusions()))
    path.write_text(table_text(table, onnxruntime.__version__), encoding="utf-8")
    print(f"{path}: {sum(map(len, operators.values()))} entries of {len(operators)} operators")


if __name__ == "__main__":
    main()
