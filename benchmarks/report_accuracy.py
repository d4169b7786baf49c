"""What quantization costs in accuracy as a page: what must be reached, whether it is, and what every tool gave.

python benchmarks/report_accuracy.py accuracy.json        writes ACCURACY.md beside it
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Row", "chance", "render", "rows"]

REPEATABILITY = 0.02
"""Ratios of latencies repeat within this much."""
OURS = "qgraph"
LOST = {"int8": 0.5, "per-tensor": 1.5}
"""Points that may be lost."""
SENTENCES_LOST = 0.3
FASTER_ROUNDING = 50
DECIBELS = 20
SEARCH_TIMES = 10

_TITLES = {
    "int8": "8 bits, the default command",
    "per-tensor": "8 bits, one scale for a tensor",
    "w4a8": "4-bit weights, 8-bit activations",
    "minilm-static": "MiniLM with static ranges only",
    "signals": "Sound",
    "search": "Search for a tolerance",
}
_HOW = """\
Every tool gets the same calibration samples, none of which is evaluated. Lost is the float model's score less the \
tool's: points of top-1, or of AP50. "+-" is one standard error of that difference, from how many predictions changed: \
differences below it are chance, and a model that gains has not become better. A loss counts from zero upwards, so \
"no loss" is also as good as a peer that gains by chance. Peers run on the model as ONNX Runtime's documentation says \
to prepare it (batch norms folded, opset raised where it is old); where that fails, on the model as it is. Speed-up: \
over float, 2 threads, all models in turn in one process. AIMET simulates; its models are run as it exports them."""

Tools = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One thing to reach."""

    model: str
    measure: str
    peer: str
    bound: str
    ours: str
    verdict: str


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**not reached**"


def chance(one: Mapping[str, Any], samples: int) -> float | None:
    """Return one standard error of the points of top-1 that `one` lost, at most; None where it is not known.

    Only the samples whose predicted class changed can have been won or lost.
    """
    if "agreement" not in one:
        return None
    return 100 * math.sqrt(max(0.0, 1 - one["agreement"] / 100) / samples)


def rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """Yield what must be reached, part by part, as far as it was measured."""
    for part, models in results["parts"].items():
        for name, measured in models.items():
            tools: Tools = measured["tools"]
            if OURS not in tools:
                continue
            if failure := tools[OURS].get("failure"):
                yield Row(name, _TITLES[part], "", "compiles", failure, _verdict(reached=False))
                continue
            yield from _ROWS[part](name, measured)


def _loss_rows(bound: float | None) -> Callable[[str, Mapping[str, Any]], Iterator[Row]]:
    def make(name: str, measured: Mapping[str, Any]) -> Iterator[Row]:
        tools: Tools = measured["tools"]
        if tools["fp32"].get("score") is not None:
            yield _smallest_loss(name, measured, bound)
        else:
            yield _largest_sqnr(name, tools)
        if "speedup" in tools[OURS] and bound == LOST["int8"]:
            yield from _speed(name, tools)

    return make


def _smallest_loss(name: str, measured: Mapping[str, Any], bound: float | None) -> Row:
    tools: Tools = measured["tools"]
    lost = {tool: _lost(tools, tool) for tool in [*_peers(tools), OURS]}
    ours = lost.pop(OURS)
    best = min(lost, key=lambda tool: lost[tool]) if lost else None
    least = lost[best] if best else math.inf
    within = bound is None or round(ours, 2) <= bound
    reached = within and round(ours, 2) <= round(least, 2)
    verdict = "no loss" if within and not reached and ours <= 0 else _verdict(reached)
    limit = "least of all" if bound is None else f"least of all, <= {bound:g}"
    if best is None:
        verdict = "not compared" if within else _verdict(reached=False)
    peer = f"{best} {least:.2f}" if best else "none ran"
    measure = f"{measured['metric']} lost (fp32 {tools['fp32']['score']:.2f})"
    return Row(name, measure, peer, limit, f"{ours:.2f}{_spread(tools[OURS], measured)}", verdict)


def _largest_sqnr(name: str, tools: Tools) -> Row:
    peers = _peers(tools)
    best = max(peers, key=lambda tool: peers[tool]["sqnr_db"]) if peers else None
    bound = peers[best]["sqnr_db"] if best else -math.inf
    ours = tools[OURS]["sqnr_db"]
    peer = f"{best} {bound:.1f} dB" if best else "none ran"
    verdict = _verdict(ours >= bound) if best else "not compared"
    return Row(name, "SQNR", peer, "largest of all", f"{ours:.1f} dB", verdict)


def _speed(name: str, tools: Tools) -> Iterator[Row]:
    peers = {tool: one for tool, one in _peers(tools).items() if "speedup" in one}
    if not peers:
        return
    fastest = max(peers, key=lambda tool: peers[tool]["speedup"])
    bound, ours = peers[fastest]["speedup"], tools[OURS]["speedup"]
    peer = f"{fastest} {bound:.2f}x"
    reached = ours >= bound * (1 - REPEATABILITY)
    yield Row(name, "speed-up over fp32", peer, f">= {bound:.2f}x", f"{ours:.2f}x", _verdict(reached))


def _signal_row(name: str, measured: Mapping[str, Any]) -> Iterator[Row]:
    """Yield whether the outputs stay near, or the report says what stayed in float."""
    tools: Tools = measured["tools"]
    peers, ours = _peers(tools), tools[OURS]
    best = max(peers, key=lambda tool: peers[tool]["sqnr_db"]) if peers else None
    peer = f"{best} {peers[best]['sqnr_db']:.1f} dB" if best else "none ran"
    named = len(ours.get("float_nodes", []))
    text = f"{ours['sqnr_db']:.1f} dB" + (f", {named} float nodes named" if named else "")
    reached = ours["sqnr_db"] >= DECIBELS
    verdict = "reached" if reached else "**below**, float nodes named" if named else _verdict(reached)
    yield Row(name, "SQNR", peer, f">= {DECIBELS} dB or float nodes named", text, verdict)


def _int8_rows(name: str, measured: Mapping[str, Any]) -> Iterator[Row]:
    yield from _loss_rows(LOST["int8"] if measured["kind"] == "Classifier" else None)(name, measured)
    if measured["kind"] == "Detector":
        tools: Tools = measured["tools"]
        if "speedup" in tools[OURS]:
            yield from _speed(name, tools)
        yield from _signal_row(name, measured)


def _four_bit_rows(name: str, measured: Mapping[str, Any]) -> Iterator[Row]:
    tools: Tools = measured["tools"]
    yield _smallest_loss(name, measured, None)
    speeds = {tool: _rounding_speed(one) for tool, one in tools.items() if one.get("rounding")}
    ours, theirs = speeds.get(OURS), speeds.get("onnxsim-int4-adaround")
    if ours and theirs:
        times = ours / theirs
        peer = f"onnxsim {theirs / 1e6:.4f} M/s"
        verdict = _verdict(times >= FASTER_ROUNDING)
        yield Row(name, "parameters/s of rounding", peer, f">= {FASTER_ROUNDING} x", f"{times:.0f} x", verdict)


def _sentence_rows(name: str, measured: Mapping[str, Any]) -> Iterator[Row]:
    tools: Tools = measured["tools"]
    lost, peers = _lost(tools, OURS), _peers(tools)
    best = min(peers, key=lambda tool: _lost(tools, tool)) if peers else None
    peer = f"{best} {_lost(tools, best):.2f}" if best else "none ran"
    measure = f"{measured['metric']} lost (fp32 {tools['fp32']['score']:.2f})"
    yield Row(name, measure, peer, f"<= {SENTENCES_LOST}", f"{lost:.2f}", _verdict(round(lost, 2) <= SENTENCES_LOST))


def _search_rows(name: str, measured: Mapping[str, Any]) -> Iterator[Row]:
    tools: Tools = measured["tools"]
    ours, plain = tools[OURS], tools.get("qgraph-plain", {})
    met = ours.get("status") == 0
    lost = f"{_lost(tools, OURS):.2f}{_spread(ours, measured)} lost on the evaluation"
    yield Row(name, "top1=0.5% at W4A8", "", "met", f"{'met' if met else 'not met'}; {lost}", _verdict(met))
    if plain.get("seconds"):
        times = ours["seconds"] / plain["seconds"]
        verdict = _verdict(times <= SEARCH_TIMES)
        yield Row(name, "time of the search", "one plain compile", f"<= {SEARCH_TIMES} x", f"{times:.1f} x", verdict)
        sizes = f"{ours['size_mb']:.2f} MB, {plain['size_mb']:.2f} MB all in 4 bits, {tools['fp32']['size_mb']:.2f} MB"
        yield Row(name, "size", "", "told", sizes, "")


_ROWS: dict[str, Callable[[str, Mapping[str, Any]], Iterator[Row]]] = {
    "int8": _int8_rows,
    "per-tensor": lambda name, measured: _loss_rows(LOST["per-tensor"] if measured["kind"] == "Classifier" else None)(
        name, measured
    ),
    "w4a8": _four_bit_rows,
    "minilm-static": _sentence_rows,
    "signals": _signal_row,
    "search": _search_rows,
}


def _peers(tools: Tools) -> Tools:
    """Return the peers that have made a model of the kind that is compared."""
    others = {tool: one for tool, one in tools.items() if tool != "fp32" and not tool.startswith(OURS)}
    return {tool: one for tool, one in others.items() if not one["failure"] and not one.get("aside")}


def _lost(tools: Tools, tool: str) -> float:
    return float(tools["fp32"]["score"] - tools[tool]["score"])


def _spread(one: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    error = chance(one, measured["samples"])
    return "" if error is None else f" +- {error:.2f}"


def _rounding_speed(one: Mapping[str, Any]) -> float:
    return float(one["rounding"]["parameters"] / max(one["rounding"]["seconds"], 1e-9))


def render(results: Mapping[str, Any]) -> str:
    """Return the page, in Markdown; times only as ratios, since they mean nothing on another machine."""
    machine = results["machine"]
    packages = ", ".join(name for names in results["packages"].values() for name in names)
    lines = ["# What quantization costs in accuracy", ""]
    lines += [
        f"Made by `python benchmarks/accuracy.py`. {machine['processor']}, {machine['cores']} cores"
        + (" with int8 dot products" if machine["int8_dot_product"] else "")
        + f", {machine['system']}; Python {machine['python']}, onnxruntime {machine['onnxruntime']}, "
        f"onnx {machine['onnx']}, numpy {machine['numpy']}; {packages}.",
        "",
        _HOW,
        "",
        "## What must be reached",
        "",
        "| model | measure | best peer | must reach | qgraph | |",
        "|---|---|---|---|---|---|",
    ]
    for part, models in results["parts"].items():
        found = list(rows({**results, "parts": {part: models}}))
        if found:
            lines.append(f"| **{_TITLES[part]}** | | | | | |")
        lines += [
            f"| {row.model} | {row.measure} | {row.peer} | {row.bound} | {row.ours} | {row.verdict} |" for row in found
        ]
    lines += ["", "## Every tool", ""]
    for part, models in results["parts"].items():
        for name, measured in models.items():
            lines += [f"### {_TITLES[part]}: {name}", "", *_tool_table(measured)]
    return "\n".join(lines) + "\n"


def _tool_table(measured: Mapping[str, Any]) -> Iterator[str]:
    tools: Tools = measured["tools"]
    rounding = any(one.get("rounding") for one in tools.values())
    yield f"| tool | {measured['metric'] or 'score'} | as fp32 % | SQNR dB | speed-up | size MB | " + (
        "M parameters/s | remarks |" if rounding else "remarks |"
    )
    yield "|---" * (8 if rounding else 7) + "|"
    for tool, one in tools.items():
        cells = [
            tool,
            _cell(one.get("score"), "{:.2f}"),
            _cell(one.get("agreement"), "{:.1f}"),
            _cell(one.get("sqnr_db"), "{:.1f}"),
            _cell(one.get("speedup"), "{:.2f}x"),
            _cell(one.get("size_mb"), "{:.2f}"),
        ]
        if rounding:
            cells.append(_cell(_rounding_speed(one) / 1e6 if one.get("rounding") else None, "{:.4f}"))
        yield f"| {' | '.join([*cells, _remarks(one)])} |"
    yield ""


def _remarks(one: Mapping[str, Any]) -> str:
    failure = [f"**fails**: {one['failure']}"] if one.get("failure") else []
    pipeline = [f"`{one['pipeline']}`"] if one.get("pipeline") else []
    aside = [f"not compared: {one['aside']}"] if one.get("aside") else []
    return "; ".join(failure + pipeline + aside + list(one.get("remarks", []))).replace("|", "/").replace("\n", " ")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main() -> None:
    path = Path(sys.argv[1])
    path.with_name("ACCURACY.md").write_text(render(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
