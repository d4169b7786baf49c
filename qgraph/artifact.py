"""The artifact on disk: a directory with the deployable files, a manifest that proves them, and a report.

    model.onnx      or the target's own files
    manifest.json   what was done to what, and the SHA-256 of every deployable file
    recipe.toml     the pipeline, to repeat it
    report.html     one self-contained page
    bench.json      what was timed, where

Model files, manifest and recipe are byte-identical for identical input, options and seed; only report.html and
bench.json hold timings, and the manifest does not hash those two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qgraph.errors import UserError
from qgraph.manifest import FORMAT, MANIFEST, checked_manifest, read_json, sha256
from qgraph.report.terminal import before_after
from qgraph.target_options import target_of
from qgraph.targets.base import Session, Target

__all__ = [
    "INDEX",
    "INDEX_PAGE",
    "Artifact",
    "ArtifactReport",
    "open_artifact",
    "refuse_existing",
    "staging",
    "write_manifest",
]

INDEX, INDEX_PAGE = "index.json", "index.html"
"""What lists the artifacts of a build, in the folder that holds theirs."""
UNHASHED = frozenset({MANIFEST, "report.html", "bench.json"})


@dataclasses.dataclass(frozen=True)
class ArtifactReport:
    """The figures of an artifact: the manifest's, and the timings where they were taken."""

    manifest: Mapping[str, Any]
    bench: Mapping[str, Any] | None

    def table(self) -> str:
        """Return the before/after table that the command line prints: size, latency, output, accuracy."""
        return before_after(self.manifest, self.bench)


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled model on disk whose hashes were checked."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def verified(self) -> bool:
        """Whether the result was run against its source and met every tolerance that was set."""
        return bool(self.manifest["verified"])

    @property
    def target(self) -> Target:
        """The target that the artifact was compiled for."""
        return target_of(self.manifest)

    @property
    def source(self) -> Path:
        """Where the model that it was compiled from should lie: beside it, or where the index of its build says."""
        folder = self.path.resolve().parent
        beside = folder / self.manifest["source"]["name"]
        told = _source_of_build(folder)
        return beside if told is None or beside.is_file() else told

    @property
    def report(self) -> ArtifactReport:
        """The figures, with the timings of bench.json where there is one."""
        bench = self.path / "bench.json"
        return ArtifactReport(self.manifest, read_json(bench) if bench.is_file() else None)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: path, whether it is verified, manifest, and timings where there are any."""
        report = self.report
        return {"path": str(self.path), "verified": self.verified, "manifest": report.manifest, "bench": report.bench}

    def session(self, *, threads: int = 0) -> Session:
        """Open the model for running, like an ONNX Runtime session.

        Raises:
            UserError: the runtime is not installed.
        """
        return self.target.session(self.path, threads=threads)

    def run(self, output_names: list[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        """Run one feed in a new session; open `session()` once to run many."""
        return self.session().run(output_names, feeds)


def _source_of_build(folder: Path) -> Path | None:
    """Return the model that the build in a folder was made from, as its index says; None where there is none."""
    if not (folder / INDEX).is_file():
        return None
    try:
        path = read_json(folder / INDEX)["source"]["path"]
    except (UserError, TypeError, KeyError):
        return None
    return Path(os.path.normpath(folder / path)) if isinstance(path, str) else None


@contextlib.contextmanager
def staging(output: Path, *, force: bool) -> Iterator[Path]:
    """Give a temporary folder beside `output` that becomes `output` when the block ends well, and vanishes otherwise.

    Args:
        output: the artifact's folder.
        force: replace an artifact that is there; a folder that holds anything else is never replaced.

    Raises:
        UserError: `output` exists and may not be replaced, or cannot be written.
    """
    refuse_existing(output, force=force)
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(output)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"{output} cannot be written: {error.strerror}. Choose another folder with -o.") from None
    try:
        with _claimed(folder):
            with _told_of(folder, output):
                yield folder
            refuse_existing(output, force=force)  # another run may have written it meanwhile
            _replace(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(made)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Hold a lock on a folder, which ends with the process however that ends; tell whether it could be had."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # no such locks here
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _remove_orphans(output: Path) -> None:
    """Remove the temporary folders of runs for the same output that were killed: nobody holds them any more."""
    for path in sorted(output.parent.iterdir()):
        if path.name.startswith(f".{output.name}.") and path.suffix == ".tmp" and path.is_dir():
            with _claimed(path) as orphaned:
                if orphaned:
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _told_of(folder: Path, output: Path) -> Iterator[None]:
    """Let what goes wrong in the temporary `folder` name `output`, the only place that the user knows."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(folder)):
            raise
        raise UserError(f"{output} cannot be written: {error.strerror or error}. Nothing was left behind.") from None
    except UserError as error:
        if str(folder) not in str(error):
            raise
        raise UserError(f"{str(error).replace(str(folder), str(output))}. Nothing was left behind.") from error


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def refuse_existing(output: Path, *, force: bool, source: Path | None = None) -> None:
    """Raise a UserError when `output` exists and may not be replaced.

    Args:
        output: the artifact's folder.
        force: it may be replaced if all that it holds is one artifact, without `source`.
        source: the model that is compiled.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise UserError(f"{output} exists. Pass --force to replace it, or another folder with -o.")
    if output.is_symlink():
        raise UserError(f"{output} is a link, which --force will not replace. Name the folder itself with -o.")
    written = _written_files(output)
    if written is None:
        raise UserError(
            f"{output} exists and is no qgraph artifact, so --force will not replace it. Choose another -o."
        )
    if source is not None and source.resolve().is_relative_to(output.resolve()):
        raise UserError(f"{output} holds the model to compile, so --force will not replace it. Choose another -o.")
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if name not in written and (path.is_symlink() or not path.is_dir()):
            raise UserError(
                f"{output} holds {name}, which is no part of the artifact, so --force will not replace it. "
                "Move it away, or choose another -o."
            )


def _written_files(folder: Path) -> frozenset[str] | None:
    """Return the names of the files that the artifact or the build in `folder` was written with, or None."""
    if (folder / INDEX).is_file():
        return _written_by_build(folder)
    try:
        manifest = read_json(folder / MANIFEST)
    except UserError:
        return None
    files = manifest.get("files")
    if not isinstance(manifest.get("format"), int) or not isinstance(files, dict):
        return None
    return UNHASHED.union(files)


def _written_by_build(folder: Path) -> frozenset[str] | None:
    try:
        entries = read_json(folder / INDEX).get("targets")
        inner = [entry["folder"] for entry in entries or () if entry["folder"] is not None]
    except (UserError, TypeError, KeyError):
        return None
    names = {INDEX, INDEX_PAGE}
    for one in inner:
        files = _written_files(folder / str(one)) if (folder / str(one)).parent == folder else None
        names.update(f"{one}/{name}" for name in files or ())
    return frozenset(names)


def _replace(folder: Path, output: Path) -> None:
    folder.chmod(0o755 & ~_umask())
    try:
        if not output.exists():
            folder.rename(output)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
        output.rename(old / "artifact")
        try:
            folder.rename(output)
        except OSError:
            (old / "artifact").rename(output)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}. Choose another folder with -o.") from None


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Hash every deployable file in `folder` and write `facts` and the hashes as manifest.json; return the manifest."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in UNHASHED
    }
    manifest = {"format": FORMAT, **facts, "files": files}
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact and check the hash of every file.

    Raises:
        UserError: it is no artifact, was written by a newer version, names files outside its folder, or a file is
            missing or differs from its hash.
    """
    return Artifact(Path(path), checked_manifest(path))
