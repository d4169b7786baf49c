"""Models between two passes, and outputs of a source, as files of a cache's entry: ONNX, arrays and JSON, no code."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.pipeline import Context, Report, Skipped

__all__ = ["State", "read_outputs", "read_state", "write_outputs", "write_state"]

_MODEL, _REFERENCE, _OUTPUTS = "model.onnx", "reference.onnx", "outputs.npz"
_OURS = "qgraph."
Promise = Callable[[ir.Model], str | None]


@dataclasses.dataclass(frozen=True)
class State:
    """A model behind some passes, and what they have left in the context.

    Attributes:
        model: is not to be changed.
        reports: of all passes since the source.
        reference: see `Context`.
        promises: see `Context`.
    """

    model: ir.Model
    reports: tuple[Report, ...]
    reference: ir.Model | None
    promises: tuple[Promise, ...]

    @classmethod
    def of(cls, model: ir.Model, context: Context, reports: Sequence[Report]) -> State:
        """Return the state that a line is in."""
        return cls(model, tuple(reports), context.reference, tuple(context.promises))


def write_state(state: State, folder: Path) -> dict[str, Any] | None:
    """Write the files of a state and return its facts; None where something in it has no such form."""
    reports = [_report_facts(one) for one in state.reports]
    promises = [_name_of(one) for one in state.promises]
    if None in promises or json.loads(json.dumps(reports)) != reports:
        return None
    qgraph.ir.save(state.model.clone(), folder / _MODEL)
    if state.reference is not None:
        qgraph.ir.save(state.reference.clone(), folder / _REFERENCE)
    return {"reports": reports, "promises": promises, "reference": state.reference is not None}


def read_state(folder: Path, facts: Mapping[str, Any]) -> State:
    """Read what `write_state` wrote.

    Raises:
        UserError, OSError, ValueError, KeyError, TypeError: it is damaged.
    """
    return State(
        qgraph.ir.load(folder / _MODEL),
        tuple(map(_report, facts["reports"])),
        qgraph.ir.load(folder / _REFERENCE) if facts["reference"] else None,
        tuple(map(_promise, facts["promises"])),
    )


def _report_facts(report: Report) -> dict[str, Any]:
    facts = dataclasses.asdict(dataclasses.replace(report, skipped=(), parts=(), figures={}))
    skipped = [[one.node, one.reason] for one in report.skipped]
    parts = [_report_facts(one) for one in report.parts]
    return {**facts, "notes": list(report.notes), "skipped": skipped, "parts": parts, "figures": dict(report.figures)}


def _report(facts: Mapping[str, Any]) -> Report:
    skipped = tuple(Skipped(node, reason) for node, reason in facts["skipped"])
    parts = tuple(map(_report, facts["parts"]))
    return Report(**{**facts, "notes": tuple(facts["notes"]), "skipped": skipped, "parts": parts})


def _name_of(promise: Promise) -> str | None:
    """Return module:Class of a promise of ours that is made without arguments; None for any other."""
    cls: Any = type(promise)
    fits = cls.__module__.startswith(_OURS) and cls.__qualname__.isidentifier()
    try:
        return f"{cls.__module__}:{cls.__qualname__}" if fits and cls() is not None else None
    except TypeError:
        return None


def _promise(name: str) -> Promise:
    module, _, cls = name.partition(":")
    if not module.startswith(_OURS):
        raise ValueError(f"the promise {name} is none of qgraph's")
    made: Promise = getattr(importlib.import_module(module), cls)()
    return made


def write_outputs(outputs: Sequence[Sequence[Any]], folder: Path) -> dict[str, Any] | None:
    """Write what a source gives, one list a sample; None where an output is no array of numbers."""
    arrays = {f"{i}.{j}": one for i, sample in enumerate(outputs) for j, one in enumerate(sample)}
    if not all(isinstance(one, np.ndarray) and one.dtype.kind in "biuf" for one in arrays.values()):
        return None
    np.savez(folder / _OUTPUTS, allow_pickle=False, **arrays)
    return {"counts": [len(sample) for sample in outputs]}


def read_outputs(folder: Path, facts: Mapping[str, Any]) -> list[list[Any]]:
    """Read what `write_outputs` wrote."""
    with np.load(folder / _OUTPUTS, allow_pickle=False) as arrays:
        return [[arrays[f"{i}.{j}"] for j in range(count)] for i, count in enumerate(facts["counts"])]
