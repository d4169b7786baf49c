"""Numbers as people read them: bytes, seconds, counts, ratios. Decimal units, three to four digits."""

from __future__ import annotations

__all__ = [
    "METRIC_NAMES",
    "bytes_text",
    "count_text",
    "decibels",
    "metric_text",
    "percent",
    "ratio_text",
    "seconds_text",
]

METRIC_NAMES = {
    "sqnr": "SQNR",
    "max_abs": "max error",
    "top1": "top-1 loss",
    "eval": "loss of --eval",
    "eval_share": "loss of --eval",
}


def bytes_text(count: float) -> str:
    """Return 90.8 MB, 512 kB or 17 B; units are powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    digits = 0 if unit == "B" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{digits}f} {unit}" if unit != "B" else f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """Return 4.93 ms, 35.0 us, 1.20 s or 2 min 5 s."""
    if seconds >= 99.95:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    scale, unit = (1.0, "s") if seconds >= 0.9995 else (1e3, "ms") if seconds >= 0.9995e-3 else (1e6, "us")
    value = seconds * scale
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def count_text(count: float) -> str:
    """Return 22.7 M, 1.24 G or, below 100,000, the number itself with thousands separated."""
    if count < 99_999.5:
        return f"{count:,.0f}"
    for unit in ("k", "M", "G", "T"):
        count /= 1000
        if count < 999.5 or unit == "T":
            break
    digits = 0 if count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {unit}"


def ratio_text(ratio: float) -> str:
    """Return 4.0x, 0.85x or 132x."""
    digits = 0 if ratio >= 99.5 else 1 if ratio >= 1.095 else 2
    return f"{ratio:.{digits}f}x"


def percent(fraction: float) -> str:
    """Return 98.33 %."""
    return f"{100 * fraction:.2f} %"


def decibels(value: float | None, *, exact: bool = False) -> str:
    """Return 31.2 dB, `exact` for equal outputs, or a dash where nothing is defined."""
    if exact:
        return "exact"
    return "–" if value is None else f"{value:.1f} dB"


def metric_text(metric: str, value: float) -> str:
    """Return a metric's value with its unit."""
    if metric in ("top1", "eval_share"):
        return percent(value)
    return decibels(value) if metric == "sqnr" else f"{value:.5g}"
