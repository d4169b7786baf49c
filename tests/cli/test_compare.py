"""`qgraph compare`: artifacts of one model beside each other, in the terminal, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph as package
from qgraph import cli
from qgraph.comparison import compare_artifacts
from qgraph.errors import UserError
from qgraph.report.side_by_side import Contender, SideBySide, render, terminal_table
from qgraph.report.terminal import to_text

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def three(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the model and three artifacts of it: dynamic, static, float."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copy(originals / "model.onnx", folder)
    for name, target, passes in (("a", "cpu-int8", "dynamic-int8"), ("b", "cpu-int8", "qdq"), ("c", "cpu-fp32", None)):
        package.compile(
            folder / "model.onnx", target, output=folder / name, passes=passes, calibration=originals / "calib.npz"
        )
    return folder


def test_what_the_manifests_say_stands_side_by_side(three: Path):
    found = compare_artifacts([three / "a", three / "b", three / "c"])
    assert [one.label for one in found.contenders] == ["a", "b", "c"]
    for one in found.contenders:
        manifest = json.loads((three / one.label / "manifest.json").read_text())
        bench = json.loads((three / one.label / "bench.json").read_text())
        (output,) = manifest["verification"]["outputs"]
        assert one.target == manifest["target"]
        assert one.bytes == manifest["files"]["model.onnx"]["bytes"]
        assert one.sqnr_db == output["sqnr_db"]
        assert one.cosine == output["cosine"]
        assert one.agreement == output["top1_agreement"]
        assert one.accuracy == manifest["verification"]["accuracy_after"]
        assert one.speedup == pytest.approx(bench["candidates"][1]["times_faster"])
        assert one.left_alone == len(manifest["skipped"]) + len(manifest["kernels"]["left_in_float"])
        assert one.kernels["integer"] == sum(manifest["kernels"]["integer"].values())
    assert found.source == "model.onnx"


def test_the_terminal_and_the_page_tell_the_same(qgraph: Run, work: Path, three: Path):
    done = qgraph("compare", three / "a", three / "b", "-o", "page.html", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [one["label"] for one in document["artifacts"]] == ["a", "b"]
    assert document["benchmark"] is None
    page = (work / "page.html").read_text(encoding="utf-8")
    for one in document["artifacts"]:
        for told in (f"{one['sqnr_db']:.1f} dB", f"{one['cosine']:.5f}", one["target"], one["pipeline"]):
            assert told in done.stderr
            assert told in page
    assert not re.search(r"url\(|@import|https?://|<script", page)
    assert done.stderr.splitlines()[-1] == "page.html"


def test_a_long_pipeline_does_not_fill_the_terminal(three: Path):
    found = compare_artifacts([three / "a", three / "b"])
    long = dataclasses.replace(found.contenders[0], pipeline=f"qdq{{exclude=[{','.join('n' * 9 for _ in range(99))}]}}")
    rows = terminal_table(dataclasses.replace(found, contenders=[long, found.contenders[1]])).rows
    assert len(rows[0][-1]) <= 160
    assert rows[1][-1] == "qdq"


def test_timing_all_in_turn(three: Path):
    found = compare_artifacts([three / "a", three / "c"], bench=True, seconds=0.1)
    assert found.benchmark is not None
    assert [one["name"] for one in found.benchmark["candidates"]] == ["source", "a", "c"]
    for one in found.contenders:
        assert one.speedup == pytest.approx(found.source_seconds / one.seconds)
    json.dumps(found.to_json(), allow_nan=False)


def test_timing_on_given_samples_without_the_source(three: Path, tmp_path: Path, originals: Path):
    for name in ("a", "b"):
        shutil.copytree(three / name, tmp_path / name)
    found = compare_artifacts([tmp_path / "a", tmp_path / "b"], bench=True, seconds=0.1, data=originals / "calib.npz")
    assert [one.speedup for one in found.contenders] == [None, None]
    assert all(one.seconds for one in found.contenders)
    assert found.source_seconds is None
    Page(render(found))


def test_folders_of_one_name_are_told_apart(three: Path, tmp_path: Path):
    for name in ("first", "second"):
        shutil.copytree(three / "a", tmp_path / name / "out")
    found = compare_artifacts([tmp_path / "first" / "out", tmp_path / "second" / "out"])
    assert [one.label for one in found.contenders] == ["first/out", "second/out"]


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """Return an artifact of another model."""
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }
    """)
    ir.save(model, tmp_path / "other.onnx")
    package.compile(tmp_path / "other.onnx", "cpu-fp32", output=tmp_path / "stranger")
    return tmp_path / "stranger"


def test_bad_input_is_told_in_one_line(
    work: Path, three: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(work)
    (work / "page.html").write_text("mine")
    (work / "folder").mkdir()
    shutil.copytree(three / "a", work / "damaged")
    with (work / "damaged" / "model.onnx").open("ab") as file:
        file.write(b"x")
    a, b = three / "a", three / "b"
    for arguments, told in (
        ((a,), "name two artifacts or more"),
        ((), "Missing argument 'ARTIFACT...'"),
        ((a, a), "comes twice"),
        ((a, work / "model.onnx"), "is no qgraph artifact"),
        ((a, work / "nowhere"), "does not exist"),
        ((a, work / "damaged"), "was changed after it was compiled"),
        ((a, stranger), f"{stranger} was compiled from 'other.onnx', and {a} from 'model.onnx'"),
        ((stranger, a, b), f"{stranger} was compiled from 'other.onnx'"),
        ((a, b, "-o", "page.html"), "page.html exists. Pass --force"),
        ((a, b, "-o", "folder"), "folder is a folder"),
        ((a, b, "--bench", "--data", "nothing.npz"), "nothing.npz"),
    ):
        assert cli.main(["compare", *map(str, arguments)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert told in shown.err
        assert shown.err.count("\n") == 1
    assert (work / "page.html").read_text() == "mine"
    assert cli.main(["compare", str(a), str(b), "-o", "page.html", "--force", "-q"]) == 0
    assert (work / "page.html").read_text().startswith("<!doctype html>")


def test_a_manifest_with_strange_figures(three: Path, tmp_path: Path):
    shutil.copytree(three / "a", tmp_path / "a")
    shutil.copytree(three / "a", tmp_path / "b")
    path = tmp_path / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    for key, value in (("verification", {"samples": 3}), ("placement", {"kernels": 3}), ("pipeline", [])):
        path.write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(UserError, match="damaged"):
            compare_artifacts([tmp_path / "a", tmp_path / "b"])
    path.write_text(json.dumps(manifest))
    (tmp_path / "b" / "bench.json").write_text('{"candidates": [{"name": "after"}]}')
    with pytest.raises(UserError, match=r"bench\.json is damaged"):
        compare_artifacts([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b" / "bench.json").unlink()
    assert compare_artifacts([tmp_path / "a", tmp_path / "b"]).contenders[1].seconds is None


class Page(HTMLParser):
    """Gathers the words of a page and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text: str) -> None:
        self.words.append(text)


def made_up(count: int, **changes) -> SideBySide:
    contenders = tuple(
        Contender(
            **{
                "label": f"artifact-{i}",
                "path": f"artifact-{i}",
                "target": "cpu-int8",
                "pipeline": "qdq",
                "verified": True,
                "bytes": 1_000_000 * (i + 1),
                "seconds": 0.001 * (count - i),
                "speedup": 4.0 / (count - i),
                "sqnr_db": 20.0 + i,
                "cosine": 0.99,
                "samples": 10,
                **changes,
            }
        )
        for i in range(count)
    )
    return SideBySide("m.onnx", 10_000_000, "ab" * 32, contenders)


def test_labels_decide_what_the_front_is_of():
    plain = Page(render(made_up(3)))
    assert "SQNR against size" in str([one for _, one in plain.elements])
    labelled = Page(render(made_up(3, accuracy_before=0.9, accuracy=0.89)))
    assert "top-1 loss against size" in str([one for _, one in labelled.elements])
    assert "89.00 % (-1.00)" in labelled.text


def test_what_is_not_measured_is_left_out():
    bare = made_up(2, seconds=None, speedup=None, sqnr_db=None, cosine=None, exact=True)
    page = Page(render(bare))
    assert "latency" not in [word.strip() for word in page.words]
    assert "exact" in page.text
    assert not any(tag == "circle" for tag, _ in page.elements)
    assert "exact" in to_text(terminal_table(bare))


def test_names_cannot_break_out_and_the_page_stays_small():
    evil = "<script>alert(1)</script>\"'\x00\u202e" * 40
    found = made_up(500, label=evil, target=evil, pipeline=evil * 10, data=evil, verified=False)
    text = render(SideBySide(evil, 1, evil, found.contenders))
    assert "<script" not in text
    assert len(text.encode()) < 2_000_000
    assert not any(name.startswith("on") for _, attributes in Page(text).elements for name in attributes)


def test_the_help_shows_an_artifact_list(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compare", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: qgraph compare [OPTIONS] ARTIFACT...")


def test_feeds_are_those_of_the_first_artifact(three: Path, tmp_path: Path):
    np.savez(tmp_path / "wrong.npz", y=np.zeros((2, 3), np.float32))
    with pytest.raises(UserError, match="'x'"):
        compare_artifacts([three / "a", three / "b"], bench=True, data=tmp_path / "wrong.npz")
