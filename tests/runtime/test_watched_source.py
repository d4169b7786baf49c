"""The source's side of comparing tensors: run once for all results, and never for another source than theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
import qgraph.ir
from qgraph.analysis.finished_layers import likeness
from qgraph.builder import build
from qgraph.pipeline import Context, Pipeline
from qgraph.report.layers import look_inside
from qgraph.runtime import watched_source
from qgraph.runtime.difference import difference
from qgraph.runtime.watched_source import WatchedSource
from qgraph.sharing import Sharing

ROOM = 1 << 20
SIZES = 1
"""Runs that count how large the tensors are, of which the network states nothing."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return an entry for every run of the source."""
    ran: list[str] = []
    run = watched_source.run_probe

    def counted(probe: object, feed: object, who: str) -> object:
        ran.append(who)
        return run(probe, feed, who)  # type: ignore[arg-type]

    monkeypatch.setattr(watched_source, "run_probe", counted)
    return ran


def feeds(network: Path, count: int = 2) -> list[dict[str, np.ndarray]]:
    return [{"image": one[None]} for one in np.load(network / "samples.npz")["image"][:count]]


def quantized(network: Path) -> ir.Model:
    model = qgraph.ir.load(network / "net.onnx")
    Pipeline.parse("qdq").run(model, calibration=feeds(network))
    return model


@pytest.mark.parametrize("keep", [0, 1, ROOM])
def test_what_is_kept_changes_nothing(network: Path, runs: list[str], keep: int) -> None:
    source, result = network / "net.onnx", quantized(network)
    alone = difference(source, result, feeds(network), threads=1)
    watched = WatchedSource(source, feeds(network), threads=1, keep=keep)
    runs.clear()
    assert [difference(watched, result, watched.samples, threads=1) for _ in range(3)] == [alone] * 3
    assert len(runs) == SIZES + (2 if keep == ROOM else 6)


def test_slices_are_served_from_what_is_kept(network: Path, runs: list[str]) -> None:
    source, result = network / "net.onnx", quantized(network)
    watched = WatchedSource(source, feeds(network), threads=1, keep=ROOM)
    runs.clear()
    found = difference(watched, result, watched.samples, threads=1, memory=1)
    assert len(runs) == SIZES + 2
    assert found == difference(source, result, feeds(network), threads=1)


# --- one source for several targets -----------------------------------------------------------------------------------


def test_a_like_source_stands_for_another_and_no_other_does(network: Path) -> None:
    def model(change: str = "") -> ir.Model:
        found = qgraph.ir.load(network / "net.onnx")
        weight = found.graph.initializers["outer"]
        array = weight.const_value.numpy().copy()  # type: ignore[union-attr]
        if change == "weight":
            array[0, 0] += 1
        weight.const_value = ir.tensor(array, name="outer")
        if change == "attribute":
            next(node for node in found.graph if node.op_type == "Conv").attributes["pads"] = ir.AttrInt64s(
                "pads", [1] * 4
            )
            next(node for node in found.graph if node.op_type == "Conv").attributes["strides"] = ir.AttrInt64s(
                "strides", [1] * 2
            )
        if change == "opset":
            found.graph.opset_imports[""] = 21
        if change == "shape":
            qgraph.ir.set_input_shape(found, "image", (1, 4, 8, 8))
        return found

    sharing, samples = Sharing(), feeds(network)
    first = sharing.watched(WatchedSource(model(), samples))
    assert sharing.watched(WatchedSource(model(), feeds(network))) is first
    assert sharing.watched(WatchedSource(model(), feeds(network, 1))) is not first
    assert sharing.watched(WatchedSource(network / "net.onnx", samples)) is not first
    for change in ("weight", "attribute", "opset", "shape"):
        assert likeness(model(change)) != likeness(model()), change
        assert sharing.watched(WatchedSource(model(change), samples)) is not first


def test_few_sources_are_kept(network: Path) -> None:
    sharing = Sharing()
    first = sharing.watched(WatchedSource(network / "net.onnx", feeds(network)))
    for number in range(4):
        sharing.watched(WatchedSource(network / f"{number}.onnx", feeds(network)))
    assert sharing.watched(WatchedSource(network / "net.onnx", feeds(network))) is not first


def test_nothing_is_kept_without_memory(network: Path) -> None:
    sharing = Sharing(memory=False)
    first = sharing.watched(WatchedSource(network / "net.onnx", feeds(network)))
    assert sharing.watched(WatchedSource(network / "net.onnx", feeds(network))) is not first


def test_a_build_runs_the_source_once_and_its_reports_tell_the_same(
    network: Path, tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, object] = {}

    def seen(source: WatchedSource, stage: Path, *rest: object, **options: object) -> object:
        facts = look_inside(source, stage, *rest, **options)  # type: ignore[arg-type]
        found[next(name for name in targets if name in str(stage))] = facts
        return facts

    targets = ["cuda-int4", "cuda-sparse24"]
    monkeypatch.setattr("qgraph.stages.look_inside", seen)
    recipe = {"model": str(network / "net.onnx"), "calib": str(network / "samples.npz"), "targets": targets}
    build(recipe, output=tmp_path / "all", context=Context(threads=1))
    together = dict(found)
    assert len(runs) == SIZES + 1
    for name in targets:
        qgraph.compile(
            network / "net.onnx", name, calibration=network / "samples.npz", output=tmp_path / name,
            context=Context(threads=1),
        )  # fmt: skip
    assert found == together
