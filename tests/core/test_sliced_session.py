"""Models that are compared in slices, because their weights are too many to be held at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.analysis.sliced_session import SlicedSession
from qgraph.errors import UserError
from qgraph.models import pydoc_decoder
from qgraph.pipeline import Context
from qgraph.runtime.session import input_signature, open_session

ROOM = 1 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    qgraph.save(pydoc_decoder.build(), path)
    return path


def samples(count: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [{"input_ids": generator.integers(0, 256, (1, 5 + number))} for number in range(count)]


def test_slices_give_what_the_whole_gives(path: Path, tmp_path: Path) -> None:
    whole = open_session(path)
    context = Context(work_folder=tmp_path)
    sliced = SlicedSession(qgraph.load(path), samples(3), context, room=ROOM)
    for feeds in samples(3):
        (one,), (other,) = whole.run(None, feeds), sliced.run(None, feeds)
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.iterdir())


def test_slices_describe_inputs_and_outputs_as_the_runtime_does(path: Path) -> None:
    whole, sliced = open_session(path), SlicedSession(qgraph.load(path), [], Context(), room=ROOM)
    assert input_signature(sliced) == input_signature(whole)
    assert [one.name for one in sliced.get_outputs()] == [one.name for one in whole.get_outputs()]


def test_a_large_model_is_compiled_in_slices_to_the_same_figures(path: Path, tmp_path: Path) -> None:
    whole = qgraph.compile(path, "cpu-int4", output=tmp_path / "whole")
    sliced = qgraph.compile(path, "cpu-int4", output=tmp_path / "sliced", context=Context(calibration_memory=8 << 20))
    assert (tmp_path / "whole" / "model.onnx").read_bytes() == (tmp_path / "sliced" / "model.onnx").read_bytes()
    figures = [one.report.manifest["verification"]["outputs"][0]["sqnr_db"] for one in (whole, sliced)]
    assert figures[0] == pytest.approx(figures[1], abs=0.1)
    assert not (tmp_path / "sliced" / "bench.json").exists()


def test_an_output_that_no_input_reaches_is_told() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2] x) => (float[2] y, float[1] c) <float[1] w = {1}> { y = Relu (x)
        c = Neg (w) }""")
    session = SlicedSession(model, [{"x": np.zeros(2, np.float32)}], Context(), room=ROOM)
    with pytest.raises(UserError, match="output 'c' depends on no input"):
        session.run(None, {})
