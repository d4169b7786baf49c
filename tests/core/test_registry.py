"""Finding passes and targets by name: qgraph's own, other people's, and those that are broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import catalog, registry
from qgraph.errors import UserError
from qgraph.pipeline import Pass
from qgraph.targets.base import Target

EXAMPLE = Path(__file__).resolve().parent.parent / "plugin_example"
ROOT = EXAMPLE.parent.parent


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch):
    """Return a function that replaces what is registered by the entry points given, `name=value` each."""

    def replace(*entries: str) -> None:
        points = [EntryPoint(*entry.split("=", 1), group="qgraph.passes") for entry in entries]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: EntryPoints(points).select(group=group))
        registry._entries.cache_clear()

    yield replace
    monkeypatch.undo()
    registry._entries.cache_clear()


def test_what_is_registered_is_found(register):
    register("rewrite=qgraph.pipeline:Rewrite")
    assert registry.names("pass") == ["rewrite"]
    assert registry.find("pass", "rewrite").name == "rewrite"
    assert registry.names("target") == []


def test_an_unknown_name_gets_the_nearest(register):
    register("rewrite=qgraph.pipeline:Rewrite")
    with pytest.raises(UserError, match=r"^there is no pass 'rewrte'\. Did you mean 'rewrite'\? `qgraph passes` lists"):
        registry.find("pass", "rewrte")
    with pytest.raises(UserError, match=r"^there is no target 'rewrite'\. `qgraph targets` lists them\.$"):
        registry.find("target", "rewrite")


def test_two_packages_may_not_share_a_name(register):
    register("x=a:B", "x=c:D")
    with pytest.raises(UserError, match=r"^two installed packages register the pass 'x': a:B and c:D\. Uninstall one"):
        registry.names("pass")


def test_the_same_registration_twice_is_one(register):
    register("rewrite=qgraph.pipeline:Rewrite", "rewrite=qgraph.pipeline:Rewrite")
    assert registry.names("pass") == ["rewrite"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no.such.module:Thing", r"cannot be loaded: ModuleNotFoundError: No module named 'no'"),
        ("qgraph.pipeline:Nothing", r"cannot be loaded: AttributeError: .*Nothing"),
        ("qgraph.pipeline:Rewrite", r"is not a dataclass with name = 'x'$"),
        ("qgraph.pipeline:T", r"is not a dataclass with name = 'x'$"),
    ],
)
def test_a_broken_plug_in_is_told_and_hides_nothing(register, value: str, reason: str):
    register(f"x={value}", "rewrite=qgraph.pipeline:Rewrite")
    with pytest.raises(UserError, match=rf"^the pass 'x' of the installed package .* \({value}\) {reason}"):
        registry.find("pass", "x")
    listed = {one.name: one.fault for one in catalog.catalog("pass")}
    assert listed["rewrite"] == ""
    assert listed["x"].startswith("the pass 'x'")


@pytest.mark.parametrize(("kind", "folder", "base"), [("pass", "passes", Pass), ("target", "targets", Target)])
def test_every_pass_and_target_of_ours_is_registered(kind: registry.Kind, folder: str, base: type):
    registered = {registry.find(kind, name) for name in registry.names(kind)}
    for path in (ROOT / folder).glob("*.py"):
        module = importlib.import_module(f"qgraph.{folder}.{path.stem}".removesuffix(".__init__"))
        for thing in vars(module).values():
            named = (
                isinstance(thing, type) and issubclass(thing, base) and isinstance(getattr(thing, "name", None), str)
            )
            assert not named or thing in registered, f"{thing} has a name and is not registered"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example distribution into a folder of its own, without the network."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(EXAMPLE, source)  # the build writes into the source
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*install, "--target", site, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


def qgraph(site: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-P", "-m", "qgraph", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_third_partys_pass_and_target_work_by_name(installed: Path, tmp_path: Path):
    weights = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    numbers = ", ".join(map(str, weights.reshape(-1)))
    model = ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w = {{{numbers}}}> {{ y = MatMul(x, w) }}
    """)
    ir.save(model, tmp_path / "m.onnx")

    listed = qgraph(installed, "passes", "round-weights", "--json")
    assert listed.returncode == 0, listed.stderr
    assert json.loads(listed.stdout)["options"] == [
        {"name": "digits", "type": "an integer", "default": "2", "help": ""}
    ]

    done = qgraph(installed, "compile", tmp_path / "m.onnx", "-t", "cpu-rounded", "--set", "round-weights.digits=1")
    assert done.returncode == 0, done.stderr
    assert "1 weights rounded to 1 digits" in done.stderr
    compiled = ir.load(tmp_path / "m.cpu-rounded" / "model.onnx")
    np.testing.assert_array_equal(compiled.graph.initializers["w"].const_value.numpy(), np.round(weights, 1))

    misspelt = qgraph(installed, "compile", tmp_path / "m.onnx", "-t", "cpu-rouned")
    assert misspelt.returncode == 2
    assert misspelt.stderr == (
        "error: there is no target 'cpu-rouned'. Did you mean 'cpu-rounded'? `qgraph targets` lists them.\n"
    )
