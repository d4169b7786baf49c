"""The artifact on disk: written whole or not at all, and refused when it was tampered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qgraph.artifact import open_artifact, refuse_existing, staging, write_manifest
from qgraph.errors import UserError

FACTS = {
    "source": {"name": "m.onnx", "bytes": 10, "sha256": "0"},
    "target": "cpu-int8",
    "inputs": [],
    "outputs": [],
    "verified": True,
}


def write(folder: Path, content: bytes = b"model") -> Path:
    with staging(folder, force=False) as stage:
        (stage / "model.onnx").write_bytes(content)
        (stage / "report.html").write_text("timings")
        write_manifest(stage, FACTS)
    return folder


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_artifact_opens(tmp_path: Path) -> None:
    artifact = open_artifact(write(tmp_path / "a"))
    assert artifact.verified
    assert artifact.manifest["files"]["model.onnx"]["bytes"] == 5
    assert leftovers(tmp_path) == ["a"]


def test_the_manifest_hashes_what_is_deployed_and_not_what_holds_timings(tmp_path: Path) -> None:
    artifact = open_artifact(write(tmp_path / "a"))
    assert set(artifact.manifest["files"]) == {"model.onnx"}
    (tmp_path / "a" / "report.html").write_text("other timings")
    open_artifact(tmp_path / "a")


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), UserError("bad input")])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staging(tmp_path / "a", force=False) as stage:
        (stage / "model.onnx").write_bytes(b"half")
        raise error
    assert leftovers(tmp_path) == []


def test_an_existing_artifact_needs_force(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with pytest.raises(UserError, match="--force"):
        write(folder)
    with staging(folder, force=True) as stage:
        (stage / "model.onnx").write_bytes(b"newer")
        write_manifest(stage, FACTS)
    assert (folder / "model.onnx").read_bytes() == b"newer"
    assert leftovers(tmp_path) == ["a"]


def test_force_keeps_the_old_artifact_when_the_new_one_fails(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with pytest.raises(RuntimeError), staging(folder, force=True) as stage:
        (stage / "model.onnx").write_bytes(b"half")
        raise RuntimeError
    assert (folder / "model.onnx").read_bytes() == b"model"
    assert leftovers(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["notes.txt", "sub/weights.bin"])
def test_force_never_removes_what_is_no_part_of_the_artifact(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "a")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("precious")
    with pytest.raises(UserError, match=f"holds {name}, which is no part"), staging(folder, force=True):
        pass
    assert (folder / name).read_text() == "precious"


@pytest.mark.parametrize("manifest", ["{}", "[]", "no JSON", '{"name": "a web page", "icons": []}'])
def test_force_never_replaces_a_folder_with_the_manifest_of_something_else(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="no qgraph artifact"), staging(tmp_path, force=True):
        pass
    assert leftovers(tmp_path) == ["manifest.json"]


def test_force_never_replaces_the_source_or_follows_a_link(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with pytest.raises(UserError, match="holds the model to compile"):
        refuse_existing(folder, force=True, source=folder / "model.onnx")
    refuse_existing(folder, force=True, source=tmp_path / "model.onnx")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="is a link"):
        refuse_existing(tmp_path / "link", force=True)


def test_force_never_replaces_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(UserError, match="no qgraph artifact"), staging(tmp_path / "thesis", force=True):
        pass
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), staging(tmp_path / "file" / "a", force=False):
        pass


def tamper_content(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"m0del")


def tamper_missing(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def tamper_escape(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["files"].update({"../m.onnx": {"bytes": 1, "sha256": ""}}))


def tamper_absolute(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["files"].update({"/etc/hostname": {"bytes": 1, "sha256": ""}}))


def tamper_link(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes(b"model")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(outside)


def tamper_newer(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.update(format=99))


def tamper_keys(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.pop("target"))


def tamper_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def tamper_unlisted(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["files"].pop("model.onnx"))


def edit(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (tamper_content, "hash differs"),
        (tamper_missing, "missing"),
        (tamper_escape, "leaves the artifact's folder"),
        (tamper_absolute, "leaves the artifact's folder"),
        (tamper_link, "leaves the artifact's folder"),
        (tamper_newer, "Update qgraph"),
        (tamper_keys, "'target' is missing"),
        (tamper_json, "cannot be read"),
        (tamper_unlisted, "no hash of model.onnx"),
    ],
)
def test_a_tampered_artifact_is_refused(tmp_path: Path, tamper, message: str) -> None:
    folder = write(tmp_path / "a")
    tamper(folder)
    with pytest.raises(UserError, match=message):
        open_artifact(folder)


def test_opening_something_else_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_artifact(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no qgraph artifact"):
        open_artifact(tmp_path)


def test_of_two_runs_the_first_to_end_keeps_its_place_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    killed = tmp_path / ".a.killed.tmp"
    killed.mkdir()
    (killed / "model.onnx").write_bytes(b"half")
    with pytest.raises(UserError, match="exists"), staging(tmp_path / "a", force=False) as slower:
        assert not killed.exists()
        write(tmp_path / "a", b"faster")
        assert slower.is_dir()  # it is held, so that it is no orphan
    assert (tmp_path / "a" / "model.onnx").read_bytes() == b"faster"
    assert leftovers(tmp_path) == ["a"]
