"""The tables of capabilities held against what is installed here: registry, one-node models, fused forms, sums.

ONNX Runtime's CPU provider is asked for its kernels, and runs; TVM's importer is handed ONNX's examples of operators.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qgraph import capabilities
from qgraph.capabilities import ByteProduct, Entry, Fusion, Table, Types
from qgraph.errors import UserError
from qgraph.runtime.fusion_probes import found_fusions
from qgraph.runtime.importer_probes import WORKER, converters, examples
from qgraph.runtime.kernel_probes import Outcome, Probe, outcomes, probes
from qgraph.runtime.kernel_registry import registry_entries
from qgraph.runtime.processor import product_processor
from qgraph.runtime.product_probes import found_products
from qgraph.runtime.session import CPU_PROVIDER, installed_providers

__all__ = ["TableCheck", "check_table", "check_tables", "registry_differences"]

ONNX_RUNTIME, TVM = "ONNX Runtime", "Apache TVM"
_FROM_REGISTRY = "registry"


@dataclasses.dataclass(frozen=True)
class TableCheck:
    """What became of holding one table against the runtime.

    Attributes:
        table: its name.
        version: of the runtime that the table was taken of.
        installed: version of the runtime here, or ''.
        unchecked: why nothing of it could be derived here, or ''.
        entries: number of entries of kernels that were compared with the registry; of an importer, its converters.
        probes: state ("ran", "loaded", "none", "not built") -> number of one-node models.
        not_built: operators that no probe could be built for.
        fusions: number of forms that were looked at.
        processor: which of `qgraph.capabilities.PROCESSORS` the one at hand is, or ''.
        products: number of kernels whose sums of products of bytes were looked at on it.
        differences: what differs, a line each, as the runtime here has it.
        importer: whether an importer was asked, of which nothing runs.
    """

    table: str
    version: str
    installed: str = ""
    unchecked: str = ""
    entries: int = 0
    probes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    not_built: tuple[str, ...] = ()
    fusions: int = 0
    processor: str = ""
    products: int = 0
    differences: tuple[str, ...] = ()
    importer: bool = False

    @property
    def agrees(self) -> bool:
        """Whether nothing that was checked differs."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "agrees": self.agrees}


def check_tables(progress: Callable[[str, int, int], None] | None = None) -> tuple[TableCheck, ...]:
    """Check every table there is; see `check_table`."""
    return tuple(check_table(capabilities.table(name), progress) for name in capabilities.names())


def check_table(table: Table, progress: Callable[[str, int, int], None] | None = None) -> TableCheck:
    """Derive from what is installed here as much of a table as can be, and compare.

    Of ONNX Runtime's other providers than the CPU's, the registry alone is compared: models are probed on the CPU only.
    TVM's importer is asked, but nothing of it runs. Nothing that is missing raises.

    Args:
        table: to check.
        progress: called with a step, the number done and that of all.
    """
    unchecked, installed = _unchecked(table)
    if unchecked:
        return TableCheck(table.name, table.version, installed, unchecked)
    if table.runtime == TVM:
        return _check_importer(table, installed, progress)
    try:
        kernels = registry_entries(table.provider)
    except UserError as error:
        return TableCheck(table.name, table.version, installed, str(error))
    differences = registry_differences(table, kernels)
    if table.provider != CPU_PROVIDER:
        return TableCheck(table.name, table.version, installed, entries=len(kernels), differences=tuple(differences))
    every = list(probes(table))
    results = list(_counted(outcomes(one.model for one in every), len(every), table.name, progress))
    differences += _probe_differences(table, every, results)
    fusions = list(found_fusions())
    differences += _fusion_differences(table.fusions, fusions)
    processor = product_processor()
    products = list(found_products(processor)) if processor else []
    differences += _product_differences(table.products, products, processor)
    not_built = {probe.name for probe in every} - {
        probe.name for probe, result in zip(every, results, strict=True) if result.state != "not built"
    }
    states = Counter(result.state for result in results)
    return TableCheck(
        table.name,
        table.version,
        installed,
        "",
        len(kernels),
        dict(sorted(states.items())),
        tuple(sorted(not_built)),
        len(fusions),
        processor,
        len(products),
        tuple(differences),
    )


def _check_importer(
    table: Table, installed: str, progress: Callable[[str, int, int], None] | None
) -> TableCheck:  # fmt: skip
    """Compare with what the importer makes of examples, and where there are none, with its converters."""
    every = list(examples())
    results = list(_counted(outcomes((one.model for one in every), WORKER), len(every), table.name, progress))
    known = converters()
    shown = {probe.name for probe in every}
    untried = {*table.operators} - shown
    differences = [
        *dict.fromkeys(_probe_differences(table, every, results)),
        *(f"the importer has a converter that the table lacks: {one}" for one in sorted(known - shown - untried)),
        *(f"the importer lacks a converter that the table has: {one}" for one in sorted(untried - known)),
    ]
    states = Counter(result.state for result in results)
    return TableCheck(
        table.name,
        table.version,
        installed,
        entries=len(known),
        probes=dict(sorted(states.items())),
        differences=tuple(differences),
        importer=True,
    )


def _unchecked(table: Table) -> tuple[str, str]:
    """Return why a table cannot be checked here, or '', and the version that is installed, or ''."""
    if table.runtime == TVM:
        try:
            return "", importlib.metadata.version("apache-tvm")
        except importlib.metadata.PackageNotFoundError:
            return "TVM is not installed: pip install 'qgraph-compiler[tvm]'", ""
    if table.runtime != ONNX_RUNTIME:
        return f"{table.runtime} tells nothing of its kernels that a probe could ask for", ""
    providers = installed_providers()
    if not providers:
        return "ONNX Runtime is not installed: pip install 'qgraph-compiler[cpu]'", ""
    import onnxruntime

    if table.provider not in providers:
        return f"ONNX Runtime's {table.provider} is not installed here", str(onnxruntime.__version__)
    if not any(entry.source == _FROM_REGISTRY for entries in table.operators.values() for entry in entries):
        return f"ONNX Runtime's {table.provider} asks a library that has no registry", str(onnxruntime.__version__)
    return "", str(onnxruntime.__version__)


def _counted(
    results: Iterable[Outcome], total: int, name: str, progress: Callable[[str, int, int], None] | None
) -> Iterator[Outcome]:
    for done, result in enumerate(results, start=1):
        if progress is not None:
            progress(f"probe {name}", done, total)
        yield result


def registry_differences(table: Table, kernels: Sequence[Entry]) -> list[str]:
    """Return what the registry has and the table has not, and the other way round.

    Args:
        table: whose entries from the registry are compared.
        kernels: of the registry.
    """
    here = {_kernel_text(entry) for entry in kernels}
    listed = {
        _kernel_text(entry)
        for entries in table.operators.values()
        for entry in entries
        if entry.source == _FROM_REGISTRY
    }
    return [
        *(f"the runtime has a kernel that the table lacks: {one}" for one in sorted(here - listed)),
        *(f"the runtime lacks a kernel that the table has: {one}" for one in sorted(listed - here)),
    ]


def _kernel_text(entry: Entry) -> str:
    span = f"{entry.since}.." if entry.until is None else f"{entry.since}..{entry.until}"
    return f"{entry.name} {span} ({_types_text(entry.inputs)}) => ({_types_text(entry.outputs)})"


def _types_text(types: Types) -> str:
    parts = [f"{index}: {'|'.join(sorted(words))}" for index, words in sorted(types.by_index.items())]
    return ", ".join(parts + ([f"*: {'|'.join(sorted(types.others))}"] if types.others is not None else []))


def _probe_differences(table: Table, every: Sequence[Probe], results: Sequence[Outcome]) -> list[str]:
    found = []
    for probe, result in zip(every, results, strict=True):
        refusal = probe.refusal(table)
        if result.state == "not built" or (result.state == "none") == (refusal is not None):
            continue
        told = f"{probe.name} of opset {probe.opset} with {', '.join(filter(None, probe.types)) or 'no input'}"
        if refusal is None:
            found.append(f"the table takes {told}, the runtime does not: {result.message}")
        else:
            found.append(f"the runtime takes {told}, the table does not: {refusal}")
    return found


def _fusion_differences(listed: Sequence[Fusion], here: Sequence[Fusion]) -> list[str]:
    known = {(one.pattern, one.when): one for one in listed}
    found = []
    for one in here:
        before = known.pop((one.pattern, one.when), None)
        told = f"{one.pattern} ({'; '.join(one.when)})"
        if before is None:
            found.append(f"the table does not know what becomes of {told}: here {_kernel_of(one)}")
        elif (before.kernel, before.arithmetic) != (one.kernel, one.arithmetic):
            found.append(f"{told}: {_kernel_of(one)} here, {_kernel_of(before)} by the table")
    return found + [f"no probe shows what becomes of {one.pattern} ({'; '.join(one.when)})" for one in known.values()]


def _product_differences(listed: Sequence[ByteProduct], here: Sequence[ByteProduct], processor: str) -> list[str]:
    """Return which sums of products of bytes are cut to 16 bits here, or are not, unlike the table says."""
    known = {dataclasses.replace(one, saturates=()): processor in one.saturates for one in listed}
    words = {True: "sums of two products saturate", False: "sums are exact", None: "nothing is known"}
    found = []
    for one in here:
        before, now = known.get(dataclasses.replace(one, saturates=())), processor in one.saturates
        if before is not now:
            form = ", ".join((f"{one.activations} by {one.stored}", *one.when))
            found.append(
                f"{one.kernel} ({form}): {words[now]} on this processor ({processor}), {words[before]} by the table"
            )
    return found


def _kernel_of(fusion: Fusion) -> str:
    kernel = fusion.kernel or "left as it is"
    return f"{kernel}, in {fusion.arithmetic}" if fusion.arithmetic else kernel
