"""The candidates of a search, in the order in which they were tried: what the terminal and the pages show of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["Rung"]


@dataclasses.dataclass(frozen=True)
class Rung:
    """One candidate.

    Attributes:
        name: what it adds, in few words, such as "bias correction" or "3 layers in float".
        pipeline: its compress part, as text.
        figures: metric -> value on the verification data, higher or lower being better as the metric says.
        bytes: of the deployable files; None where it failed.
        seconds: median latency; None where it was not timed.
        speedup: of the source's latency in the same run over its own; None where it was not timed.
        met: whether all bounds are met.
        chosen: whether it became the artifact.
        remark: why it failed or was left out, or what it shows; '' where there is nothing to say.
    """

    name: str
    pipeline: str
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bytes: int | None = None
    seconds: float | None = None
    speedup: float | None = None
    met: bool = False
    chosen: bool = False
    remark: str = ""

    @property
    def state(self) -> str:
        """What became of it, in a word or two: one that was only tried has no figures, one that failed no files."""
        if self.met or self.figures:
            told = "met" if self.met else "not met"
            return told if not self.chosen else "chosen" if self.met else "chosen, not met"
        return "failed" if self.bytes is None else "tried"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "figures": dict(self.figures)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Rung:
        """Read what `to_json` wrote."""
        return cls(**{field.name: document[field.name] for field in dataclasses.fields(cls)})
