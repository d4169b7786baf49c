"""The results on low-bit weights as a page.

python benchmarks/report_low_bit.py FOLDER      reads rtn.json, gptq.json, language.json and decode.json there, as far
                                                as they are there, and writes LOW_BIT.md beside this file
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timing

__all__ = ["render"]

_PAGE = Path(__file__).resolve().with_name("LOW_BIT.md")

Figures = dict[str, Any]


def render(found: dict[str, Figures]) -> str:
    """Return the page, in Markdown.

    Args:
        found: by name ("rtn", "gptq", "language", "decode"), what the benchmarks wrote; any may be missing.
    """
    machine = timing.machine()
    where = (
        f"{machine['processor']}, {machine['cores']} cores, two threads; onnxruntime {machine['onnxruntime']}, numpy "
        f"{machine['numpy']}. Each table comes from one run; only its ratios mean something elsewhere."
    )
    lines = ["# Low-bit weights against the peers", "", where, ""]
    parts: dict[str, Callable[[Figures], Iterator[str]]] = {
        "language": _language,
        "rtn": _rtn,
        "gptq": _gptq,
        "decode": _decode,
    }
    for name, part in parts.items():
        if name in found:
            lines += [*part(found[name]), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _language(results: Figures) -> Iterator[str]:
    yield "## What language models lose"
    yield ""
    yield (
        f"`benchmarks/language.py`: nats per token above float32, in groups of {results['group']}, the same layers for "
        "every method, and in brackets how much of what ONNX Runtime's rounding to nearest loses is not lost."
    )
    for name, model in results["models"].items():
        widths = list(model["bits"])
        methods = list(dict.fromkeys(method for rows in model["bits"].values() for method in rows))
        yield ""
        yield f"{name}, float32 {model['fp32']:.4f}:"
        yield ""
        yield f"| method | {' | '.join(f'{bits} bits' for bits in widths)} |"
        yield f"|---|{'---|' * len(widths)}"
        for method in methods:
            yield f"| {method} | {' | '.join(_lost(model['bits'][bits], method) for bits in widths)} |"


def _lost(rows: Figures, method: str) -> str:
    lost, anchor = rows.get(method, {}).get("lost"), rows.get("ort-rtn", {}).get("lost")
    if lost is None:
        return "does not run" if method in rows else ""
    recovered = "" if not anchor or method == "ort-rtn" else f" ({1 - lost / anchor:.0%})"
    return f"{lost:+.4f}{recovered}"


def _rtn(results: Figures) -> Iterator[str]:
    yield "## Rounding to nearest: 4 bits, groups of 32, of MatMuls of 4096 x 4096"
    yield ""
    yield (
        "`benchmarks/rtn.py`: load, quantize and save, each tool as a process of its own; `compile` also verifies the "
        "result and writes its report."
    )
    yield ""
    yield "| tool | layers | against the peer | peak MiB | relative squared error |"
    yield "|---|---|---|---|---|"
    for row in results["rows"]:
        faster = f"{row['times_faster']:.2f}x as fast" if "times_faster" in row else ""
        error = "" if row.get("relative_error") is None else f"{row['relative_error']:.5f}"
        yield f"| {row['tool']} | {row['layers']} | {faster} | {row.get('peak_mib', '')} | {error} |"


def _gptq(results: Figures) -> Iterator[str]:
    settings = results["settings"]
    yield f"## GPTQ of one layer: {settings['bits']} bits, groups of {settings['group']}"
    yield ""
    yield (
        f"`benchmarks/gptq.py`: the published loop in torch {results['machine'].get('torch', '')} and ours on the same "
        f"Hessian, {settings['threads']} threads, medians of {settings['runs']} runs by turns."
    )
    yield ""
    yield "| layer | method | M parameters/s | against | times as fast | output error against it |"
    yield "|---|---|---|---|---|---|"
    for size, methods in results["layers"].items():
        for name, one in methods.items():
            speed = f"{one['parameters_per_second'] / 1e6:.1f}"
            against = [one["peer"], f"{one['speedup']:.2f}", f"{one['error_ratio']:.3f}"] if "peer" in one else [""] * 3
            yield f"| {size} x {size} | {name} | {speed} | {' | '.join(against)} |"


def _decode(results: Figures) -> Iterator[str]:
    settings = results["settings"]
    yield f"## Decoding with a cache, one token at a time: hidden {settings['hidden']}, {settings['layers']} layers"
    yield ""
    yield "`benchmarks/decode.py`: in turn, spinning off."
    yield ""
    yield "| model | times float32 | MB |"
    yield "|---|---|---|"
    for name, one in results["decode"].items():
        yield f"| {name} | {one['times_float']:.2f} | {one['bytes'] / 1e6:.0f} |"


def main() -> None:
    folder = Path(sys.argv[1])
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    _PAGE.write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main()
