"""Targets as text, with options, and what of them stands in an artifact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import pytest

import qgraph
from qgraph import registry
from qgraph.errors import UserError
from qgraph.target_options import options_of, read_target, refuse_untunable, target_of, with_option
from qgraph.targets.cpu import CpuFp32


@dataclasses.dataclass(frozen=True)
class Sized(CpuFp32):
    name: ClassVar[str] = "cpu-fp32"
    cpu: str = ""
    trials: int = 0
    sizes: tuple[int, ...] = ()


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    found = registry.find
    monkeypatch.setattr(
        registry, "find", lambda kind, name: Sized if (kind, name) == ("target", "cpu-fp32") else found(kind, name)
    )


def test_text_reads_as_the_target_and_back() -> None:
    assert read_target("cpu-fp32") == CpuFp32()
    assert read_target("integer{emit=[c]}").emits == ("c",)
    assert options_of(read_target("integer{emit=[c]}")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu-fp33", "there is no target 'cpu-fp33'"),
        ("cpu-fp32{speed=9}", "'cpu-fp32' has no option 'speed'"),
        ("cpu-fp32,cpu-int8", "one target is wanted"),
        ("", "one target is wanted"),
        ("integer{emit=[java]}", "--emit java"),
    ],
)
def test_what_is_no_target_is_told(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_target(text)


def test_an_option_is_set_by_its_flag() -> None:
    assert with_option(Sized(trials=3), "cpu", "avx2", "--cpu") == Sized(cpu="avx2", trials=3)
    with pytest.raises(UserError, match="--cpu is for the targets cpu-fp16, cpu-int8, tvm-cpu, not for integer"):
        with_option(read_target("integer"), "cpu", "avx2", "--cpu")
    assert with_option(Sized(cpu="avx2"), "cpu", "avx2", "--cpu") == Sized(cpu="avx2")
    with pytest.raises(UserError, match="--cpu says cpu=neon, and the target cpu=avx2: leave one of them out"):
        with_option(Sized(cpu="avx2"), "cpu", "neon", "--cpu")
    with pytest.raises(UserError, match="must be an integer"):
        with_option(Sized(), "trials", "many", "--tune N")


@pytest.mark.usefixtures("sized")
def test_an_artifact_keeps_the_options_and_opens_with_them(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> net (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"""
    model = ir.from_onnx_text(text)
    plain = qgraph.compile(model, "cpu-fp32", output=tmp_path / "plain")
    artifact = qgraph.compile(model, "cpu-fp32{cpu=neon,sizes=[1,2]}", trials=5, output=tmp_path / "net")
    assert "target_options" not in plain.manifest
    assert artifact.manifest["target"] == "cpu-fp32"
    assert artifact.manifest["target_options"] == {"cpu": "neon", "trials": 5, "sizes": [1, 2]}
    assert qgraph.open(artifact.path).target == Sized(cpu="neon", trials=5, sizes=(1, 2))
    assert 'target = "cpu-fp32{cpu=neon,trials=5,sizes=[1,2]}"' in (artifact.path / "recipe.toml").read_text()
    assert "--target &#x27;cpu-fp32{cpu=neon,trials=5,sizes=[1,2]}&#x27;" in (artifact.path / "report.html").read_text()


def test_a_manifest_with_options_that_are_none_is_damaged() -> None:
    with pytest.raises(UserError, match="'target_options' is no object"):
        target_of({"target": "cpu-fp32", "target_options": ["cpu"]})
    with pytest.raises(UserError, match="has no option 'cpu'"):
        target_of({"target": "cpu-fp32", "target_options": {"cpu": "neon"}})


@pytest.mark.parametrize("name", ["apple-fp16", "cuda-fp16", "integer", "tvm-metal"])
def test_a_target_that_times_nothing_says_who_does(name: str, tmp_path: Path) -> None:
    message = f"--tune is for the targets cpu-int8, tvm-cpu, not for {name}"
    with pytest.raises(UserError, match=message):
        refuse_untunable(read_target(name))
    with pytest.raises(UserError, match=message):
        qgraph.compile(tmp_path / "model.onnx", name, tune=True)


def test_targets_that_time_something_may_be_tuned() -> None:
    for name in ("cpu-int8", "tvm-cpu"):
        refuse_untunable(read_target(name))
    with pytest.raises(UserError, match="--tune 8 is for the targets tvm-cpu, not for cpu-int8"):
        qgraph.compile("model.onnx", "cpu-int8", tune=True, trials=8)
