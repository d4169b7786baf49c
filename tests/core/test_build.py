"""build(): many targets in one call, the same bytes as one by one; and its recipes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import small_network

import qgraph
from qgraph import registry
from qgraph.build_recipe import read_recipe
from qgraph.builder import Build, build, default_output
from qgraph.cache import Cache
from qgraph.errors import UserError
from qgraph.pipeline import Context, Pipeline
from qgraph.verbs import run as run_artifact

TARGETS = [name for name in registry.names("target") if not name.startswith("tvm-")]
"""All but those that compile machine code for half a minute, which have tests of their own."""
SOME = ("cpu-fp32", "cpu-int8", "cpu-int4", "cuda-int4", "cuda-sparse24", "integer")
"""Targets that are compiled once more: one for each way of sharing."""
TIMED = ("bench.json", "report.html", "index.html")
RECIPE = """
model = "net.onnx"
calib = "samples.npz"
"""


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TIMED
    }


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def built(network: Path) -> Build:
    """Build for every registered target in one call."""
    recipe = {"model": str(network / "net.onnx"), "calib": str(network / "samples.npz"), "targets": TARGETS}
    return build(recipe, output=network / "all", context=Context(threads=1), cache=network / "cache")


@pytest.fixture
def work(network: Path, tmp_path: Path) -> Path:
    for name in ("net.onnx", "samples.npz"):
        (tmp_path / name).write_bytes((network / name).read_bytes())
    return tmp_path


def written(folder: Path, text: str) -> Path:
    (folder / "r.toml").write_text(text, encoding="utf-8")
    return folder / "r.toml"


# --- all targets ------------------------------------------------------------------------------------------------------


def test_no_target_fails(built: Build) -> None:
    assert [one.name for one in built.entries] == TARGETS
    assert not [(one.name, one.reason) for one in built.entries if one.status == "failed"]
    assert built["cpu-fp32"].verified


@pytest.mark.parametrize("name", SOME)
def test_an_artifact_is_what_compile_makes_to_the_byte(built: Build, network: Path, tmp_path: Path, name: str) -> None:
    entry = next(one for one in built.entries if one.name == name)
    if entry.artifact is None:
        pytest.skip(f"{name} refuses the network: {entry.reason}")
    alone = qgraph.compile(
        network / "net.onnx",
        name,
        calibration=network / "samples.npz",
        output=tmp_path / "a",
        context=Context(threads=1),
    )
    assert hashes(entry.artifact.path) == hashes(alone.path)


@pytest.mark.parametrize("name", TARGETS)
def test_run_open_and_the_server_give_the_same(built: Build, network: Path, name: str) -> None:
    entry = next(one for one in built.entries if one.name == name)
    if entry.artifact is None:
        pytest.skip(f"{name} refuses the network: {entry.reason}")
    image = np.load(network / "samples.npz")["image"]
    feed = {"image": image[:1]}
    (opened,) = qgraph.open(entry.artifact.path).run(None, feed)
    (named,) = qgraph.open(entry.artifact.path).run(["scores"], feed)
    (served,) = qgraph.runtime.open(entry.artifact.path).run(None, feed)
    ran = run_artifact(entry.artifact.path, network / "samples.npz").values["scores"]
    assert opened.shape == (1, small_network.CLASSES)
    np.testing.assert_array_equal(opened, named)
    np.testing.assert_array_equal(opened, served)
    np.testing.assert_array_equal(opened, ran[:1])
    assert len(ran) == small_network.SAMPLES


def test_the_index_tells_all(built: Build) -> None:
    index = json.loads((built.path / "index.json").read_text())
    assert index == built.to_json()
    assert not re.search("second|latency", json.dumps(list(index))), "timings do not repeat"
    for entry in index["targets"]:
        if entry["folder"] is not None:
            manifest = built.path / entry["folder"] / "manifest.json"
            assert entry["manifest"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
            assert entry["files"] == json.loads(manifest.read_text())["files"]


@pytest.mark.parametrize("cached", [False, True])
def test_an_index_repeats(network: Path, tmp_path: Path, cached: bool) -> None:
    recipe = {"model": str(network / "net.onnx"), "calib": str(network / "samples.npz"), "targets": list(SOME[:3])}
    cache = network / "cache" if cached else None
    made = [build(recipe, output=tmp_path / name, context=Context(threads=1), cache=cache).path for name in "ab"]
    assert hashes(made[0]) == hashes(made[1])


def test_the_page_links_to_every_report(built: Build) -> None:
    page = (built.path / "index.html").read_text()
    links = re.findall(r'href="([^"#]+)"', page)
    made = [one.name for one in built.entries if one.artifact is not None]
    assert sorted(links) == sorted(f"{name}/report.html" for name in made)
    assert all((built.path / link).is_file() for link in links)
    assert "<script" not in page


def test_every_artifact_has_a_recipe_that_builds_it(built: Build, network: Path, tmp_path: Path) -> None:
    recipe = built["cpu-int8"].path / "recipe.toml"
    again = build(
        recipe, output=tmp_path / "again", model=network / "net.onnx", calibration=network / "samples.npz",
        context=Context(threads=1),
    )  # fmt: skip
    assert hashes(again["cpu-int8"].path) == hashes(built["cpu-int8"].path)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_refusal_does_not_stop_the_others(work: Path) -> None:
    text = """
    targets = ["cpu-fp32", "integer"]
    model = "net.onnx"
    tolerance = ["sqnr=20"]
    """
    made = build(written(work, text), context=Context(threads=1))
    assert made.path == default_output(work / "r.toml") == work / "r.build"
    assert [(one.name, one.status) for one in made.entries] == [("cpu-fp32", "built"), ("integer", "refused")]
    assert "--calib" in made.entries[1].reason
    assert files(made.path)[0] == "cpu-fp32"
    assert "integer" not in files(made.path)
    with pytest.raises(UserError, match=r"no artifact for integer, which was refused: .*--calib"):
        made["integer"]
    with pytest.raises(UserError, match="has no target 'tpu'"):
        made["tpu"]


def test_bounds_that_are_not_met_are_told(work: Path) -> None:
    text = RECIPE + '[[targets]]\ntarget = "cpu-int8"\n[targets.tolerance]\nsqnr = 99\n[[targets.pass]]\nname = "qdq"\n'
    made = build(written(work, text), context=Context(threads=1))
    (entry,) = made.entries
    assert entry.status == "outside"
    assert "SQNR" in entry.reason
    assert not made["cpu-int8"].verified


def test_a_fault_of_one_target_does_not_stop_the_others(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[str]:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("qgraph.targets.cpu_int4.CpuInt4.check", broken)
    made = build(written(work, RECIPE + 'targets = ["cpu-int4", "cpu-fp32"]'), context=Context(threads=1))
    assert [(one.status, one.reason) for one in made.entries] == [("failed", "ZeroDivisionError: oh"), ("built", "")]


def test_when_nothing_is_built_nothing_is_left(work: Path) -> None:
    before = files(work)
    with pytest.raises(UserError, match="--calib"):
        build(written(work, 'model = "net.onnx"\ntargets = ["integer"]'))
    with pytest.raises(UserError, match=r"no\.onnx"):
        build(written(work, 'model = "no.onnx"\ntargets = ["cpu-fp32"]'))
    assert files(work) == sorted([*before, "r.toml"])


def test_a_build_is_replaced_only_if_nothing_else_is_in_it(work: Path) -> None:
    recipe = written(work, RECIPE + 'targets = ["cpu-fp32"]')
    made = build(recipe, context=Context(threads=1))
    with pytest.raises(UserError, match="--force"):
        build(recipe)
    build(recipe, context=Context(threads=1), force=True)
    (made.path / "cpu-fp32" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"cpu-fp32/notes\.txt"):
        build(recipe, force=True)
    assert (made.path / "cpu-fp32" / "notes.txt").read_text() == "mine"


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_in_all_its_forms(tmp_path: Path) -> None:
    text = """
    model = "m.onnx"
    seed = 3
    tolerance = { sqnr = 20, top1 = "1%" }
    set = ["qdq.method=mse"]
    shapes = { image = [1, 3, 8, 8] }
    [calibration]
    data = "module:feeds"
    tokenizer = "bytes"
    [verify-data]
    data = "images"
    preprocess = "imagenet"
    map = { a = "b" }
    [targets.cpu-int8]
    [targets.small]
    target = "cpu-int4"
    passes = "gptq{bits=2}"
    set = []
    tolerance = {}
    budget = { size = "8MB" }
    """
    found = read_recipe(written(tmp_path, text))
    assert (found.model, found.seed, found.shapes) == (tmp_path / "m.onnx", 3, {"image": (1, 3, 8, 8)})
    assert found.calibration is not None
    assert found.verify_data is not None
    assert (found.calibration.source, found.calibration.tokenizer) == ("module:feeds", "bytes")
    assert (found.verify_data.source, found.verify_data.rename) == (str(tmp_path / "images"), {"a": "b"})
    first, second = found.targets
    assert (first.name, first.text, first.settings) == ("cpu-int8", "cpu-int8", ("qdq.method=mse",))
    assert first.tolerance == {"sqnr": 20.0, "top1": 0.01}
    assert (second.name, second.text, second.settings, second.tolerance) == ("small", "cpu-int4", (), {})
    assert second.budget == {"size": 8e6}
    assert second.passes == Pipeline.parse("gptq{bits=2}")


def test_options_of_a_target_are_in_its_folder_s_name() -> None:
    found = read_recipe({"targets": ["integer{emit=[c]}", "cpu-fp32"]})
    assert [one.name for one in found.targets] == ["integer-emit-c", "cpu-fp32"]
    assert found.targets[0].target.emits == ("c",)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"model": "m"}, "names no targets"),
        ({"targets": []}, "names no targets"),
        ({"target": ["cpu-fp32"], "targets": ["cpu-fp32"]}, "both target and targets"),
        ({"modell": "m", "targets": ["cpu-fp32"]}, "unknown key 'modell'. Did you mean 'model'?"),
        ({"targets": [{"targt": "cpu-fp32"}]}, "number 1 has an unknown key 'targt'. Did you mean 'target'?"),
        ({"targets": {"a": {"target": "cpu-fp32", "tolerence": {}}}}, "Did you mean 'tolerance'?"),
        ({"targets": ["cpu-int9"]}, "there is no target 'cpu-int9'. Did you mean 'cpu-int"),
        ({"targets": ["cpu-fp32{x=1}"]}, "has no option 'x'"),
        ({"targets": ["cpu-fp32", "cpu-fp32"]}, "two targets of the recipe are called 'cpu-fp32'"),
        (
            {"targets": {"A": {"target": "cpu-fp32"}, "a": {"target": "cpu-fp16"}}},
            "two targets of the recipe are called",
        ),
        ({"targets": ["cpu-int8{cpu=x}"]}, "must be '' | vnni | avx2 | neon"),
        ({"targets": ["cpu-fp32"], "tolerance": 3}, "must be a table or a list of texts, not '3'"),
        ({"targets": [{"target": "cpu-fp32", "recipe": "no.toml"}]}, "no.toml cannot be read: No such file"),
        ({"targets": [{"name": "../up", "target": "cpu-fp32"}]}, "cannot be the name of a folder"),
        ({"targets": [{"name": "index.json", "target": "cpu-fp32"}]}, "cannot be the name of a folder"),
        ({"targets": [{"set": []}]}, "has no target = "),
        ({"targets": [{"target": "cpu-fp32", "set": ["qdqq.method=mse"]}]}, "Did you mean 'qdq'?"),
        ({"targets": [{"target": "cpu-fp32", "tolerance": {"sqrn": 3}}]}, "Did you mean 'sqnr'?"),
        ({"targets": [{"target": "cpu-fp32", "passes": "qdq", "pass": []}]}, "give one of passes, recipe"),
        ({"targets": [{"target": "cpu-fp32", "emit": ["c"]}]}, "writes no code"),
        ({"targets": ["cpu-fp32"], "seed": -1}, "seed is -1"),
        ({"targets": ["cpu-fp32"], "shapes": {"x": [0]}}, "shape of 'x'"),
        ({"targets": ["cpu-fp32"], "calib": "a", "calibration": "b"}, "both calib and calibration"),
        ({"targets": ["cpu-fp32"], "calibration": {"dat": "x"}}, "Did you mean 'data'?"),
        ({"targets": ["cpu-fp32"], "calibration": {"window": 4}}, "names no data"),
        ({"targets": ["cpu-fp32"], "calibration": 4}, "must be a table, not '4'"),
        ({"targets": 4}, "must be a list or tables"),
    ],
)
def test_faults_of_a_recipe_are_one_line(document: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(document)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "no.toml")
    with pytest.raises(UserError, match="not valid TOML"):
        read_recipe(written(tmp_path, "targets = ["))
    with pytest.raises(UserError, match="names no model"):
        build({"targets": ["cpu-fp32"]}, output=tmp_path / "out")
    with pytest.raises(UserError, match="output=FOLDER"):
        build({"targets": ["cpu-fp32"], "model": "m.onnx"})
    with pytest.raises(UserError, match="is for `qgraph build`"):
        qgraph.compile("m.onnx", "cpu-fp32", recipe=written(tmp_path, 'targets = ["cpu-fp32"]'))


# --- workers ----------------------------------------------------------------------------------------------------------


def test_workers_change_nothing_but_the_time(built: Build, network: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(network / "net.onnx"),
        "calib": str(network / "samples.npz"),
        "targets": ["cpu-int4", "cuda-int4", "integer"],
    }
    told: list[str] = []
    cache = Cache(tmp_path / "cache", tell=told.append)
    ahead: list[str] = []
    made = build(
        recipe, output=tmp_path / "out", cache=cache, workers=2, context=Context(threads=1),
        observer=lambda event: ahead.append(event.text) if event.stage == "ahead" else None,
    )  # fmt: skip
    assert sorted(ahead) == ["cpu-int4: done", "cuda-int4: done", "integer: done"]
    assert told == []
    for one in made.entries:
        assert one.artifact is not None
        assert hashes(one.artifact.path) == hashes(built[one.name].path)


def test_what_fails_in_a_worker_is_told_by_the_build(work: Path) -> None:
    text = 'model = "net.onnx"\ntargets = ["integer", "cpu-fp32"]\n'
    ahead: list[str] = []
    made = build(
        written(work, text), workers=2, context=Context(threads=1),
        observer=lambda event: ahead.append(event.text) if event.stage == "ahead" else None,
    )  # fmt: skip
    assert sorted(ahead) == ["cpu-fp32: done", "integer: left to the build (UserError)"]
    assert [one.status for one in made.entries] == ["refused", "built"]
