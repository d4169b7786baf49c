"""compile(): the stages together, on a model small enough to compile many times."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.compiler import Data, Event, Plan, default_output, verify
from qgraph.errors import ToleranceError, UserError
from qgraph.pipeline import Context, Pipeline

CHANNELS = 32


def network() -> ir.Model:
    """Conv -> Relu -> Conv -> Relu -> GlobalAveragePool -> Flatten -> Gemm, with seeded weights."""
    random = np.random.default_rng(3)

    def weight(*shape: int) -> str:
        values = random.standard_normal(int(np.prod(shape))) * shape[-1] ** -0.5 / 4
        return ", ".join(f"{value:.6f}" for value in values)

    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    network (float[N, 3, 16, 16] image) => (float[N, 10] scores)
    <float[{CHANNELS}, 3, 3, 3] w1 = {{{weight(CHANNELS, 3, 3, 3)}}},
     float[{CHANNELS}, {CHANNELS}, 3, 3] w2 = {{{weight(CHANNELS, CHANNELS, 3, 3)}}},
     float[{CHANNELS}, 10] w3 = {{{weight(CHANNELS, 10)}}}, float[10] b3 = {{{weight(10)}}}>
    {{
        c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
        r1 = Relu(c1)
        c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)
        r2 = Relu(c2)
        pooled = GlobalAveragePool(r2)
        flat = Flatten(pooled)
        scores = Gemm(flat, w3, b3)
    }}
    """
    return ir.from_onnx_text(text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    qgraph.save(network(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    random = np.random.default_rng(5)
    images = random.standard_normal((40, 3, 16, 16)).astype(np.float32)
    labels = random.integers(0, 10, 40)
    np.savez(tmp_path / "samples.npz", image=images, labels=labels)
    return tmp_path / "samples.npz"


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in ("bench.json", "report.html")
    }


def test_an_int8_artifact_is_smaller_close_and_complete(model: Path, samples: Path) -> None:
    artifact = qgraph.compile(model, "cpu-int8", calibration=samples)
    assert artifact.path == default_output(model, "cpu-int8") == model.parent / "net.cpu-int8"
    assert {path.name for path in artifact.path.iterdir()} == {
        "model.onnx", "manifest.json", "recipe.toml", "report.html", "bench.json",
    }  # fmt: skip
    assert artifact.verified
    assert artifact.manifest["files"]["model.onnx"]["bytes"] < 0.5 * model.stat().st_size
    (output,) = artifact.manifest["verification"]["outputs"]
    assert output["sqnr_db"] > 25
    assert artifact.manifest["verification"]["samples"] == 8
    assert artifact.manifest["kernels"]["integer"]
    assert "accuracy" in artifact.report.table()
    assert not list(model.parent.glob(".*"))


def test_the_same_input_gives_the_same_bytes(model: Path, samples: Path, tmp_path: Path) -> None:
    first = qgraph.compile(model, "cpu-int8", calibration=samples, output=tmp_path / "first")
    second = qgraph.compile(model, "cpu-int8", calibration=samples, output=tmp_path / "second")
    assert hashes(first.path) == hashes(second.path)


def test_the_recipe_repeats_the_build(model: Path, samples: Path, tmp_path: Path) -> None:
    settings = ["qdq.method=minmax", "qdq.per_channel=false"]
    first = qgraph.compile(model, "cpu-int8", calibration=samples, output=tmp_path / "first", settings=settings)
    recipe = first.path / "recipe.toml"
    assert "per_channel = false" in recipe.read_text()
    second = qgraph.compile(model, "cpu-int8", calibration=samples, output=tmp_path / "second", recipe=recipe)
    assert hashes(first.path) == hashes(second.path)


def test_the_artifact_runs_as_a_session_does(model: Path, samples: Path) -> None:
    artifact = qgraph.compile(model, "cpu-int8", calibration=samples)
    image = np.load(samples)["image"][:4]
    (scores,) = qgraph.open(artifact.path).run(None, {"image": image})
    assert scores.shape == (4, 10)


def test_a_model_in_memory_is_not_changed(samples: Path, tmp_path: Path) -> None:
    model = network()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    qgraph.compile(model, "cpu-int8", calibration=samples, output=tmp_path / "out")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    with pytest.raises(UserError, match="output=FOLDER"):
        qgraph.compile(model, "cpu-int8", calibration=samples)


def test_feeds_from_python_calibrate(model: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    feeds = [{"image": random.standard_normal((2, 3, 16, 16)).astype(np.float32)} for _ in range(6)]
    artifact = qgraph.compile(model, "cpu-int8", calibration=feeds, output=tmp_path / "out")
    assert artifact.manifest["verification"]["samples"] >= 2


def test_outside_the_tolerance_the_artifact_is_kept_and_marked(model: Path, samples: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "fixed.toml"
    recipe.write_text('[[pass]]\nname = "qdq"\n')
    with pytest.raises(ToleranceError, match="SQNR"):
        qgraph.compile(model, "cpu-int8", calibration=samples, tolerance={"sqnr": 90.0}, recipe=recipe)
    kept = qgraph.open(default_output(model, "cpu-int8"))
    assert not kept.verified
    assert kept.manifest["tolerance"] == {"sqnr": 90.0}
    assert kept.manifest["failures"]


def test_verify_data_with_labels_measures_accuracy(model: Path, samples: Path) -> None:
    artifact = qgraph.compile(model, "cpu-int8", calibration=samples, verify_data=Data(samples, labels="labels"))
    verification = artifact.manifest["verification"]
    assert verification["samples"] == verification["labelled"] == 40
    assert verification["accuracy_before"] is not None


def test_a_single_sample_is_not_said_to_be_held_back(model: Path) -> None:
    feed = {"image": np.random.default_rng(0).random((1, 3, 16, 16), np.float32)}
    artifact = qgraph.compile(model, "cpu-int8", calibration=[feed])
    assert "held-back" not in artifact.manifest["verification"]["data"]


def test_without_calibration_static_int8_says_so(model: Path) -> None:
    with pytest.raises(UserError, match="--calib"):
        qgraph.compile(model, "cpu-int8")
    assert not default_output(model, "cpu-int8").exists()


def test_passes_replace_the_compress_part_alone(model: Path, tmp_path: Path) -> None:
    artifact = qgraph.compile(model, "cpu-fp32", passes="remove-identity", output=tmp_path / "out")
    assert artifact.manifest["pipeline"]["compress"] == "remove-identity"
    assert artifact.manifest["pipeline"]["prepare"]


def test_a_setting_for_a_pass_that_is_not_there_is_told(model: Path, samples: Path) -> None:
    with pytest.raises(UserError, match="there is no pass 'nothing'"):
        qgraph.compile(model, "cpu-int8", calibration=samples, settings=["nothing.at=all"])
    with pytest.raises(UserError, match="has no pass 'onnx-ir'"):
        qgraph.compile(model, "cpu-int8", calibration=samples, settings=["onnx-ir.of=module:Class"])
    with pytest.raises(UserError, match=r"PASS\.OPTION=VALUE"):
        qgraph.compile(model, "cpu-int8", calibration=samples, settings=["qdq"])
    assert not default_output(model, "cpu-int8").exists()


def test_an_existing_output_stops_before_any_work(model: Path, samples: Path) -> None:
    default_output(model, "cpu-int8").mkdir()
    events: list[Event] = []
    with pytest.raises(UserError, match="--force"):
        qgraph.compile(model, "cpu-int8", calibration=samples, observer=events.append)
    assert events == []


def test_interrupting_leaves_nothing(model: Path, samples: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == "lower":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qgraph.compile(model, "cpu-int8", calibration=samples, observer=interrupt)
    assert sorted(path.name for path in model.parent.iterdir()) == ["net.onnx", "samples.npz"]


def test_stages_are_told_in_order(model: Path, samples: Path) -> None:
    events: list[Event] = []
    qgraph.compile(model, "cpu-int8", calibration=samples, observer=events.append)
    stages = [event.stage for event in events]
    assert stages[:2] == ["load", "prepare"]
    assert stages[-5:] == ["lower", "verify", "bench", "layers", "write"]
    assert "qdq" in stages


def test_verify_proves_again_and_notices_another_source(model: Path, samples: Path) -> None:
    artifact = qgraph.compile(model, "cpu-int8", calibration=samples)
    again = verify(artifact.path, data=samples)
    assert again.samples == 40
    with pytest.raises(ToleranceError, match="SQNR"):
        verify(artifact.path, data=samples, tolerance={"sqnr": 90.0})
    model.write_bytes(model.read_bytes() + b"\x00")
    with pytest.raises(UserError, match="is not"):
        verify(artifact.path, data=samples)
    model.unlink()
    with pytest.raises(UserError, match="--source"):
        verify(artifact.path, data=samples)


def test_fixed_shapes_reach_the_artifact(model: Path, samples: Path) -> None:
    artifact = qgraph.compile(model, "cpu-int8", calibration=samples, shapes={"image": [1, 3, 16, 16]})
    loaded = qgraph.load(artifact.path / "model.onnx")
    assert list(loaded.graph.inputs[0].shape) == [1, 3, 16, 16]


def test_fixed_shapes_are_those_of_the_random_inputs_too(model: Path) -> None:
    artifact = qgraph.compile(model, "cpu-fp32", shapes={"image": [3, 3, 16, 16]})
    assert artifact.verified
    assert list(artifact.manifest["inputs"][0]["shape"]) == [3, 3, 16, 16]
    assert verify(artifact.path).samples == 4 * 3


def test_a_recipe_names_its_faults(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid TOML"):
        Plan.from_recipe("[[pass]")
    with pytest.raises(UserError, match="unknown key 'passes'"):
        Plan.from_recipe("passes = []")
    with pytest.raises(UserError, match="no name"):
        Plan.from_recipe("[[pass]]\nbits = 4")
    assert Plan.from_recipe("pass = []") == Plan(compress=Pipeline())


def test_the_manifest_is_plain_json_without_times(model: Path, samples: Path) -> None:
    artifact = qgraph.compile(model, "cpu-int8", calibration=samples, context=Context(seed=4))
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest["seed"] == 4
    assert not [key for key in manifest if "time" in key or "seconds" in key]
