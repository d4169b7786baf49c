"""The metrics that `--tolerance` bounds, and how a bound is written."""

from __future__ import annotations

import math

from qgraph.errors import UserError, nearest

__all__ = ["METRICS", "known", "parse_tolerance"]

METRICS = {
    "sqnr": "signal-to-quantization-noise ratio in dB, at least",
    "cosine": "cosine similarity, at least",
    "max_abs": "largest absolute error, at most",
    "top1": "loss of top-1 accuracy (of top-1 agreement when there are no labels), at most",
}


def known(metric: str) -> None:
    """Raise a UserError, with the nearest name, for a metric that there is not."""
    if metric not in METRICS:
        raise UserError(f"there is no tolerance '{metric}'.{nearest(metric, METRICS)} There are: {', '.join(METRICS)}.")


def parse_tolerance(text: str) -> tuple[str, float]:
    """Read METRIC=VALUE, such as `sqnr=30`, `cosine=0.999`, `max_abs=0.1`, `top1=0.5%` or `top1=0.005`.

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
    percent = metric == "top1" and value.endswith("%")
    try:
        bound = float(value.removesuffix("%") if percent else value) / (100 if percent else 1)
    except ValueError:
        raise UserError(f"tolerance {metric}: '{value}' is no number ({METRICS[metric]})") from None
    if not math.isfinite(bound):
        raise UserError(f"tolerance {metric}: '{value}' is no finite number")
    if metric == "cosine" and not -1 <= bound <= 1:
        raise UserError(f"tolerance cosine: {value} lies outside -1 to 1")
    if metric in ("max_abs", "top1") and bound < 0:
        raise UserError(f"tolerance {metric}: {value} is negative, but bounds a loss from above")
    if metric == "top1" and (bound > 1 or (bound == 1 and not percent)):
        raise UserError(f"tolerance top1: {value} is no fraction below 1; for percent write top1={value}%")
    return metric, bound
