"""keep-sums against golden text, and against what ONNX Runtime makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import text_models
from golden_rewrites import as_written

import qgraph.ir
from qgraph.passes.keep_sums import KeepSums
from qgraph.pipeline import Pipeline, Report
from qgraph.runtime.session import open_session

GOLDEN = Path(__file__).resolve().parent.parent / "golden/keep-sums"
CASES = {path.stem: path.read_text().partition("\n---\n") for path in sorted(GOLDEN.glob("*.onnxtxt"))}
COUNTS = {"after_norm": 2, "before_norm": 2}
SLOW = {"SkipLayerNormalization", "BiasGelu"}


def keep(model: ir.Model) -> Report:
    return Pipeline([KeepSums()]).run(model).parts[0]


def ran(model: ir.Model, folder: Path, *, optimise: bool) -> tuple[np.ndarray, set[str]]:
    """Return the output, and the operators that the runtime really runs."""
    feeds = text_models.normal_feeds(model, batch=2, seq=5)
    path = folder / "optimised.onnx" if optimise else None
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1, optimise=optimise, optimised_path=path)
    operators = {node.op_type for node in qgraph.ir.load(path).graph} if path is not None else set()
    return session.run(None, feeds)[0], operators


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_as_written(name: str):
    _, report = as_written(GOLDEN / f"{name}.onnxtxt", keep)
    assert (report.changed, list(report.skipped)) == (COUNTS[name], [])


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_are_computed(name: str, tmp_path: Path):
    model = ir.from_onnx_text(CASES[name][0])
    before, _ = ran(model, tmp_path, optimise=False)
    keep(model)
    after, _ = ran(model, tmp_path, optimise=False)
    np.testing.assert_array_equal(after, before)


def test_the_runtime_fuses_them_no_more(tmp_path: Path):
    model = ir.from_onnx_text(CASES["after_norm"][0])
    assert ran(model, tmp_path, optimise=True)[1] & SLOW, (
        "ONNX Runtime does not fuse this any more: is the pass needed?"
    )
    keep(model)
    assert not ran(model, tmp_path, optimise=True)[1] & SLOW


def test_other_types_stay():
    model = ir.from_onnx_text(CASES["after_norm"][0].replace("float[", "double["))
    assert keep(model).changed == 0
