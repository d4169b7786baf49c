"""Two integer graphs of one model, tensor by tensor: in how many elements they differ, and by how many steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.analysis.probes import Probe, main_values, raw_outputs
from qgraph.pipeline import Context, Feeds

__all__ = ["Difference", "differences"]

_BITS = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT16)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a tensor differs.

    Attributes:
        tensor: its name in both graphs.
        elements: that were compared.
        differing: of them.
        largest: difference, in steps of its scale (least significant bits).
    """

    tensor: str
    elements: int
    differing: int
    largest: int

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)


def differences(exact: ir.Model, other: ir.Model, context: Context, feeds: Iterable[Feeds]) -> list[Difference]:
    """Run both graphs on `feeds`, and compare the tensors of few bits that they have in common, in their order.

    What differs in one tensor is read by those behind it, so that differences add up on their way.

    Args:
        exact: one integer graph; not changed.
        other: another one, in which tensors have the same names; not changed.
        context: its threads are used.
        feeds: for both.
    """
    values = main_values(exact)
    also = main_values(other)
    names = [name for name, value in values.items() if value.dtype in _BITS and value.producer() is not None]
    names = [name for name in names if name in also and also[name].dtype is values[name].dtype]
    counts = {name: [0, 0, 0] for name in names}
    probes: list[Probe] = []
    for feed in feeds:
        if not probes:
            fed = frozenset(feed)
            probes = [Probe(model, raw_outputs(names), fed, threads=context.threads) for model in (exact, other)]
        for name, one, two in zip(names, *(probe.run(feed) for probe in probes), strict=True):
            steps = np.abs(one.astype(np.int64) - two.astype(np.int64))
            count = counts[name]
            count[0] += steps.size
            count[1] += int(np.count_nonzero(steps))
            count[2] = max(count[2], int(steps.max(initial=0)))
    return [Difference(name, *count) for name, count in counts.items()]
