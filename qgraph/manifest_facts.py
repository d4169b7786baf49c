"""What the manifest holds of a compilation: source, target, pipeline, seed, versions, figures, verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import qgraph
from qgraph.bounds import Bounds
from qgraph.building import Built
from qgraph.loading import Loaded
from qgraph.pipeline import Pipeline, Report, Skipped
from qgraph.plan import Plan
from qgraph.runtime.figures import Verification
from qgraph.runtime.serving import session_facts
from qgraph.runtime.session import TensorSpec
from qgraph.target_options import options_of
from qgraph.targets.base import Kernels, Runs, Target

__all__ = ["Outcome"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a compilation has come to.

    Attributes:
        loaded: the source and its data.
        target: for which it is.
        seed: of the passes.
        inputs: of the source.
        plan: all three parts.
        prepared: report of the prepare part.
        built: what was done after it.
        runs: how the result runs.
        verification: how near it is to the source.
        bounds: what the user wants.
        failures: which of them it breaks, one line each.
    """

    loaded: Loaded
    target: Target
    seed: int
    inputs: Sequence[TensorSpec]
    plan: Plan
    prepared: Report
    built: Built
    runs: Runs
    verification: Verification
    bounds: Bounds
    failures: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest holds, but for the hashes of the files."""
        left = [*self.built.compress.skipped, *self.built.lower.skipped]
        options, shapes, runs = options_of(self.target), self.loaded.shapes, self.runs
        return {
            "qgraph": qgraph.__version__,
            "source": self.loaded.facts,
            "target": self.target.name,
            **({"target_options": options} if options else {}),
            "pipeline": {
                "prepare": _text(self.plan.prepare),
                "compress": _text(self.plan.compress),
                "lower": _text(self.plan.lower),
            },
            "seed": self.seed,
            "versions": _versions(),
            "inputs": [
                dataclasses.asdict(dataclasses.replace(one, shape=list(shapes.get(one.name, one.shape))))
                for one in self.inputs
            ],
            "outputs": [output.to_json()["name"] for output in self.verification.outputs],
            "passes": [
                {"part": part, "name": one.name, "changed": one.changed, "notes": list(one.notes)}
                for part, report in self.built.reports(self.prepared).items()
                for one in report.parts
            ],
            "skipped": [{"node": node, "reason": reason} for node, reason in _unique(left)],
            "weights": self.built.weights,
            "kernels": None if runs.kernels is None else _kernels_json(runs.kernels),
            **({} if runs.placement is None else {"placement": runs.placement.summary()}),
            **({} if runs.footprint is None else {"footprint": runs.footprint}),
            **({} if runs.runtime is None else {"runtime": runs.runtime}),
            **({"shapes": {name: list(sizes) for name, sizes in shapes.items()}} if shapes else {}),
            **({"emit": list(self.target.emits)} if self.target.emits else {}),
            **session_facts(runs.providers or self.target.providers(), self.target.disabled),
            "stand_in": self.target.stand_in(),
            "verification": {"data": self.loaded.data_kind, **self.verification.to_json()},
            "tolerance": dict(self.bounds.tolerance),
            **({"budget": dict(self.bounds.budget)} if self.bounds.budget else {}),
            "failures": list(self.failures),
            "verified": not self.failures,
        }


def _text(pipeline: Pipeline | None) -> str:
    return "" if pipeline is None else pipeline.describe()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (
        "numpy",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxruntime",
        "onnxruntime-gpu",
        "apache-tvm",
        "coremltools",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _unique(skipped: Iterable[Skipped]) -> list[Skipped]:
    return list(dict.fromkeys(skipped))


def _kernels_json(kernels: Kernels) -> dict[str, Any]:
    return {
        "integer": dict(sorted(kernels.integer.items())),
        "float": dict(sorted(kernels.floating.items())),
        "low_bit": dict(sorted(kernels.low_bit.items())),
        "other": dict(sorted(kernels.other.items())),
        "left_in_float": [{"node": node, "reason": reason} for node, reason in kernels.left_in_float],
    }
