"""What lies around a build: the disk that it is written to, and the model that it was made from."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import small_network

import qgraph.ir
from qgraph.builder import Build, build
from qgraph.compiler import verify
from qgraph.errors import UserError, is_disk_full
from qgraph.pipeline import Context
from qgraph.verbs import bench
from qgraph.work_folder import work_folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a folder with net.onnx, samples.npz and r.toml."""
    small_network.write(tmp_path)
    text = 'model = "net.onnx"\ncalib = "samples.npz"\ntargets = ["cpu-fp32", "cpu-int4"]\n'
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def built(work: Path) -> Build:
    return build(work / "r.toml", output=work / "out" / "made", context=Context(threads=1))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("recipe", [None, 3, ["cpu-fp32"]])
def test_what_is_no_recipe_is_told(recipe: object) -> None:
    with pytest.raises(
        UserError, match=r"^a recipe is a TOML file, or a table of what one holds, not (a list|'3'|a None)"
    ):
        build(recipe)  # type: ignore[arg-type]


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_build_and_leaves_nothing(work: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    save, before = qgraph.ir.save, files(work)

    def full(model: object, path: Path, **options: object) -> None:
        if "cpu-int4" in str(path):
            path.write_bytes(b"half")
            try:
                raise OSError(code, "No space left on device", str(path))
            except OSError as error:
                raise UserError(f"{path} cannot be written: {error.strerror}") from error
        save(model, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(qgraph.ir, "save", full)
    with pytest.raises(UserError, match=r"^the disk is full: .*while cpu-int4 was made .*Free some room") as caught:
        build(work / "r.toml", context=Context(threads=1))
    assert "\n" not in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert files(work) == before


def test_a_disk_that_fills_up_within_a_pass_is_told_alike(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(work)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qgraph.analysis.finished_layers._write", full)
    with pytest.raises(UserError, match=r"^the disk is full: "):
        build(work / "r.toml", context=Context(threads=1))
    assert files(work) == before


def test_a_full_disk_is_known_through_what_it_was_told_as() -> None:
    def told(error: OSError) -> UserError:
        try:
            try:
                raise error
            except OSError:
                raise UserError("x cannot be written") from None
        except UserError as told:
            return told

    assert is_disk_full(told(OSError(errno.ENOSPC, "full")))
    assert not is_disk_full(told(OSError(errno.EACCES, "forbidden")))
    assert not is_disk_full(UserError("x"))
    assert not is_disk_full(None)


def test_finished_layers_stay_only_where_another_run_can_take_them_up(tmp_path: Path) -> None:
    for resumable in (False, True):
        with pytest.raises(UserError), work_folder(tmp_path / "a", resume=False, resumable=resumable) as folder:
            folder.mkdir()
            (folder / f"{'0' * 16}.npz").write_bytes(b"")
            raise UserError("stopped")
        assert folder.exists() is resumable


# --- the source -------------------------------------------------------------------------------------------------------


def test_an_artifact_of_a_build_finds_its_source_by_the_index(built: Build, work: Path, tmp_path: Path) -> None:
    assert built.source["path"] == json.loads((built.path / "index.json").read_text())["source"]["path"]
    assert built.source["path"] == "../../net.onnx"
    assert built["cpu-int4"].source == work / "net.onnx"
    found = verify(built.path / "cpu-int4", context=Context(threads=1))
    assert found.outputs[0].name == "scores"
    assert "before" in {one.name for one in bench(built.path / "cpu-fp32", seconds=0.01).benchmark.candidates}


def test_a_source_beside_the_artifact_comes_first(built: Build, work: Path) -> None:
    beside = shutil.copyfile(work / "net.onnx", built.path / "net.onnx")
    assert built["cpu-int4"].source == beside


@pytest.mark.parametrize("text", ["{}", "[]", "no", '{"source": {"path": 3}}', '{"source": 1}'])
def test_an_index_that_tells_nothing_is_passed_over(built: Build, text: str) -> None:
    (built.path / "index.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"the source net\.onnx is not at .*Say where it is with --source"):
        verify(built.path / "cpu-int4")


def test_a_source_that_has_moved_or_changed_is_told(built: Build, work: Path) -> None:
    model = qgraph.ir.load(work / "net.onnx")
    model.graph.name = "another"
    qgraph.ir.save(model, work / "other.onnx")
    (work / "other.onnx").replace(work / "net.onnx")
    with pytest.raises(UserError, match="its hash differs"):
        verify(built.path / "cpu-int4")
    (work / "net.onnx").unlink()
    with pytest.raises(UserError, match="Say where it is with --source"):
        verify(built.path / "cpu-int4")
