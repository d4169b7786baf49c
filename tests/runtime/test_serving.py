"""Artifacts on a server: opened with numpy and ONNX Runtime alone, and nothing that they say is trusted blindly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_network

import qgraph
from qgraph import registry
from qgraph.errors import UserError
from qgraph.pipeline import Context
from qgraph.runtime.serving import open_artifact
from qgraph.runtime.session import CPU_PROVIDER

DEVICES = {
    "cpu": {CPU_PROVIDER},
    "integer": {CPU_PROVIDER},
    "cuda": {"CUDAExecutionProvider", "TensorrtExecutionProvider"},
    "tensorrt": {"TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"},
    "apple": {"CoreMLExecutionProvider"},
}
"""What a family of targets may want first, where ONNX Runtime runs it."""

ALONE = """
import importlib.abc, sys, time

class OnlyThese(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {blocked}:
            raise ModuleNotFoundError(f"No module named {{top!r}}", name=top)

sys.meta_path.insert(0, OnlyThese())
import numpy, onnxruntime
start = time.perf_counter()
from qgraph.runtime import open
seconds = time.perf_counter() - start
import json
model = open(sys.argv[1])
image = numpy.load(sys.argv[2])["image"]
(scores,) = model.run(None, {{"image": image}})
print(json.dumps([seconds, scores.tolist(), model.outputs, [one.name for one in model.inputs]]))
"""
BLOCKED = {"onnx", "onnx_ir", "onnxscript", "scipy", "networkx", "click", "rich", "ml_dtypes", "tokenizers", "PIL"}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    model, samples = small_network.write(folder)
    qgraph.compile(model, "cpu-int8", calibration=samples, output=folder / "served", context=Context(threads=1))
    return folder


def served_alone(network: Path, artifact: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE.format(blocked=BLOCKED), str(artifact), str(network / "samples.npz")]
    return subprocess.run(command, capture_output=True, text=True)


def changed(network: Path, folder: Path, **facts: object) -> Path:
    """Return a copy of the artifact with another manifest."""
    folder.mkdir()
    for path in (network / "served").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **facts}))
    return folder


def test_numpy_and_the_runtime_are_enough(network: Path) -> None:
    done = served_alone(network, network / "served")
    assert done.returncode == 0, done.stderr
    seconds, scores, outputs, inputs = json.loads(done.stdout)
    assert (outputs, inputs) == (["scores"], ["image"])
    image = np.load(network / "samples.npz")["image"]
    (expected,) = qgraph.open(network / "served").run(None, {"image": image})
    np.testing.assert_array_equal(np.array(scores, np.float32), expected)
    assert seconds < 0.3, "importing qgraph.runtime takes longer than a server's start should"


def test_what_needs_its_target_s_module_says_so_there(network: Path, tmp_path: Path) -> None:
    artifact = changed(network, tmp_path / "a", session=None)
    (scores,) = open_artifact(artifact).run(None, {"image": np.zeros((1, 4, 8, 8), np.float32)})
    assert scores.shape == (1, 10)
    done = served_alone(network, artifact)
    last = done.stderr.strip().splitlines()[-1]
    assert "opened by the module of its target cpu-int8, which needs more than ONNX Runtime" in last


@pytest.mark.parametrize("name", registry.names("target"))
def test_a_target_wants_its_own_device_first(name: str) -> None:
    providers = registry.find("target", name)().providers()
    if providers is None:
        return
    assert providers[0][0] in DEVICES[name.partition("-")[0]]
    assert providers[-1][0] == CPU_PROVIDER or name.startswith("apple")


def test_providers_that_are_not_installed_are_passed_over(network: Path, tmp_path: Path) -> None:
    wanted = {"runtime": "onnxruntime", "providers": [["CUDAExecutionProvider", {"device_id": "0"}]]}
    served = open_artifact(changed(network, tmp_path / "a", session=wanted), threads=1)
    assert served.session.get_providers()[-1] == CPU_PROVIDER
    assert served.verified


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ([], "names no providers"),
        ({"runtime": "onnxruntime", "providers": []}, "names no providers"),
        ({"runtime": "mine", "providers": [[CPU_PROVIDER, {}]]}, "names no providers"),
        ({"runtime": "onnxruntime", "providers": [["x.so", {}]]}, "names the provider 'x.so', which is none"),
        (
            {"runtime": "onnxruntime", "providers": [[CPU_PROVIDER, {"trt_extra_plugin_lib_paths": "e"}]]},
            "do not trust",
        ),
        ({"runtime": "onnxruntime", "providers": [[CPU_PROVIDER, {"key": "../evil"}]]}, "may lead outside"),
    ],
)
def test_a_manifest_that_asks_for_more_is_refused(network: Path, tmp_path: Path, facts: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_artifact(changed(network, tmp_path / "a", session=facts))
    assert words in str(caught.value)


def test_a_changed_file_is_refused(network: Path, tmp_path: Path) -> None:
    folder = changed(network, tmp_path / "a")
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(UserError, match="was changed after it was compiled"):
        open_artifact(folder)
    with pytest.raises(UserError, match="does not exist"):
        open_artifact(tmp_path / "nothing")
