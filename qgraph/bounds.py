"""What the user wants of a result: how near to the source, how small, how fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from qgraph.report.units import bytes_text

__all__ = ["Bounds", "bytes_of"]


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What the user wants.

    Attributes:
        tolerance: metric -> bound, as in `qgraph.runtime.tolerances.METRICS`.
        budget: `size` -> bytes, `latency` -> share of the source's.
    """

    tolerance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tolerance or self.budget)

    def over_budget(self, size: int, speedup: float | None, *, noise: float = 1.0) -> list[str]:
        """Return which budgets a result breaks, one line each.

        Args:
            size: bytes of its files.
            speedup: of the source's latency over its own; None where it cannot be timed.
            noise: how many times longer than the budget says it may take, since timings do not repeat.
        """
        failures = []
        if "size" in self.budget and size > self.budget["size"]:
            failures.append(f"{bytes_text(size)} are more than the budget of {bytes_text(int(self.budget['size']))}")
        if "latency" in self.budget and speedup is None:
            failures.append("latency cannot be measured here, so its budget proves nothing")
        elif "latency" in self.budget and speedup is not None and 1 / speedup > noise * self.budget["latency"]:
            failures.append(f"it takes {1 / speedup:.2f} of the source's time, more than {self.budget['latency']:g}x")
        return failures


def bytes_of(folder: Path) -> int:
    """Return the bytes of the deployable files in a folder that holds nothing else."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
