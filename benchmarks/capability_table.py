"""Write the tables of ONNX Runtime's providers from the installed runtime.

    python benchmarks/capability_table.py [onnxruntime-cpu | onnxruntime-cuda]

The kernels come from its registry, which the GPU build tells once its libraries load, with or without a device. For the
CPU, operators without a kernel that it expands by their definition, what it makes of several nodes, and how kernels add
products of bytes come from probes: small models that are loaded and run, the last of them as on lesser processors too
(`lesser_processor`; where that cannot be, what the table has of others is kept). What is found otherwise stands here,
in CONSTRAINTS and NOTES. `qgraph doctor --probe` holds the tables against the runtime.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lesser_processor import processors_here, products_of

from qgraph import capabilities
from qgraph.capabilities import PROCESSORS, ByteProduct, Entry, Fusion, Table, Types
from qgraph.errors import UserError
from qgraph.runtime.fusion_probes import found_fusions
from qgraph.runtime.kernel_probes import outcomes, probes
from qgraph.runtime.kernel_registry import joined, registry_entries, runtime_schemas
from qgraph.runtime.session import CPU_PROVIDER

__all__ = ["definitions", "made", "table_text"]

FOLDER = Path(__file__).resolve().parent.parent / "qgraph" / "capabilities"
CPU, CUDA = "onnxruntime-cpu", "onnxruntime-cuda"
PROVIDERS = {CPU: CPU_PROVIDER, CUDA: "CUDAExecutionProvider"}
HIGHEST_OPSET = 26
SOURCES: Mapping[str, Mapping[str, str]] = {
    CPU: {
        "registry": "the kernel registry of the installed runtime, {version}",
        "definition": "no kernel, but expanded by its definition: one-node models loaded in {version}",
        "probe": "a small model loaded in {version}, and the graph that really runs looked at",
        "product": "a small model run in {version}, on a processor with VNNI and with its VNNI and AVX-512 hidden",
    },
    CUDA: {"registry": "the kernel registry of onnxruntime-gpu {version} for CUDA 13, read without a device"},
}
CONVERSIONS: Mapping[str, Mapping[str, str]] = {CPU: {"float16": "float32"}, CUDA: {}}
"""On the CPU, nodes without a float16 kernel run in float32 between two Cast."""
_BLOCKS = "attribute block_size in none, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192"
CONSTRAINTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    CPU: {
        "com.microsoft.GatherBlockQuantized": ("attribute bits in none, 2, 4, 8", _BLOCKS),
        "com.microsoft.MatMulNBits": ("attribute bits in none, 2, 4, 8", _BLOCKS),
    },
    CUDA: {"com.microsoft.MatMulNBits": ("attribute bits in none, 2, 4, 8",)},
}
NOTES: Mapping[str, Mapping[str, str]] = {
    CPU: {},
    CUDA: {
        "MatMulInteger": "int8 by int8 only: DynamicQuantizeLinear makes uint8",
        "com.microsoft.GemmFloat8": "needs compute capability 8.9 (Ada) or 9.0 (Hopper)",
    },
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


def _constrained(entry: Entry, name: str) -> Entry:
    """Return an entry with what is known of it beyond types."""
    constraints = tuple(map(capabilities.parse_constraint, CONSTRAINTS[name].get(entry.name, ())))
    return dataclasses.replace(entry, constraints=constraints, note=NOTES[name].get(entry.name, ""))


def table_text(table: Table) -> str:
    """Return a table as TOML: one line for each entry."""
    body = [
        *_listed("operators", [_entry(one) for name in sorted(table.operators) for one in table.operators[name]]),
        *_listed("fusions", [_fusion(one) for one in table.fusions]),
        *_listed("products", [_product(one) for one in table.products]),
    ]
    words = {word for line in body for word in re.findall(r'"(\w+)"', line)}
    lines = [
        "# Written by benchmarks/capability_table.py; `qgraph doctor --probe` holds it against the installed runtime.",
        f'runtime = "{table.runtime}"',
        f'provider = "{table.provider}"',
        f'version = "{table.version}"',
        f"opset = {table.opset}",
        "",
        *(f'sources.{key} = "{text}"' for key, text in table.sources.items()),
        "",
        *(f"types.{name} = {_list(members)}" for name, members in GROUPS.items() if name in words),
        *(
            ["", *(f'conversions.{one} = "{other}"' for one, other in table.conversions.items())]
            if table.conversions
            else []
        ),
        *body,
    ]
    return "\n".join(lines) + "\n"


def _listed(key: str, entries: Sequence[str]) -> list[str]:
    return ["", f"{key} = [", *(f"  {one}," for one in entries), "]"] if entries else []


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


def _product(one: ByteProduct) -> str:
    parts = [f'kernel = "{one.kernel}"', f"weights = {json.dumps(one.weights)}", f'activations = "{one.activations}"']
    parts += [f'stored = "{one.stored}"'] + ([f"when = {_list(one.when)}"] if one.when else [])
    parts += [f"saturates = {_list(one.saturates)}"] if one.saturates else []
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


def made(name: str) -> Table:
    """Return a table as the installed runtime has it.

    Raises:
        UserError: ONNX Runtime is not installed, or lacks the provider.
    """
    import onnxruntime

    version = onnxruntime.__version__
    operators: dict[str, tuple[Entry, ...]] = {}
    for entry in registry_entries(PROVIDERS[name]):
        operators[entry.name] = (*operators.get(entry.name, ()), _constrained(entry, name))
    if not operators:
        raise UserError(f"ONNX Runtime {version} has no kernels of {PROVIDERS[name]}")
    sources = {key: text.format(version=version) for key, text in SOURCES[name].items()}
    table = Table(name, "ONNX Runtime", PROVIDERS[name], version, HIGHEST_OPSET, sources, operators, CONVERSIONS[name])
    if name != CPU:
        return table
    for entry in definitions(table):
        operators[entry.name] = (*operators.get(entry.name, ()), entry)
    return dataclasses.replace(table, operators=operators, fusions=tuple(found_fusions()), products=_products())


def _products() -> tuple[ByteProduct, ...]:
    """Return how kernels add products of bytes on the processors that can be had here, and as known on others."""
    here = processors_here()
    found = {processor: {_form(one): one for one in products_of(processor)} for processor in here}
    before = {_form(one): one for one in capabilities.table(CPU).products} if CPU in capabilities.names() else {}
    every: list[ByteProduct] = []
    for form in next(iter(found.values()), before):
        known = before.get(form)
        saturates = [
            name
            for name in PROCESSORS
            if (found[name][form].saturates if name in found else known is not None and name in known.saturates)
        ]
        every.append(dataclasses.replace(form, saturates=tuple(saturates)))
    return tuple(every)


def _form(one: ByteProduct) -> ByteProduct:
    return dataclasses.replace(one, saturates=())


def main() -> None:
    for name in sys.argv[1:] or [CPU]:
        table = made(name)
        (FOLDER / f"{name}.toml").write_text(table_text(table), encoding="utf-8")
        print(f"{name}: {sum(map(len, table.operators.values()))} entries of {len(table.operators)} operators")


if __name__ == "__main__":
    main()
