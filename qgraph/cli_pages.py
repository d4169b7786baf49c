"""The pages that commands show: what came back from the API, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qgraph.report.placement_page import PLACED
from qgraph.report.terminal import Table
from qgraph.report.units import bytes_text, count_text, decibels, percent, ratio_text, seconds_text

if TYPE_CHECKING:
    from qgraph.analysis.cost import ModelCost, NodeCost, Port
    from qgraph.catalog import Entry
    from qgraph.cli_display import Display
    from qgraph.doctor import Survey
    from qgraph.evaluation import Perplexity
    from qgraph.registry import Kind
    from qgraph.runtime.capability_check import TableCheck
    from qgraph.runtime.difference import Difference
    from qgraph.runtime.figures import Verification
    from qgraph.runtime.placement import PlacedNode, Placement
    from qgraph.verbs import Inspection, Measured, Outputs

__all__ = [
    "bench_table",
    "catalog_table",
    "difference_tables",
    "inspection_tables",
    "outputs_table",
    "perplexity_table",
    "placement_tables",
    "probe_lines",
    "show_entry",
    "survey_tables",
    "verification_table",
]

_WORST = 15
_REMARKS = 3
_WEIGHTS = 30
_DIFFERENCES = 20
_ORIGINS = 3
_FACTS = {"needs_calibration": "needs data", "prepare": "prepare passes", "lower": "lower passes"}


def catalog_table(kind: Kind, entries: Sequence[Entry]) -> Table:
    """Return the list of passes or targets."""
    rows = tuple((one.name, one.summary or one.fault) for one in entries)
    return Table(
        (kind, "what it is"), rows, note=f"`qgraph {'passes' if kind == 'pass' else 'targets'} NAME` tells more."
    )


def show_entry(display: Display, entry: Entry) -> None:
    """Show everything about a pass or target."""
    display.line(entry.name)
    if entry.summary not in entry.text:
        display.line(f"\n{entry.summary}")
    display.line(f"\n{entry.text}\n")
    for name, value in entry.facts.items():
        shown = ("yes" if value else "no") if isinstance(value, bool) else str(value)
        display.step(_FACTS.get(name, name), shown or "no passes")
    display.step("implemented by", entry.home)
    display.line()
    if not entry.options:
        display.line("It has no options.")
        return
    rows = tuple((one.name, one.type, one.default, one.help) for one in entry.options)
    display.table(Table(("option", "type", "default", ""), rows))


def survey_tables(survey: Survey) -> list[Table]:
    """Return machine, runtimes and targets."""
    memory = bytes_text(survey.memory) if survey.memory is not None else "unknown"
    machine = [
        ("system", survey.system),
        ("processor", f"{survey.cpu}, {survey.cores} cores usable"),
        ("instructions", " ".join(survey.flags) or "unknown"),
        ("memory", memory),
        ("graphics cards", "; ".join(survey.devices) or survey.device_fault or "none found"),
        *survey.versions.items(),
    ]
    runtimes = [
        (
            one.name,
            one.version or "not installed",
            one.fault or " ".join(one.offers) or ("" if one.version else one.install),
        )
        for one in survey.runtimes
    ]
    targets = [(one.target, "usable" if one.usable else "not here", one.missing) for one in survey.targets]
    return [
        Table(("this machine", ""), tuple(machine)),
        Table(("runtime", "version", "offers, or how to get it"), tuple(runtimes)),
        Table(("target", "", "what is missing"), tuple(targets)),
    ]


def probe_lines(checks: Sequence[TableCheck]) -> list[tuple[str, str]]:
    """Return the name of each table and what came of holding it against the runtime, then what differs."""
    lines = []
    for one in checks:
        if one.unchecked:
            lines.append((one.table, f"not checked: {one.unchecked}"))
            continue
        other = "" if one.installed == one.version else f" (of {one.version}; {one.installed} is installed)"
        count = len(one.differences)
        verdict = "agrees" if one.agrees else f"{count} difference{'s' if count > 1 else ''}"
        checked = f"{one.entries} kernels of the registry"
        if one.probes:
            ran, loaded, none, unbuilt = (one.probes.get(state, 0) for state in ("ran", "loaded", "none", "not built"))
            models = f"{ran} ran, {loaded} loaded, {none} without a kernel, {unbuilt} could not be built"
            checked += f"; {one.fusions} fused forms; one-node models: {models}"
        if one.products:
            checked += f"; {one.products} products of bytes on {one.processor}"
        lines.append((one.table, f"{verdict}{other}: {checked}"))
        lines += [("", text) for text in one.differences[:_DIFFERENCES]]
        if count > _DIFFERENCES:
            lines.append(("", f"and {count - _DIFFERENCES} more: --json has them all"))
    return lines


def outputs_table(outputs: Outputs) -> Table:
    """Return what the outputs of a run look like."""
    rows = tuple((one.name, one.dtype, "x".join(map(str, one.shape)) or "scalar") for one in outputs.arrays)
    written = f", written to {outputs.path}" if outputs.path is not None else "; -o Y.npz writes the outputs"
    where = f" on {outputs.stand_in}" if outputs.stand_in else ""
    note = f"{outputs.samples} samples in {seconds_text(outputs.seconds)}{where}{written}"
    return Table(("output", "type", "shape"), rows, note=note)


def perplexity_table(result: Perplexity) -> Table:
    """Return how well a model predicts a text."""
    rows = [("perplexity", f"{result.perplexity:.4f}"), ("nats per token", f"{result.nats:.4f}")]
    if result.bits_per_byte is not None:
        rows.append(("bits per byte", f"{result.bits_per_byte:.4f}"))
    protocol = f"{result.windows} windows of {result.window}, stride {result.stride}"
    note = f"{result.tokens:,} tokens scored in {seconds_text(result.seconds)}: {protocol}"
    return Table(("", ">value"), tuple(rows), note=note)


def verification_table(result: Verification) -> Table:
    """Return the figures of every output."""
    rows = tuple(
        (
            one.name,
            decibels(one.sqnr_db if one.sqnr_db != float("inf") else None, exact=one.exact),
            "–" if one.cosine is None else f"{one.cosine:.5f}",
            "–" if one.max_abs_error is None else f"{one.max_abs_error:.4g}",
            "–" if one.top1_agreement is None else percent(one.top1_agreement),
            "–" if one.match is None else percent(one.match),
            one.remark,
        )
        for one in result.outputs
    )
    return Table(("output", ">SQNR", ">cosine", ">max error", ">same top-1", ">equal", ""), rows)


def bench_table(measured: Measured) -> Table:
    """Return latency, throughput, memory and size of every candidate."""
    timed = measured.benchmark
    rows = tuple(
        (
            one.name,
            seconds_text(one.seconds),
            ratio_text(timed.ratio(timed.candidates[0].name, one.name)),
            f"{count_text(one.rows_per_second)}/s",
            "–" if one.peak_bytes is None else bytes_text(one.peak_bytes),
            bytes_text(measured.sizes[one.name]),
        )
        for one in timed.candidates
    )
    threads = f"{timed.threads} thread{'s' * (timed.threads > 1)}" if timed.threads else "default threads"
    where = f"{timed.machine.cpu}, {timed.machine.cores} cores, {timed.machine.runtime}"
    stood_in = f"; 'after' is not the target's own speed: it ran on {measured.stand_in}" if measured.stand_in else ""
    return Table(
        ("", ">latency", ">speed", ">rows", ">memory", ">size"),
        rows,
        note=f"{timed.batch}; {threads}; best of {timed.rounds} rounds; {where}{stood_in}",
    )


def difference_tables(result: Difference) -> list[Table]:
    """Return the worst tensors first, then what could not be compared."""
    worst = result.worst_first()
    rows = tuple(
        (
            one.node,
            one.op_type,
            decibels(one.sqnr_db, exact=one.exact),
            "–" if one.loss_db is None else f"{one.loss_db:.1f} dB",
            "–" if one.max_abs_error is None else f"{one.max_abs_error:.4g}",
            f"{one.broken} values became NaN or infinite" if one.broken else "",
        )
        for one in worst[:_WORST]
    )
    rest = len(worst) - len(rows)
    more = f", {rest} better ones not shown (--json shows all)" if rest > 0 else ""
    missing = f"; {len(result.unmatched)} tensors of the source have no counterpart" if result.unmatched else ""
    note = f"{len(worst)} tensors compared on {result.samples} samples{more}{missing}. 'lost here' is new in that node."
    layers = Table(("node", "operator", ">SQNR", ">lost here", ">max error", ""), rows, title="worst first", note=note)
    return [layers, _sensitivity_table(result)]


def _sensitivity_table(result: Difference) -> Table:
    """Return the quantized tensors whose rounding does most to the outputs, or why that is not known."""
    columns = ("quantized tensor", "", ">bits", ">own SQNR", ">at the outputs", ">share", "read by")
    found = result.sensitivities
    if found is None:
        return Table(columns, (), note=f"no sensitivities: {result.no_sensitivities}")
    worst = found.worst_first()
    rows = tuple(
        (
            one.tensor,
            one.kind,
            str(one.bits),
            decibels(one.own_sqnr_db),
            f"{decibels(one.output_sqnr_db)}{' measured' if one.method == 'measured' else ''}",
            percent(one.share),
            _some(one.readers),
        )
        for one in worst[:_WORST]
    )
    rest = len(worst) - len(rows)
    notes = [
        f"{len(worst)} quantized tensors{f', {rest} better ones not shown (--json shows all)' if rest > 0 else ''}",
        f"all together, to first order: {decibels(found.output_sqnr_db)} at the outputs",
        *found.notes[:_REMARKS],
        *([f"{len(found.notes) - _REMARKS} more remarks (--json)"] if len(found.notes) > _REMARKS else []),
    ]
    return Table(columns, rows, title="what hurts the outputs", note="; ".join(notes))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def inspection_tables(found: Inspection) -> list[Table]:
    """Return facts, inputs and outputs, weights and operators of a model."""
    cost = _cost(found)
    ports = [("in", one) for one in cost.inputs] + [("out", one) for one in cost.outputs]
    weights = sum(cost.weights.values())
    return [
        Table((str(found.path), ""), tuple(_facts(found))),
        Table(("", "name", "type", "shape"), tuple((way, one.name, one.dtype, _shape(one)) for way, one in ports)),
        Table(
            ("weights", ">bytes", ">share"),
            tuple((name, bytes_text(count), percent(count / weights)) for name, count in cost.weights.items() if count),
        ),
        *_compressed(found),
        *_before_and_after(found),
        _operators(cost),
    ]


def placement_tables(placement: Placement) -> list[Table]:
    """Return what runs where: in sum, by kernel, and node by node."""
    count = len(placement.nodes)
    facts = [("runtime", placement.runtime), ("nodes", str(count))]
    facts += [(name or "runs", f"{number} of {count}") for name, number in placement.counted("provider").items()]
    facts += [(PLACED[kind], str(number)) for kind, number in placement.counted("arithmetic").items()]
    facts.append(("copies between providers", str(placement.copies)))
    kernels = [
        (PLACED[kind], kernel, str(number))
        for kind, counts in placement.kernels().items()
        for kernel, number in counts.items()
    ]
    nodes = [
        (node.name or node.kernel, node.kernel, PLACED[node.arithmetic], node.precision, _origin(node))
        for node in placement.nodes
    ]
    return [
        Table(("placement", ""), tuple(facts)),
        Table(("computes", "kernel", ">nodes"), tuple(kernels)),
        Table(("node", "kernel", "computes", "types", "stands for"), tuple(nodes)),
    ]


def _origin(node: PlacedNode) -> str:
    return "; ".join(filter(None, (_sources(node), node.remark)))


def _sources(node: PlacedNode) -> str:
    named = [name for name in reversed(node.sources) if name != node.name]  # the layer comes before what it reads
    if not node.sources:
        return "put in by the runtime"
    shown = ", ".join(named[:_ORIGINS])
    return f"{shown} and {len(named) - _ORIGINS} more" if len(named) > _ORIGINS else shown


def _cost(found: Inspection) -> ModelCost:
    assert found.cost is not None, "only a placement is told of an artifact without an ONNX model"
    return found.cost


def _before_and_after(found: Inspection) -> list[Table]:
    """Return what the model and each of its layers took before, and what they take: those that took most first."""
    if found.before is None:
        return []
    both = (found.before, _cost(found))
    whole = [
        ("parameters", *(count_text(one.parameters) for one in both)),
        ("bytes of weights", *(bytes_text(one.weight_bytes) for one in both)),
        ("multiply-adds", *(count_text(one.multiply_adds) for one in both)),
        ("bytes of activations", *(bytes_text(one.activation_bytes) for one in both)),
        ("peak activations", *(_known(one.peak_activation_bytes, bytes_text) for one in both)),
    ]
    sides = [{(one.graph, one.name): one for one in model.nodes if one.multiply_adds} for model in both]
    layers = sorted(sides[0].keys() | sides[1].keys())
    layers.sort(key=lambda key: -max(side[key].multiply_adds or 0 for side in sides if key in side))
    rows = [("/".join(filter(None, key)), *_layer_row(*(side.get(key) for side in sides))) for key in layers]
    rest = len(rows) - _WEIGHTS
    columns = ("layer", ">multiply-adds", ">after", ">bytes of weights", ">after", ">bytes of outputs", ">after")
    return [
        Table(("", ">before", ">after"), tuple(whole)),
        Table(columns, tuple(rows[:_WEIGHTS]), note=f"and {rest} more; --json has them all" if rest > 0 else ""),
    ]


def _layer_row(before: NodeCost | None, after: NodeCost | None) -> tuple[str, ...]:
    both = (before, after)
    return (
        *("" if one is None else _known(one.multiply_adds, count_text) for one in both),
        *("" if one is None else bytes_text(one.weight_bytes) for one in both),
        *("" if one is None else _known(one.activation_bytes, bytes_text) for one in both),
    )


def _known(count: int | None, show: Callable[[int], str]) -> str:
    return "unknown" if count is None else show(count)


def _compressed(found: Inspection) -> list[Table]:
    """Return the compressed weights, the largest first."""
    if found.weights is None:
        return []
    tensors = sorted(found.weights["tensors"], key=lambda one: -one["bytes"])
    rows = [_weight_row(one["name"], one["scheme"], one, one["operators"]) for one in tensors[:_WEIGHTS]]
    rest = len(tensors) - len(rows)
    note = f"and {rest} more; --json has them all" if rest else ""
    total = _weight_row(f"all {len(tensors)}", "", found.weights, [])
    columns = ("compressed weight", "scheme", ">bits each", ">stored bits", ">bytes", "read by")
    return [Table(columns, (*rows, total), note=note)]


def _weight_row(name: str, scheme: str, sums: Mapping[str, Any], operators: Sequence[str]) -> tuple[str, ...]:
    bits, stored = (f"{sums[key]:.2f}" for key in ("bits_per_weight", "stored_bits_per_weight"))
    return (name, scheme, bits, stored, bytes_text(sums["bytes"]), ", ".join(operators))


def _facts(found: Inspection) -> list[tuple[str, str]]:
    cost = _cost(found)
    domains = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in cost.domains.items())
    unknown = (
        f", without {len(cost.unknown)} nodes of unknown shapes (--json gives the reasons)" if cost.unknown else ""
    )
    sizes = ", ".join(f"{name}={size}" for name, size in cost.axes.items())
    peak = "unknown" if cost.peak_activation_bytes is None else bytes_text(cost.peak_activation_bytes)
    facts = [
        ("size", bytes_text(found.bytes)),
        ("producer", cost.producer or "unknown"),
        ("operator sets", f"{domains}; IR version {cost.ir_version}"),
        ("nodes", f"{len(cost.nodes)}{f', {cost.functions} functions' if cost.functions else ''}"),
        ("parameters", count_text(cost.parameters)),
        ("multiply-adds", f"{count_text(cost.multiply_adds)}{unknown}"),
        ("peak activations", peak),
        *([("with axes", sizes)] if sizes else []),
    ]
    if found.manifest is not None:
        state = "verified" if found.manifest["verified"] else "not verified"
        facts.insert(0, ("artifact", f"for {found.manifest['target']}, {state}"))
    return facts


def _shape(port: Port) -> str:
    if port.shape is None:
        return "unknown"
    return "x".join("?" if axis is None else str(axis) for axis in port.shape) or "scalar"


def _operators(cost: ModelCost) -> Table:
    rows = []
    for op_type, count in cost.operators.items():
        nodes = [node for node in cost.nodes if node.op_type == op_type]
        work = sum(node.multiply_adds or 0 for node in nodes)
        weights = sum(node.weight_bytes for node in nodes)
        rows.append((op_type, str(count), count_text(work) if work else "", bytes_text(weights) if weights else ""))
    return Table(("operator", ">nodes", ">multiply-adds", ">weights read"), tuple(rows))
