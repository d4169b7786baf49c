"""Beginnings of pipelines that candidates of a search have in common with other compilations of the model.

    prepared -- align-channels -- qdq              a compilation, or the first candidate of a search
             `- equalize -- qdq -- adaround        another candidate, or a compilation with the recipe of the search

A search takes up a model behind passes that somebody has run, and leaves its own for others, under the keys of
`qgraph.sharing`. What candidates have found out for one another (ranges that were taken with other tensors) is no part
of it: what is kept is to the byte what the passes make on their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from qgraph.pipeline import Context, Pass, Report
from qgraph.sharing import Line, Sharing, keys_behind
from qgraph.stored_states import State

__all__ = ["Beginning"]


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A model that pipelines begin with.

    Attributes:
        sharing: where states are found and kept.
        key: of the model.
        reports: of the passes up to it.
    """

    sharing: Sharing
    key: str
    reports: tuple[Report, ...]

    @classmethod
    def of(cls, line: Line) -> Beginning | None:
        """Return the place where a line is now; None where nothing is shared from there on."""
        return None if line.sharing is None or not line.key else cls(line.sharing, line.key, line.reports)

    def find(self, passes: Sequence[Pass], least: int) -> tuple[int, State] | None:
        """Return how many of the passes somebody has run, if more than `least`, and the state behind them."""
        found = self.sharing.furthest(keys_behind(self.key, passes)[least:])
        if found is None:
            return None
        count, state = found
        return least + count, dataclasses.replace(state, reports=state.reports[len(self.reports) :])

    def keep(self, passes: Sequence[Pass], model: ir.Model, context: Context, reports: Sequence[Report]) -> None:
        """Keep the model behind the passes for others, where the last of them has taken long.

        Args:
            passes: all since this place.
            model: behind them, as they make it on their own.
            context: of the passes.
            reports: of each of them.
        """
        key = keys_behind(self.key, passes)[-1]
        if key is not None:
            self.sharing.leave(key, model, context, [*self.reports, *reports], reports[-1].seconds)
