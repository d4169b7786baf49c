"""The results as a page: what must be reached, whether it is, and what every tool gave.

python benchmarks/report.py RESULTS.json        writes RESULTS.md beside it, and its first table into the README
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Row", "render", "rows", "with_results"]

REPEATABILITY = 0.02
"""Ratios of latencies repeat within this much, so that one which misses its bound by less may as well meet it."""

_HOW = """\
Latency: 2 threads, spinning off, all sessions of a model in turn in one process, the least of three runs for a feed, \
the median over feeds; a speed-up is the ratio of medians and repeats within 2 %, which the verdicts allow for. \
Compile time and peak resident memory: each tool as a process of its own, from the same files; ours includes \
verification and the report, the peer's leaves out its preprocessing. Calibration and evaluation share no sample. \
"As fp32" is the share of samples with the same top-1 as the float model."""

_README = Path(__file__).resolve().parent.parent / "README.md"
_README_START, _README_END = "<!-- results -->", "<!-- end of results -->"

Tools = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One thing to reach."""

    model: str
    measure: str
    peer: str
    bound: str
    ours: str
    reached: bool


def rows(results: dict[str, Any]) -> Iterator[Row]:
    """Yield what must be reached, model by model, as far as it was measured."""
    for name, measured in results["models"].items():
        tools: Tools = measured["tools"]
        if "qgraph" not in tools:
            continue
        if tools["qgraph"]["failure"]:
            yield Row(name, "compiles", "", "yes", tools["qgraph"]["failure"], reached=False)
            continue
        if measured["kind"] == "Sentences":
            yield from _sentence_rows(name, tools)
        elif measured["kind"] == "Classifier":
            yield from _classifier_rows(name, tools)
        yield from _cost_rows(name, tools)


def _sentence_rows(name: str, tools: Tools) -> Iterator[Row]:
    ours, exact = tools["qgraph"], tools["fp32"]["score"]
    peers = _peers(tools)
    least = _best(peers, "score", max)
    peer = f"{least} loses {exact - peers[least]['score']:.2f}" if least else "none ran"
    loss = exact - ours["score"]
    yield Row(name, "loss of Spearman x100", peer, "<= 0.15", f"{loss:.2f}", reached=loss <= 0.15)
    peer = _named(peers, _best(peers, "size_mb", min), "size_mb", "{:.1f} MB")
    yield Row(name, "file", peer, "<= 24 MB", f"{ours['size_mb']:.1f} MB", reached=ours["size_mb"] <= 24)
    fastest = _best(peers, "speedup", max)
    base = peers[fastest]["speedup"] if fastest else 1.0
    ratio = ours["speedup"] / base
    yield Row(
        name,
        "speed-up over fp32",
        _named(peers, fastest, "speedup", "{:.2f}x"),
        f">= {1.2 * base:.2f}x (1.2 x best)",
        f"{ours['speedup']:.2f}x ({ratio:.2f} x best)",
        reached=ratio >= 1.2 * (1 - REPEATABILITY),
    )


def _classifier_rows(name: str, tools: Tools) -> Iterator[Row]:
    ours, exact = tools["qgraph"], tools["fp32"]["score"]
    static = {tool: one for tool, one in _peers(tools).items() if tool.startswith("ort-static")}
    measure = f"top-1 % (fp32 {exact:.2f})"
    best, fastest = _best(static, "score", max), _best(static, "speedup", max)
    if best is None or fastest is None:
        yield Row(name, measure, "none ran", "no collapse", f"{ours['score']:.2f}", reached=ours["score"] >= exact - 1)
        return
    bound = static[best]["score"]
    peer = _named(static, best, "score", "{:.2f}")
    yield Row(name, measure, peer, f">= {bound:.2f}", f"{ours['score']:.2f}", reached=ours["score"] >= bound - 1e-9)
    bound = static[fastest]["speedup"]
    yield Row(
        name,
        "speed-up over fp32",
        _named(static, fastest, "speedup", "{:.2f}x"),
        f">= {bound:.2f}x",
        f"{ours['speedup']:.2f}x",
        reached=ours["speedup"] >= bound * (1 - REPEATABILITY),
    )


def _cost_rows(name: str, tools: Tools) -> Iterator[Row]:
    """Compare with the cheapest of the peer's methods, min-max, and in words with the dearest."""
    ours = tools["qgraph"]
    static = {tool: one for tool, one in _peers(tools).items() if tool.startswith("ort-static")}
    if "ort-static-minmax" not in static:
        return
    for measure, key, bound in (("compile time", "seconds", 1.0), ("peak memory", "peak_mib", 0.5)):
        ratios = {tool: ours[key] / one[key] for tool, one in static.items()}
        ratio = ratios["ort-static-minmax"]
        least = min(ratios, key=lambda tool: ratios[tool])
        other = f" ({ratios[least]:.2f} x {least})" if len(static) > 1 else ""
        yield Row(
            name, measure, "ort-static-minmax", f"<= {bound:g} x", f"{ratio:.2f} x{other}", reached=ratio <= bound
        )


def _peers(tools: Tools) -> Tools:
    return {tool: one for tool, one in tools.items() if tool not in ("fp32", "qgraph") and not one["failure"]}


def _best(tools: Tools, key: str, choose: Callable[..., str]) -> str | None:
    return choose(tools, key=lambda tool: tools[tool][key]) if tools else None


def _named(tools: Tools, tool: str | None, key: str, form: str) -> str:
    return f"{tool} {form.format(tools[tool][key])}" if tool else "none ran"


def render(results: dict[str, Any]) -> str:
    """Return the page, in Markdown; times only as ratios, since they mean nothing on another machine."""
    machine, imports = results["machine"], results["imports_mib"]
    lines = ["# qgraph against its peers", ""]
    lines += [
        "Made by `make bench`. "
        + ("A quick run: fewer feeds, tools and models. " if results["quick"] else "")
        + f"{machine['processor']}, {machine['cores']} cores"
        + (" with int8 dot products" if machine["int8_dot_product"] else "")
        + f", {machine['system']}; Python {machine['python']}, onnxruntime {machine['onnxruntime']}, "
        f"onnx {machine['onnx']}, onnx-ir {machine['onnx-ir']}, numpy {machine['numpy']}.",
        "",
        _HOW,
        "",
        f"Imports alone are {imports['ort-static']:.0f} MiB (the peer's) and {imports['qgraph']:.0f} MiB (ours).",
        "",
        "## What must be reached",
        "",
        "| model | measure | best peer | must reach | qgraph | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows(results):
        verdict = "reached" if row.reached else "**not reached**"
        lines.append(f"| {row.model} | {row.measure} | {row.peer} | {row.bound} | {row.ours} | {verdict} |")
    lines += ["", "## Every tool", ""]
    for name, measured in results["models"].items():
        lines += [f"### {name}", ""]
        lines += _tool_table(measured)
    return "\n".join(lines) + "\n"


def _tool_table(measured: dict[str, Any]) -> Iterator[str]:
    tools: Tools = measured["tools"]
    anchor = tools.get("ort-static-minmax", {})
    metric = measured["metric"] or "score"
    yield f"| tool | {metric} | as fp32 % | SQNR dB | speed-up | size MB | time | memory | remarks |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for tool, one in tools.items():
        cells = [
            tool,
            _cell(one.get("score"), "{:.2f}"),
            _cell(one.get("agreement"), "{:.1f}"),
            _cell(one.get("sqnr_db"), "{:.1f}"),
            _cell(one.get("speedup"), "{:.2f}x"),
            _cell(one.get("size_mb"), "{:.2f}"),
            _ratio(one.get("seconds"), anchor.get("seconds")),
            _ratio(one.get("peak_mib"), anchor.get("peak_mib")),
            _remarks(one),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _remarks(one: dict[str, Any]) -> str:
    failure = [f"**fails**: {one['failure']}"] if one["failure"] else []
    return "; ".join(failure + one.get("remarks", [])).replace("|", "/")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _ratio(value: float | None, anchor: float | None) -> str:
    return f"{value / anchor:.2f} x" if value is not None and anchor else ""


def with_results(readme: str, page: str) -> str:
    """Return the README with the page's first table between its markers."""
    before, start, rest = readme.partition(_README_START)
    _, end, after = rest.partition(_README_END)
    table = page.partition("## What must be reached\n")[2].partition("\n## ")[0].strip()
    return f"{before}{start}\n{table}\n{end}{after}"


def main() -> None:
    path = Path(sys.argv[1])
    page = render(json.loads(path.read_text()))
    path.with_name("RESULTS.md").write_text(page)
    _README.write_text(with_results(_README.read_text(), page))


if __name__ == "__main__":
    main()
