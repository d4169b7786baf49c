"""report.html: one page that tells what was done, what it saved, what it cost, and how to do it again.

The page needs nothing but itself: styles and drawings are inside, there is no script, and its content policy forbids
to fetch anything. Long lists are cut (the manifest has them whole), so that the page stays small for any model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from qgraph.report import units
from qgraph.report.charts import bar, split_bar
from qgraph.report.data import Comparison, PassFacts, ReportData, comparisons
from qgraph.report.layers_page import layers_section, pictures_section
from qgraph.report.markup import Child, Markup, clip, element
from qgraph.report.parts import bound_text, budget_text, document, name_cell, number, row, section, table
from qgraph.report.placement_page import placement_section
from qgraph.report.search_page import search_section
from qgraph.runtime.figures import OutputFigures, Verification
from qgraph.runtime.placement import kernel_counts

__all__ = ["render"]

_OUTPUTS = 60
_GROUPS = 60
_NAMES = 500
_NOTES = 12
_RECIPE = 40_000
_FUSED = "Counted after the runtime's own fusions, as it runs on this machine."
_NOT_HERE = "Counted as the operators are written: the device is not here to run them."
_PARTS = {"prepare": "Prepare", "compress": "Compress", "lower": "Lower"}


def render(data: ReportData) -> str:
    """Return the page as HTML 5."""
    manifest = data.manifest
    title = f"{clip(str(manifest['source']['name']))} for {manifest['target']}"
    sections = [
        _header(data),
        _figures(comparisons(manifest, data.bench)),
        search_section(data),
        _passes(data.passes),
        _verification(manifest),
        layers_section(data.layers),
        pictures_section(data.layers),
        _weights(manifest.get("weights")),
        _kernels(kernel_counts(manifest), str(manifest.get("stand_in", ""))),
        placement_section(manifest.get("placement")),
        _left_alone(manifest),
        _again(data),
    ]
    return document(title, *sections, _footer(data))


def _header(data: ReportData) -> Markup:
    manifest = data.manifest
    heading = element(
        "h1", clip(str(manifest["source"]["name"])), " ", element("small", f"for {manifest['target']}")
    )  # fmt: skip
    failures = [str(one) for one in manifest.get("failures", ())]
    bounds = ", ".join(bound_text(metric, value) for metric, value in manifest.get("tolerance", {}).items())
    checked = f"run beside its source on {_samples(manifest)}"
    tolerance = f" Tolerance: {bounds}." if bounds else ""
    budget = ", ".join(budget_text(name, value) for name, value in manifest.get("budget", {}).items())
    tolerance += f" Budget: {budget}." if budget else ""
    if not failures:
        return element("header", heading, element("p", f"Verified: {checked}.{tolerance}", class_="status"))
    return element(
        "header",
        heading,
        element("p", f"Outside the tolerance: {checked}.{tolerance}", class_="status bad"),
        element("ul", *(element("li", clip(one)) for one in failures[:_NOTES]), class_="failures"),
    )


def _samples(manifest: Mapping[str, Any]) -> str:
    verification = manifest["verification"]
    where = f", on {manifest['stand_in']}" if manifest.get("stand_in") else ""
    return f"{verification['samples']} {verification.get('data', 'samples')}{where}"


def _figures(lines: Sequence[Comparison]) -> Markup:
    return element("dl", *(_figure(line) for line in lines), class_="figures")


def _figure(line: Comparison) -> Markup:
    kind = "worse" if line.good is False else ""
    number, word = line.change, ""
    if not line.change:
        # An output is compared with itself before: only the figure after tells something.
        number, word = line.after, "SQNR" if line.after.endswith(" dB") else ""
    elif line.change != "the same":
        number, _, word = line.change.partition(" ")
    big = element(
        "div", number.replace("-", "−"), element("span", f" {word}") if word else None, class_=f"big {kind}".strip()
    )
    drawing = bar(line.share, kind=kind) if line.share is not None else None
    both = " → ".join(one.replace(" ", "\u00a0") for one in (line.before, line.after)) if line.change else None
    remark = element("div", clip(line.remark, 120), class_="unit") if line.remark else None
    return element("div", element("dt", line.label), element("dd", big, drawing, both, remark))


def _passes(passes: Sequence[PassFacts]) -> Markup | None:
    if not passes:
        return None
    rows: list[Markup] = []
    for part, group in itertools.groupby(passes[:_NAMES], key=lambda one: one.part):
        rows.append(element("tr", element("td", _PARTS.get(part, part), colspan=4), class_="group"))
        for idle, neighbours in itertools.groupby(group, key=_idle):
            some = list(neighbours)
            rows += [_idle_row(some)] if idle else map(_pass_row, some)
    return section("What was done", table(("pass", ">changed", ">nodes", ">time"), rows))


def _idle(one: PassFacts) -> bool:
    return not one.changed and not one.notes and one.nodes_before == one.nodes_after


def _idle_row(passes: Sequence[PassFacts]) -> Markup:
    """Return one row for passes, one after another, that had nothing to do."""
    names = [piece for one in passes for piece in (", ", element("code", clip(one.name, 60)))][1:]
    return element(
        "tr",
        name_cell(*names),
        number("–", "changed"),
        number(f"{passes[0].nodes_after:,}", "nodes"),
        number(units.seconds_text(sum(one.seconds for one in passes)), "time"),
        class_="idle",
    )


def _pass_row(one: PassFacts) -> Markup:
    notes = ", ".join(dict.fromkeys(one.notes[:_NOTES]))
    told = element("span", clip(notes), class_="note") if notes else None
    nodes = (
        f"{one.nodes_after:,}"
        if one.nodes_before == one.nodes_after
        else f"{one.nodes_before:,} → {one.nodes_after:,}"
    )  # fmt: skip
    return row(
        name_cell(element("code", clip(one.name, 60)), told),
        number(f"{one.changed:,}" if one.changed else "–", "changed"),
        number(nodes, "nodes"),
        number(units.seconds_text(one.seconds), "time"),
    )


def _verification(manifest: Mapping[str, Any]) -> Markup | None:
    if not manifest.get("verification"):
        return None
    verification = Verification.from_json(manifest["verification"])
    rated = [one for one in verification.outputs if one.max_abs_error is not None or one.match is None]
    exact = [one for one in verification.outputs if one.match is not None]
    top1 = any(one.top1_agreement is not None for one in rated)
    columns = ("output", ">SQNR", ">cosine", ">max error", *((">same top-1",) if top1 else ()))
    parts: list[Child] = []
    if rated:
        parts.append(table(columns, (_output_row(one, top1=top1) for one in rated[:_OUTPUTS])))
    if exact:
        rows = (
            row(name_cell(element("code", clip(one.name))), number(_share(one.match), "equal"))
            for one in exact[:_OUTPUTS]
        )
        parts.append(table(("output of integers", ">equal"), rows))
    if len(rated) > _OUTPUTS or len(exact) > _OUTPUTS:
        parts.append(_cut(len(verification.outputs)))
    return section("Does it still behave?", *parts, _definitions())


def _output_row(one: OutputFigures, *, top1: bool) -> Markup:
    troubles = [one.remark] if one.remark else []
    if one.broken:
        troubles.append(f"{one.broken:,} values that are finite in the source are NaN or infinite here")
    elif one.excluded:
        troubles.append(f"{one.excluded:,} values are NaN or infinite on both sides and were left out")
    infinite = one.sqnr_db == float("inf")
    return row(
        name_cell(
            element("code", clip(one.name)),
            *(element("span", clip(text), class_="note wrong" if one.broken else "note") for text in troubles),
        ),
        number(units.decibels(None if infinite else one.sqnr_db, exact=infinite), "SQNR"),
        number("–" if one.cosine is None else f"{one.cosine:.5f}", "cosine"),
        number("–" if one.max_abs_error is None else f"{one.max_abs_error:.3g}", "max error"),
        *((number(_share(one.top1_agreement), "same top-1"),) if top1 else ()),
    )


def _share(value: float | None) -> str:
    return "–" if value is None else units.percent(value)


def _cut(total: int) -> Markup:
    return element("p", f"Not all of {total:,} are shown; manifest.json has them all.", class_="note")


def _definitions() -> Markup:
    terms = {
        "SQNR": "10 log₁₀ of the source's power over the power of the error, in decibels, over all samples together. "
        "20 dB is an error of 10 %, 40 dB of 1 %.",
        "cosine": "The cosine of the angle between all values of the source and all of the result.",
        "max error": "The largest difference of a single value.",
        "same top-1": "Share of samples whose largest score is of the same class in both.",
    }
    facts = [child for term, text in terms.items() for child in (element("dt", term), element("dd", text))]
    return element(
        "details",
        element("summary", element("span", "How these figures are defined", class_="note")),
        element("dl", *facts, class_="facts"),
    )


def _weights(weights: Mapping[str, Any] | None) -> Markup | None:
    """Return what the compressed weights hold and take, by scheme."""
    if not weights:
        return None
    schemes: dict[str, list[Mapping[str, Any]]] = {}
    for one in weights["tensors"]:
        schemes.setdefault(str(one["scheme"]), []).append(one)
    rows = [_weight_row(scheme, members) for scheme, members in sorted(schemes.items())[:_GROUPS]]
    total = _weight_row(f"all {len(weights['tensors'])}", weights["tensors"])
    columns = ["scheme", ">weights", ">parameters", ">bits each", ">bits stored", ">bytes"]
    text = "Bits each are those of integers, scales and zero points; stored ones may be wider, as kernels want them."
    return section("Compressed weights", table(columns, [*rows, total]), element("p", text, class_="note"))


def _weight_row(title: str, members: Sequence[Mapping[str, Any]]) -> Markup:
    parameters, bits, stored = (sum(one[key] for one in members) for key in ("parameters", "information_bits", "bytes"))
    return row(
        name_cell(element("code", clip(title, 60))),
        number(f"{len(members):,}", "weights"),
        number(units.count_text(parameters), "parameters"),
        number(f"{bits / parameters:.2f}", "bits each"),
        number(f"{8 * stored / parameters:.2f}", "bits stored"),
        number(units.bytes_text(stored), "bytes"),
    )


def _kernels(kernels: Mapping[str, Mapping[str, int]], stand_in: str = "") -> Markup | None:
    if not kernels:
        return None
    groups = [
        ("", "in integers", kernels["integer"]),
        ("", "reading weights of few bits", kernels.get("low_bit", {})),
        ("soft", "in float", kernels["float"]),
        ("rest", "other operators", kernels["other"]),
    ]
    facts = [
        child
        for kind, text, counts in groups
        if counts
        for child in (
            element("dt", f"{sum(counts.values()):,} {text}", class_=f"swatch {kind}".strip()),
            element("dd", _counted(counts)),
        )
    ]
    return section(
        "What really runs",
        split_bar([(kind, float(sum(counts.values()))) for kind, _, counts in groups]),
        element("dl", *facts, class_="facts"),
        element("p", _NOT_HERE if stand_in else _FUSED, class_="note"),
    )


def _counted(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = f" and {len(ordered) - _GROUPS} more operators" if len(ordered) > _GROUPS else ""
    return ", ".join(f"{count:,} {clip(op, 60)}" for op, count in ordered[:_GROUPS]) + rest


def _left_alone(manifest: Mapping[str, Any]) -> Markup | None:
    skipped = list(manifest.get("skipped", ()))
    floating = list((manifest.get("kernels") or {}).get("left_in_float", ()))
    if not skipped and not floating:
        return None
    parts: list[Child] = []
    if floating:
        parts += [element("h3", "Kernels that stay in float"), *_reasons(floating)]
    if skipped:
        parts += [element("h3", "Nodes that passes left alone") if floating else None, *_reasons(skipped)]
    return section("What was left alone, and why", *parts)


def _reasons(entries: Sequence[Mapping[str, str]]) -> list[Markup]:
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(str(entry["reason"]), []).append(str(entry["node"]))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    # The rarer reasons come first to their share: the longest list is the one that may be cut.
    left = _NAMES
    shown: dict[str, int] = {}
    for reason, nodes in reversed(ordered[:_GROUPS]):
        shown[reason] = min(len(nodes), left)
        left -= shown[reason]
    written = [_reason(reason, nodes, shown[reason]) for reason, nodes in ordered[:_GROUPS]]
    return [*written, *([_cut(len(ordered))] if len(ordered) > _GROUPS else [])]


def _reason(reason: str, nodes: Sequence[str], shown: int) -> Markup:
    names = [element("li", element("code", clip(node, 100))) for node in nodes[:shown]]
    return element(
        "details",
        element("summary", element("span", clip(reason)), element("span", f"{len(nodes):,}", class_="unit")),
        element("ul", *names, class_="names"),
        _cut(len(nodes)) if len(nodes) > shown else None,
    )


def _again(data: ReportData) -> Markup:
    manifest = data.manifest
    recipe = (
        element(
            "details",
            element("summary", element("span", "recipe.toml")),
            element("pre", element("code", clip(data.recipe, _RECIPE))),
        )
        if data.recipe
        else None
    )
    facts = {
        "source": f"{clip(str(manifest['source']['name']))}, {units.bytes_text(manifest['source']['bytes'])}",
        "its SHA-256": manifest["source"].get("sha256", ""),
        "seed": manifest.get("seed", 0),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
    }
    files = [
        row(
            name_cell(element("code", clip(name))),
            number(units.bytes_text(entry["bytes"]), "size"),
            element("td", element("code", str(entry["sha256"])), class_="hash"),
        )
        for name, entry in itertools.islice(manifest["files"].items(), _GROUPS)
    ]
    return section(
        "How to do it again",
        element("pre", element("code", data.command), class_="command") if data.command else None,
        element("p", "The same input, options and seed give the same files, byte for byte.", class_="note"),
        element("dl", *(one for key, value in facts.items() for one in _fact(key, value)), class_="facts"),
        table(("file", ">size", "SHA-256"), files, kind="files"),
        recipe,
    )


def _fact(key: str, value: Child) -> tuple[Markup, Markup]:
    shown = element("code", value) if "SHA" in key else value
    return element("dt", key), element("dd", shown)


def _footer(data: ReportData) -> Markup:
    machine = (data.bench or {}).get("machine")
    took = f"Compiled in {units.seconds_text(data.seconds)} by" if data.seconds is not None else "Compiled by"
    where = (
        f" Timed on {machine['cpu']}, {machine['cores']} cores, {machine['system']}, {machine['runtime']}."
        if machine
        else ""
    )
    return element("footer", f"{took} qgraph {data.manifest.get('qgraph', '')}.{where}")
