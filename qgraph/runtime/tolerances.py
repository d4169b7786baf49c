"""What `--tolerance` and `--budget` bound, and how a bound is written."""

from __future__ import annotations

import math
import re

from qgraph.errors import UserError, nearest

__all__ = ["BUDGETS", "METRICS", "at_least", "bound_text", "known", "parse_budget", "parse_tolerance"]

METRICS = {
    "sqnr": "signal-to-quantization-noise ratio in dB, at least",
    "cosine": "cosine similarity, at least",
    "max_abs": "largest absolute error, at most",
    "top1": "loss of top-1 accuracy (of top-1 agreement when there are no labels), at most",
    "eval": "loss of what --eval returns, at most",
    "eval_share": "the same as a share of what --eval returns for the source, at most",
}
BUDGETS = {
    "size": "bytes of the deployable files, at most",
    "latency": "share of the source's latency, at most",
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def at_least(metric: str) -> bool:
    """Tell whether a bound on `metric` holds from below."""
    return metric in ("sqnr", "cosine")


def known(metric: str) -> None:
    """Raise a UserError, with the nearest name, for a metric that there is not."""
    if metric not in METRICS:
        written = [name for name in METRICS if name != "eval_share"]  # which is written eval=1%
        raise UserError(f"there is no tolerance '{metric}'.{nearest(metric, METRICS)} There are: {', '.join(written)}.")


def parse_tolerance(text: str) -> tuple[str, float]:
    """Read METRIC=VALUE, such as `sqnr=30`, `cosine=0.999`, `max_abs=0.1`, `top1=0.5%` or `top1=0.005`.

    `eval=0.01` bounds the loss itself, and `eval=1%` its share of what the source gets: the metric `eval_share`.

    Returns:
        The metric and its bound, percent turned into a fraction.

    Raises:
        UserError: the metric is unknown (the nearest is suggested), or the value is no number in its range.
    """
    metric, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UserError(f"--tolerance takes METRIC=VALUE, such as sqnr=30 or top1=0.5%, not '{text}'")
    metric = metric.lower().replace("-", "_")
    known(metric)
    percent = metric in ("top1", "eval") and value.endswith("%")
    try:
        bound = float(value.removesuffix("%") if percent else value) / (100 if percent else 1)
    except ValueError:
        raise UserError(f"tolerance {metric}: '{value}' is no number ({METRICS[metric]})") from None
    if not math.isfinite(bound):
        raise UserError(f"tolerance {metric}: '{value}' is no finite number")
    if metric == "cosine" and not -1 <= bound <= 1:
        raise UserError(f"tolerance cosine: {value} lies outside -1 to 1")
    if not at_least(metric) and bound < 0:
        raise UserError(f"tolerance {metric}: {value} is negative, but bounds a loss from above")
    if metric == "top1" and (bound > 1 or (bound == 1 and not percent)):
        hint = "" if percent else f"; for percent write top1={value}%"
        raise UserError(f"tolerance top1: {value} is no loss below 100%{hint}")
    return ("eval_share" if metric == "eval" and percent else metric), bound


def parse_budget(text: str) -> tuple[str, float]:
    """Read BUDGET=VALUE: `size=8MB`, `size=500KiB`, `latency=0.5x` or `latency=50%` of the source's.

    Returns:
        `size` and bytes, or `latency` and a share.

    Raises:
        UserError: there is no such budget (the nearest is suggested), or the value is none.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    name = name.lower()
    if not equals:
        raise UserError(f"--budget takes size=BYTES or latency=SHARE, such as size=8MB or latency=0.5x, not '{text}'")
    if name not in BUDGETS:
        raise UserError(f"there is no budget '{name}'.{nearest(name, BUDGETS)} There are: {', '.join(BUDGETS)}.")
    pattern = r"(\d+(?:\.\d+)?)\s*(ki|mi|gi|k|m|g|)b?" if name == "size" else r"(\d*\.?\d+)\s*(x|%)"
    match = re.fullmatch(pattern, value.lower())
    bound = 0.0
    if match and name == "size":
        bound = float(int(float(match[1]) * _UNITS[match[2]]))
    elif match:
        bound = float(match[1]) / (100 if match[2] == "%" else 1)
    if not bound > 0:
        example = "a size such as 8MB or 500KiB" if name == "size" else "a share such as 0.5x or 50%"
        raise UserError(f"budget {name}: '{value}' is not {example}")
    return name, bound


def bound_text(metric: str, bound: float) -> str:
    """Write a bound as the command line reads it."""
    if metric == "eval_share":
        return f"eval={100 * bound:g}%"
    return f"{metric}={bound:g}{'x' if metric == 'latency' else ''}"
