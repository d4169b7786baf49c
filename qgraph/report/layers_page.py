"""The page's sections on the inside of an artifact: errors, worst first and in order, and the worst tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from qgraph.report import units
from qgraph.report.charts import histogram, profile, split_bar
from qgraph.report.layers import LayerFacts, Picture, worst_first
from qgraph.report.markup import Child, Markup, clip, element
from qgraph.report.parts import name_cell, number, section, table
from qgraph.runtime.difference import TensorError

__all__ = ["layers_section", "pictures_section"]

_WORST = 12
_IN_ORDER = 400
_NOTES = 12
_EXACT_DB = 80.0
"""What is better is drawn at the top: an error that rounding in float32 makes too."""


def layers_section(facts: LayerFacts) -> Markup | None:
    """Return where the error arises: a profile over the depth, the worst tensors, and all in the order of the graph."""
    if not facts.tensors:
        why = element("p", *_with_code(facts.remark), class_="note") if facts.remark else None
        return section("Where the error arises", why) if why else None
    tensors = facts.tensors
    rated = [one.sqnr_db for one in tensors if one.sqnr_db is not None]
    parts: list[Child] = []
    if len(tensors) > 2 and rated:
        parts.append(_profile_figure(tensors, rated))
    broken = [one for one in tensors if one.broken]
    if broken:
        names = ", ".join(clip(one.name, 60) for one in broken[:_NOTES])
        parts.append(element("p", f"NaN or infinite values arise in {len(broken)} tensors: {names}.", class_="wrong"))
    worst = worst_first(tensors)
    largest = _relative(min(rated, default=0.0))
    if worst:
        parts += [element("h3", "Worst first"), _layer_table(worst[:_WORST], largest)]
        parts.append(_told(facts))
    elif rated:
        parts.append(_told(facts))
    else:
        parts.append(element("p", f"All of {len(tensors):,} tensors are equal in source and result.", class_="note"))
    if rated:
        parts.append(_in_order(tensors, largest))
    return section("Where the error arises", *parts)


def _with_code(text: str) -> list[Child]:
    """Return a remark in which what stands between backquotes is code."""
    pieces = clip(text, 400).split("`")
    return [element("code", piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def _told(facts: LayerFacts) -> Markup:
    samples = f"{facts.samples} sample{'s' * (facts.samples != 1)}"
    text = (
        f"Of {len(facts.tensors):,} tensors that source and result both have, on {samples}, those that add to the "
        "error rather than pass it on. The error is the amplitude of the difference over that of the source; the faint "
        "part of a bar was there already in what the node reads. "
    )
    return element("p", text, element("code", "qgraph diff"), " takes more samples.", class_="note")


def _profile_figure(tensors: Sequence[TensorError], rated: Sequence[float]) -> Markup:
    low = 10 * (min(rated) // 10)
    high = max(min(10 * -(-max(rated) // 10), _EXACT_DB), low + 10)
    values = [high if one.sqnr_db is None else one.sqnr_db for one in tensors]
    label = f"SQNR by depth: from {tensors[0].name} to {tensors[-1].name}, least {min(rated):.1f} dB"
    marks = (high, (high + low) / 2, low)
    axis = element("div", *(element("span", f"{at:.0f}", class_="unit") for at in marks), class_="axis")
    ends = element("span", "first layer"), element("span", "SQNR in dB"), element("span", "last layer")
    told = [f"{clip(one.name, 100)}\n{clip(one.op_type, 40)}, {_sqnr(one)}" for one in tensors]
    listed = _listed(tensors)
    links = [f"t{i}" if i in listed else "" for i in range(len(tensors))]
    drawing = profile(values, low, high, clip(label), told=told, links=links)
    return element("figure", axis, drawing, element("figcaption", *ends))


def _listed(tensors: Sequence[TensorError]) -> set[int]:
    """Return the places of the tensors in the list in order: all, or the worst of very many."""
    if len(tensors) <= _IN_ORDER:
        return set(range(len(tensors)))
    ordered = sorted(range(len(tensors)), key=lambda i: (not tensors[i].broken, _level(tensors[i]), i))
    return set(ordered[:_IN_ORDER])


def _level(one: TensorError) -> float:
    return math.inf if one.sqnr_db is None else one.sqnr_db


def _in_order(tensors: Sequence[TensorError], largest: float) -> Markup:
    listed = _listed(tensors)
    rest = "" if len(listed) == len(tensors) else f" the {len(listed):,} worst of"
    title = f"In the order of the graph:{rest} {'all ' * (not rest)}{len(tensors):,} tensors"
    rows = [_layer_row(one, largest, f"t{i}") for i, one in enumerate(tensors) if i in listed]
    columns = ("tensor", "", ">error", ">SQNR")
    return element("details", element("summary", element("span", title)), table(columns, rows, kind="layers"))


def _layer_table(tensors: Sequence[TensorError], largest: float) -> Markup:
    return table(("tensor", "", ">error", ">SQNR"), [_layer_row(one, largest) for one in tensors], kind="layers")


def _sqnr(one: TensorError) -> str:
    return f"{one.broken:,} values broken" if one.broken else units.decibels(one.sqnr_db, exact=one.exact)


def _relative(sqnr_db: float) -> float:
    return float(10 ** (-sqnr_db / 20))


def _layer_row(one: TensorError, largest: float, row_id: str | None = None) -> Markup:
    error = 0.0 if one.sqnr_db is None else _relative(one.sqnr_db)
    before = 0.0 if one.loss_db is None or one.sqnr_db is None else _relative(one.sqnr_db + one.loss_db)
    inherited = min(before, error)
    drawing = split_bar([("soft", inherited), ("", error - inherited), ("none", max(largest - error, 0.0))])
    return element(
        "tr",
        name_cell(element("code", clip(one.name, 80)), " ", element("span", clip(one.op_type, 40), class_="unit")),
        element("td", drawing, class_="drawn"),
        number("0 %" if one.exact else "–" if one.sqnr_db is None else _percents(error), "error"),
        number(_sqnr(one), "SQNR"),
        id=row_id,
    )


def _percents(error: float) -> str:
    return f"{100 * error:.0f} %" if error >= 0.995 else f"{100 * error:.1f} %" if error >= 0.01 else _share(error)


def pictures_section(facts: LayerFacts) -> Markup | None:
    """Return histograms of the worst tensors, and of the weights of their layers, with the chosen ranges."""
    if not facts.pictures:
        return None
    errors = {one.name: one for one in facts.tensors}
    blocks: list[Markup] = []
    for tensor, group in itertools.groupby(facts.pictures, key=lambda one: one.tensor):
        one = errors.get(tensor)
        told = f"{one.op_type}, {_sqnr(one)}" if one is not None else ""
        title = element("h3", element("code", clip(tensor, 100)), " ", element("span", clip(told, 80), class_="unit"))
        pictures = [_picture(picture) for picture in group]
        kind = "tensor" if len(pictures) > 1 else "tensor single"
        blocks.append(element("div", title, element("div", *pictures, class_="pair"), class_=kind))
    note = (
        "Bars are as high as the logarithm of the count, so that single outliers show. The shaded part is the range "
        "that the integers reach; what lies beyond it, drawn apart, is cut off. Weights are in steps of the scale of "
        "their own channel."
    )
    return section(
        "The worst tensors and their ranges",
        element("p", note, class_="note"),
        element("div", *blocks, class_="tensors"),
    )


def _picture(one: Picture) -> Markup:
    limits = None if one.range_low is None or one.range_high is None else (one.range_low, one.range_high)
    what = "activations" if one.kind == "activation" else "weight"
    name = element("code", clip(one.name, 80)) if one.kind == "weight" else None
    head = element("div", element("span", what), " ", name, class_="what")
    label = f"histogram of {one.name}: {_range_text(one)}"
    ends = element("span", _real(one.low)), element("span", _real(one.high))
    return element(
        "figure",
        head,
        histogram(one.counts, one.low, one.high, limits, clip(label, 200)),
        element("figcaption", *ends),
        element("p", *_caption(one), class_="unit"),
        class_="picture",
    )


def _caption(one: Picture) -> list[Child]:
    parts: list[Child] = [_range_text(one)]
    if one.beyond is not None and one.beyond > 0:
        parts += [", ", element("b", f"{_share(one.beyond)} cut off")]
    elif one.beyond is not None:
        parts.append(", nothing cut off")
    return parts


def _range_text(one: Picture) -> str:
    if one.range_low is None or one.range_high is None:
        return clip(one.remark, 120)
    reach = f"{clip(one.dtype, 20)}, {_real(one.range_low)} to {_real(one.range_high)}"
    if one.kind == "weight":
        scales = f"{one.channels:,} scales" if one.channels > 1 else f"one scale, {_real(one.scale or 0.0)}"
        steps = f"{reach} steps, {scales}"
        return f"{steps}, {clip(one.remark, 120)}" if one.remark else steps
    return f"{reach} in steps of {_real(one.scale or 0.0)}"


def _real(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _share(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 1e-4 else "below 0.01 %"
