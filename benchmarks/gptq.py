"""GPTQ of one layer against the published loop in torch: seconds, parameters per second, and the layer's output error.

    python benchmarks/gptq.py [--sizes 2048,4096] [--bits 4] [--group 128] [--runs 3] [--threads 2] [-o gptq.json]

Both get the same weight and the same Hessian, run in turn in this process, and may use the same number of threads.
Needs torch (pip install torch==2.13.0), which qgraph itself does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timing

from qgraph.numerics.gptq import gptq, output_error
from qgraph.numerics.weights import QuantizedWeight, WeightScheme, quantize_weight

__all__: list[str] = []

PAUSE = 0.5
"""Seconds before a run, in which the threads of the one before stop spinning."""


def problem(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight [size, size] and a Hessian with a spectrum that decays as a power, and some large inputs."""
    rng = np.random.default_rng(seed)
    rank = size // 4
    mixing = rng.standard_normal((rank, size), dtype=np.float32) * np.float32(rank**-0.5)
    decay = (np.arange(1, rank + 1) ** -0.7).astype(np.float32)
    samples = (rng.standard_normal((2 * size, rank), dtype=np.float32) * decay) @ mixing
    samples += 0.02 * rng.standard_normal(samples.shape, dtype=np.float32)
    samples *= np.exp(0.5 * rng.standard_normal(size, dtype=np.float32))
    samples[:, rng.choice(size, max(1, size // 200), replace=False)] *= 20
    weight = rng.standard_normal((size, size), dtype=np.float32) * 0.02
    return weight, (samples.T @ samples) * (2 / len(samples))


def published(
    weight: np.ndarray, hessian: np.ndarray, bits: int, group: int, *, order: bool, static: bool, damping: float = 0.01
) -> np.ndarray:
    """Round by the loop of Frantar et al. 2022, algorithm 1, in torch as it is commonly run; return real numbers."""
    import torch

    rest, h = torch.tensor(weight), torch.tensor(hessian)
    top, block = 2**bits - 1, 128
    count = h.shape[0]

    def parameters(part: Any) -> tuple[Any, Any]:
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        empty = (low == 0) & (high == 0)
        low[empty], high[empty] = -1, 1
        scale = (high - low) / top
        return scale[:, None], torch.round(-low / scale)[:, None]

    def rounded(column: Any, scale: Any, zero: Any) -> Any:
        return scale * (torch.clamp(torch.round(column / scale) + zero, 0, top) - zero)

    dead = torch.diag(h) == 0
    h[dead, dead] = 1
    rest[:, dead] = 0
    fixed = [parameters(rest[:, start : start + group]) for start in range(0, count, group)] if static else []
    sequence = torch.argsort(torch.diag(h), descending=True) if order else torch.arange(count)
    if order:
        rest, h = rest[:, sequence], h[sequence][:, sequence]
    index = torch.arange(count)
    h[index, index] += damping * torch.mean(torch.diag(h))
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    inverse = torch.linalg.cholesky(h, upper=True)
    result = torch.zeros_like(rest)
    scale = zero = None
    for first in range(0, count, block):
        last = min(first + block, count)
        part = rest[:, first:last].clone()
        chosen, errors = torch.zeros_like(part), torch.zeros_like(part)
        square = inverse[first:last, first:last]
        for column in range(last - first):
            if static:
                scale, zero = fixed[int(sequence[first + column]) // group]
            elif (first + column) % group == 0:
                scale, zero = parameters(rest[:, first + column : first + column + group])
            value = rounded(part[:, column : column + 1], scale, zero).flatten()
            chosen[:, column] = value
            error = (part[:, column] - value) / square[column, column]
            part[:, column:] -= error[:, None].matmul(square[column, column:][None])
            errors[:, column] = error
        result[:, first:last] = chosen
        rest[:, last:] -= errors.matmul(inverse[first:last, last:])
    return np.asarray((result[:, torch.argsort(sequence)] if order else result).numpy())


def contenders(
    weight: np.ndarray, hessian: np.ndarray, scheme: WeightScheme
) -> dict[str, Callable[[], np.ndarray | QuantizedWeight]]:
    """Return what is measured: name -> function that returns the layer's approximation."""

    def ours(**options: Any) -> Callable[[], np.ndarray | QuantizedWeight]:
        return lambda: gptq(weight, hessian, scheme, **options).quantized

    def reference(**options: bool) -> Callable[[], np.ndarray | QuantizedWeight]:
        return lambda: published(weight, hessian, scheme.bits, scheme.group, **options)

    return {
        "round to nearest": lambda: quantize_weight(weight, scheme, method="minmax"),
        "published": reference(order=False, static=False),
        "qgraph, order none, plain": ours(order="none", clip="minmax", refine=0),
        "published, activation order": reference(order=True, static=False),
        "published, activation order, static groups": reference(order=True, static=True),
        "qgraph, plain": ours(clip="minmax", refine=0),
        "qgraph, refine 0": ours(refine=0),
        "qgraph": ours(),
        "qgraph, refine 3": ours(refine=3),
    }


PEERS = {
    "qgraph, order none, plain": "published",
    "qgraph, plain": "published, activation order, static groups",
    "qgraph, refine 0": "published, activation order, static groups",
    "qgraph": "published, activation order, static groups",
    "qgraph, refine 3": "published, activation order, static groups",
}
"""What each of ours is compared with: the same order, and groups that need no index of their inputs."""


def measure(size: int, scheme: WeightScheme, runs: int) -> dict[str, Any]:
    """Return the figures of all contenders on one layer."""
    weight, hessian = problem(size)
    scale = output_error(weight, np.zeros_like(weight), hessian)
    functions = contenders(weight, hessian, scheme)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    errors: dict[str, float] = {}
    for _ in range(runs):
        for name, function in functions.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            result = function()
            seconds[name].append(time.perf_counter() - start)
            if name not in errors:
                real = result.dequantize() if isinstance(result, QuantizedWeight) else result
                errors[name] = output_error(weight, real, hessian) / scale
    figures: dict[str, Any] = {
        name: {
            "seconds": statistics.median(taken),
            "all_seconds": taken,
            "parameters_per_second": weight.size / statistics.median(taken),
            "relative_output_error": errors[name],
        }
        for name, taken in seconds.items()
    }
    for name, peer in PEERS.items():
        figures[name] |= {
            "peer": peer,
            "speedup": figures[peer]["seconds"] / figures[name]["seconds"],
            "error_ratio": errors[name] / errors[peer],
        }
    return figures


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description="GPTQ of one layer against the published loop in torch.")
    parser.add_argument("--sizes", default="2048,4096", help="inputs (and outputs) of the layers [default: 2048,4096]")
    parser.add_argument("--bits", type=int, default=4, help="[default: 4]")
    parser.add_argument("--group", type=int, default=128, help="[default: 128]")
    parser.add_argument("--runs", type=int, default=3, help="medians are over these [default: 3]")
    parser.add_argument("--threads", type=int, default=timing.THREADS, help=f"[default: {timing.THREADS}]")
    parser.add_argument("-o", "--output", type=Path, default=Path("gptq.json"), help="[default: gptq.json]")
    arguments = parser.parse_args()
    limits = {name: str(arguments.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    if not limits.items() <= os.environ.items():
        # Read when the libraries are loaded, which has happened.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)
    try:
        import torch
    except ImportError:
        print("the published loop needs torch: pip install torch==2.13.0", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    scheme = WeightScheme(bits=arguments.bits, group=arguments.group)
    layers = {}
    for size in (int(text) for text in arguments.sizes.split(",")):
        layers[str(size)] = figures = measure(size, scheme, arguments.runs)
        print(f"{size} x {size}, {scheme.bits} bits, group {scheme.group}, threads: {arguments.threads}")
        for name, one in figures.items():
            ratio = f"{one['speedup']:5.2f} x, error x {one['error_ratio']:.3f}" if "peer" in one else ""
            speed = one["parameters_per_second"] / 1e6
            print(
                f"  {name:44s} {one['seconds']:7.3f} s {speed:6.1f} M/s  "
                f"error {one['relative_output_error']:.3e}  {ratio}"
            )
    settings = {"bits": scheme.bits, "group": scheme.group, "threads": arguments.threads, "runs": arguments.runs}
    report = {"machine": timing.machine() | {"torch": torch.__version__}, "settings": settings, "layers": layers}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
