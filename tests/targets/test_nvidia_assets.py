"""A real model through the targets for NVIDIA GPUs: an artifact, or a refusal of one line; never a crash.

The smallest one, an export of CNTK: opset 8, initializers that are inputs. `benchmarks/target_table.py` takes them all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qgraph
from qgraph import registry
from qgraph.errors import UserError
from qgraph.pipeline import Feeds

REFUSED = {
    "cuda-int8": "2 Conv nodes, and ONNX Runtime's CUDA provider has no integer Conv",
    "cuda-fp8": "2 Conv nodes, and ONNX Runtime's CUDA provider has no float8 Conv",
}
BUILT = [name for name in registry.names("target") if name.startswith(("cuda-", "tensorrt-")) and name not in REFUSED]


def digits(assets: Path) -> tuple[Path, list[Feeds]]:
    images = np.random.default_rng(0).integers(0, 255, (3, 1, 1, 28, 28)).astype(np.float32)
    return assets / "mnist" / "mnist_cntk.onnx", [{"Input3": image} for image in images]


@pytest.mark.parametrize("target", REFUSED)
def test_a_refusal_says_in_one_line_what_serves_instead(target: str, assets: Path, tmp_path: Path):
    model, feeds = digits(assets)
    with pytest.raises(UserError) as error:
        qgraph.compile(model, target, output=tmp_path / "out", calibration=feeds)
    assert REFUSED[target] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", BUILT)
def test_an_artifact_runs_and_tells_where(target: str, assets: Path, tmp_path: Path):
    model, feeds = digits(assets)
    artifact = qgraph.compile(model, target, output=tmp_path / "out", calibration=feeds)
    placement = artifact.manifest["placement"]
    assert artifact.verified
    assert placement["nodes"] > 8
    assert (placement["copies"], artifact.manifest["runtime"]["elsewhere"]) == (0, [])
    assert artifact.session().run(None, feeds[0])[0].shape == (1, 10)
