"""Searches and the cache: they take up what others have left and leave their own, and never anything inexact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qgraph
import qgraph.ir
from qgraph import sharing as sharing_module
from qgraph.beginnings import Beginning
from qgraph.pipeline import Context, Pass, Pipeline, Report
from qgraph.report.ladder import Rung
from qgraph.search_workshop import SharingContext

SQNR = 43.0
"""What the network does not reach by its first pipeline, and does by a step of the ladder."""


@pytest.fixture(autouse=True)
def all_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every state, however little time it took."""
    monkeypatch.setattr(sharing_module, "_WORTH_COPYING", 0.0)
    monkeypatch.setattr(sharing_module, "_WORTH_WRITING", 0.0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of passes as they run, without those that prepare and lower."""
    ran: list[str] = []
    run_one = Pipeline._run_one

    def counted(self: Pipeline, one: Pass, *rest: Any) -> Report:
        if one.name in ("qdq", "equalize", "bias-correction", "adaround"):
            ran.append(one.name)
        return run_one(self, one, *rest)

    monkeypatch.setattr(Pipeline, "_run_one", counted)
    return ran


@pytest.fixture
def compiled(network: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, str], list[Rung]]]:
    """Return a function that compiles the network and gives the hashes of the files, and the ladder."""

    def run(output: str, **options: Any) -> tuple[dict[str, str], list[Rung]]:
        rungs: list[Rung] = []
        artifact = qgraph.compile(
            network / "net.onnx", "cpu-int8", calibration=network / "samples.npz", output=tmp_path / output,
            context=Context(threads=1), on_rung=rungs.append, **{"passes": "qdq", **options},
        )  # fmt: skip
        names = sorted(path for path in artifact.path.iterdir() if path.name not in ("bench.json", "report.html"))
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}, rungs

    return run


Compiled = Callable[..., tuple[dict[str, str], list[Rung]]]


def test_a_search_finds_what_another_has_left_and_gives_the_same_bytes(
    compiled: Compiled, tmp_path: Path, runs: list[str]
) -> None:
    bounds = {"tolerance": {"sqnr": SQNR}}
    alone, rungs = compiled("alone", **bounds)
    assert len(rungs) > 1
    runs.clear()
    first, _ = compiled("first", cache=tmp_path / "cache", **bounds)
    cold = list(runs)
    runs.clear()
    second, _ = compiled("second", cache=tmp_path / "cache", **bounds)
    assert len(runs) < len(cold) / 2
    assert alone == first == second


def test_a_search_goes_on_from_what_a_compilation_has_left(compiled: Compiled, tmp_path: Path, runs: list[str]) -> None:
    plain, _ = compiled("plain", cache=tmp_path / "cache")
    assert runs == ["qdq"]
    runs.clear()
    searched, rungs = compiled("searched", cache=tmp_path / "cache", tolerance={"sqnr": 5.0})
    assert (runs, len(rungs)) == ([], 1)
    assert searched["model.onnx"] == plain["model.onnx"]


def test_a_compilation_with_the_recipe_of_a_search_finds_all_of_it(
    compiled: Compiled, tmp_path: Path, runs: list[str]
) -> None:
    searched, _ = compiled("searched", cache=tmp_path / "cache", tolerance={"sqnr": SQNR})
    runs.clear()
    recipe = {"passes": None, "recipe": tmp_path / "searched" / "recipe.toml"}
    again, _ = compiled("again", cache=tmp_path / "cache", **recipe)
    assert runs == []
    assert again["model.onnx"] == searched["model.onnx"]


def test_what_is_inexact_is_not_left_for_others(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    keep = Beginning.keep

    def watched(self: Beginning, passes: Any, model: Any, context: Any, reports: Any) -> None:
        kept.append(context.exact)
        keep(self, passes, model, context, reports)

    monkeypatch.setattr(Beginning, "keep", watched)
    analyse = SharingContext.analyse

    def inexact(self: SharingContext, analysis: Any, model: Any, *arguments: Any) -> Any:
        found = analyse(self, analysis, model, *arguments)
        self.exact = False
        return found

    monkeypatch.setattr(SharingContext, "analyse", inexact)
    compiled("searched", cache=tmp_path / "cache", tolerance={"sqnr": 5.0})
    assert all(kept)
    monkeypatch.setattr(SharingContext, "analyse", analyse)
    compiled("again", cache=tmp_path / "other", tolerance={"sqnr": 5.0})
    assert len(kept) == 1
