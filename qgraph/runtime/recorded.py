"""A session that runs once, however many results are compared with it on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qgraph.targets.base import Session

__all__ = ["Recorded", "replay"]


class Recorded:
    """Keeps the outputs of the first round over some samples, and gives them again in every round after it.

    Args:
        session: what runs.
        samples: number of feeds in a round; every round runs the same ones, in the same order, to its end or from its
            beginning again after `restart`.
        room: bytes of outputs to keep; where they need more, the session runs in every round.
    """

    def __init__(self, session: Session, samples: int, room: int) -> None:
        self.session = session
        self._samples = samples
        self._room = room
        self._kept: list[list[Any]] | None = []
        self._place = 0

    @property
    def outputs(self) -> list[list[Any]] | None:
        """What was recorded, one list a sample, once a whole round has run; else None."""
        return self._kept if self._kept is not None and len(self._kept) == self._samples else None

    def get_inputs(self) -> list[Any]:
        """Return the inputs as the session describes them."""
        return list(self.session.get_inputs())  # type: ignore[attr-defined]

    def get_outputs(self) -> list[Any]:
        """Return the outputs as the session describes them."""
        return list(self.session.get_outputs())  # type: ignore[attr-defined]

    def keep(self, outputs: list[list[Any]]) -> None:
        """Take outputs as recorded, whatever room they need."""
        self._kept = outputs

    def restart(self) -> None:
        """Begin a round."""
        self._place = 0

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        """Return all outputs for the next sample of the round."""
        if output_names is not None:
            return self.session.run(output_names, feeds)
        place, self._place = self._place, (self._place + 1) % self._samples
        if self._kept is None or place > len(self._kept):
            return self.session.run(None, feeds)
        if place == len(self._kept):
            outputs = self.session.run(None, feeds)
            self._room -= sum(_bytes(one) for one in outputs)
            self._kept.append(outputs)
            if self._room < 0:
                self._kept = None
            return outputs
        return self._kept[place]


def _bytes(value: Any) -> int:
    return int(value.nbytes) if isinstance(value, np.ndarray) else 1 << 10


def replay(names: Sequence[str], outputs: list[list[Any]]) -> Recorded:
    """Return a session that gives these outputs, one list a sample, in every round."""
    recorded = Recorded(_Nothing([_Output(name) for name in names]), len(outputs), 0)
    recorded.keep(outputs)
    return recorded


class _Output(NamedTuple):
    name: str


class _Nothing:
    """A session of which everything has been recorded."""

    def __init__(self, outputs: list[_Output]) -> None:
        self._outputs = outputs

    def get_outputs(self) -> list[_Output]:
        return self._outputs

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        del output_names, feeds
        raise AssertionError("every output is recorded")
