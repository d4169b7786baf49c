"""Changes of a compress part, as the steps of a ladder write them (see `qgraph.targets.base.Step`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qgraph import spec
from qgraph.pipeline import Pass, Pipeline
from qgraph.plan import override

__all__ = ["before_loss", "changed", "keep_precise", "pattern", "quantizes", "way_name"]

_WEIGHT_QUANTIZERS = frozenset({"adaround", "dynamic-int8", "gptq", "hqq", "qdq", "rtn"})
_ROUNDING = frozenset({"adaround", "gptq"})
"""Ways to round the same weights: one takes the place of another."""
_MIXED = "mixed-precision"


def changed(pipeline: Pipeline, way: str) -> Pipeline | None:
    """Return the pipeline after the change `way`, or None where it has no such place or is the same afterwards.

    Raises:
        UserError: the change names an unknown pass or option.
    """
    for mark, behind in ((" < ", 0), (" > ", 1)):
        if mark in way:
            text, _, anchor = way.rpartition(mark)
            (one,) = Pipeline.parse(text)
            found = _put(pipeline, one, anchor.strip(), behind)
            break
    else:
        name, option, value = spec.parse_setting(way)
        present = any(one.name == name for one in pipeline)
        found = override(pipeline, [(name, option, value)]) if present else None
    return None if found == pipeline else found


def _put(pipeline: Pipeline, one: Pass, anchor: str, behind: int) -> Pipeline | None:
    names = [other.name for other in pipeline]
    instead = [place for place, name in enumerate(names) if name == one.name or {name, one.name} <= _ROUNDING]
    if instead:
        return Pipeline([*pipeline.passes[: instead[0]], one, *pipeline.passes[instead[0] + 1 :]])
    if anchor not in names:
        return None
    place = names.index(anchor) + behind
    if not behind and one.name not in _ROUNDING:
        # What keeps the values stands before the first pass that loses something.
        place = next((early for early in range(place) if names[early] in _WEIGHT_QUANTIZERS), place)
    return Pipeline([*pipeline.passes[:place], one, *pipeline.passes[place:]])


def way_name(step: str, way: str, ways: Sequence[str]) -> str:
    """Return what a step's way is called in the ladder."""
    if len(ways) == 1:
        return step
    for mark in (" < ", " > "):
        if mark in way:
            return f"{step}: {_short(way.rpartition(mark)[0], ways)}"
    return f"{step}: {way.partition('=')[2]}"


def _short(text: str, ways: Sequence[str]) -> str:
    name, brace, options = text.partition("{")
    alone = sum(way.startswith((f"{name}{{", f"{name} ")) for way in ways) == 1
    return name if alone or not brace else options.rstrip("}").rpartition("=")[2]


def quantizes(pipeline: Pipeline) -> bool:
    """Tell whether there is a pass that marks for a higher precision can hold back."""
    return any(one.name in _WEIGHT_QUANTIZERS for one in pipeline)


def before_loss(pipeline: Pipeline) -> Pipeline:
    """Return the passes that stand before the first quantizer."""
    place = next((number for number, one in enumerate(pipeline) if one.name in _WEIGHT_QUANTIZERS), len(pipeline))
    return Pipeline(pipeline.passes[:place])


def keep_precise(pipeline: Pipeline, nodes: Collection[str], to: str) -> Pipeline:
    """Return the pipeline with `nodes` at a higher precision: `float`, or `int8` for weights of 8 bits."""
    (one,) = Pipeline.from_specs([spec.Spec(_MIXED, {"nodes": [pattern(node) for node in nodes], "to": to})])
    place = len(before_loss(pipeline))
    return Pipeline([*pipeline.passes[:place], one, *pipeline.passes[place:]])


def pattern(node: str) -> str:
    """Return the pattern that matches just this name."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in node)
