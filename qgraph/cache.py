"""What long steps have made, kept on disk under a key of everything that it depends on.

    DIR/CACHE             "qgraph cache, format 1": nothing is read or removed in a folder that does not say so
    DIR/KEY/              an entry: files, and entry.json with the hash of each
    DIR/.KEY.xxxx.tmp     one that is being written; whoever finds it abandoned removes it

Entries appear by renaming a folder, so that several processes may share a cache: of two that make the same, one entry
stays, and nobody reads a half-written one. Every entry is checked when it is read; one that is damaged is removed, with
a warning, and made anew. Nothing in an entry is code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qgraph.errors import UserError
from qgraph.manifest import read_json, sha256

__all__ = ["Cache", "key_of"]

FORMAT = 1
_MARK = "CACHE"
_TEXT = f"qgraph cache, format {FORMAT}\n"
_ENTRY = "entry.json"
_CLAIMS = ".claims.tmp"
"""A file of which a byte is locked for every key that a process works at."""
_ABANDONED = 24 * 3600.0
"""Seconds after which a folder that is being written belongs to nobody any more."""
_IN_USE = 3600.0
"""Seconds for which an entry that was read is kept whatever the size: its files may still be mapped."""


def key_of(*parts: object) -> str:
    """Return 64 hexadecimal digits of the texts of `parts`: the key of what depends on nothing else."""
    digest = hashlib.sha256()
    for part in parts:
        text = str(part).encode()
        digest.update(f"{len(text)}:".encode())
        digest.update(text)
    return digest.hexdigest()


class Cache:
    """A folder of entries.

    Args:
        folder: is made if need be.
        limit: bytes; the entries that were not used for longest are removed when it is exceeded. None for any size.
        tell: called with a line about what is damaged or cannot be kept; a Python warning by default.

    Raises:
        UserError: it is a file, holds other things, was written in another format, or cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, limit: int | None = None, tell: Callable[[str], None] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.tell = tell or _warn
        self._limit = limit
        self._claim()

    def _claim(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark = self.folder / _MARK
            if not mark.is_file():
                foreign = next((one.name for one in sorted(self.folder.iterdir()) if not _is_ours(one)), None)
                if foreign is not None:
                    raise UserError(
                        f"the cache {self.folder} holds {foreign}, so it is no cache of qgraph's: name an empty folder"
                    )
                self._write_mark(mark)
            found = mark.read_text(encoding="utf-8", errors="replace")
            handle, probe = tempfile.mkstemp(prefix=".probe.", suffix=".tmp", dir=self.folder)
            os.close(handle)
            Path(probe).unlink()
        except FileExistsError:
            raise UserError(f"the cache {self.folder} is a file: name a folder with --cache") from None
        except NotADirectoryError:
            raise UserError(f"the cache {self.folder} lies under a file: name another folder with --cache") from None
        except OSError as error:
            raise UserError(f"the cache {self.folder} cannot be written: {error.strerror}. Name another.") from None
        if found != _TEXT:
            raise UserError(
                f"the cache {self.folder} was written in another format ({found.strip()[:60] or 'unknown'}): "
                "remove it, or name another folder"
            )

    def _write_mark(self, mark: Path) -> None:
        handle, name = tempfile.mkstemp(prefix=".mark.", suffix=".tmp", dir=self.folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(_TEXT)
        Path(name).replace(mark)

    def find(self, key: str) -> tuple[Path, dict[str, Any]] | None:
        """Return the folder of an entry and its facts, or None where there is none that is sound."""
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            facts = _checked(folder, key)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            if not folder.is_dir():  # another process has removed it
                return None
            self.tell(f"{folder} in the cache is damaged and made anew: {str(error) or type(error).__name__}")
            self.drop(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(folder)
        return folder, facts

    def holds(self, key: str) -> bool:
        """Tell whether there is an entry, sound or not."""
        return (self.folder / key).is_dir()

    def keep(self, key: str, write: Callable[[Path], dict[str, Any] | None]) -> bool:
        """Make an entry; tell whether there is one now. A full or vanished disk costs the entry, not the work.

        Args:
            key: of the entry.
            write: writes files into an empty folder and returns facts as JSON values, or None where there is nothing
                that could be kept.
        """
        if self.holds(key):
            return True
        try:
            with self._unfinished(key) as folder:
                facts = write(folder)
                if facts is None:
                    return False
                _seal(folder, key, facts)
                with contextlib.suppress(OSError):  # another process was first
                    folder.rename(self.folder / key)
        except (OSError, UserError) as error:
            told = getattr(error, "strerror", None) or error
            self.tell(f"the cache {self.folder} cannot keep what was made: {told}")
            return False
        self._shrink()
        return True

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Hold a key against other processes; tell whether it could be had. The claim ends with the process."""
        try:
            import fcntl
        except ImportError:  # no such locks here: two processes may make the same
            yield True
            return
        with (self.folder / _CLAIMS).open("ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:12], 16))
            except OSError:
                yield False
            else:
                yield True

    def drop(self, key: str) -> None:
        """Remove an entry: renamed first, so that nobody finds half of it."""
        with contextlib.suppress(OSError), self._unfinished(key) as folder:
            (self.folder / key).rename(folder / "dropped")

    @contextlib.contextmanager
    def _unfinished(self, key: str) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix=f".{key[:16]}.", suffix=".tmp", dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _shrink(self) -> None:
        """Remove what was abandoned, and the entries that were not used for longest while all need too much room."""
        now = time.time()
        for path in self.folder.glob(".*.tmp"):
            if now - _age(path) > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
        if self._limit is None:
            return
        entries = sorted((path for path in self.folder.iterdir() if path.is_dir() and _is_key(path.name)), key=_age)
        sizes = {path: sum(file.stat().st_size for file in _files(path)) for path in entries}
        room = sum(sizes.values()) - self._limit
        for path in entries:
            if room <= 0 or now - _age(path) < _IN_USE:
                return
            room -= sizes[path]
            self.drop(path.name)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _is_ours(path: Path) -> bool:
    return _is_key(path.name) or (path.name.startswith(".") and path.name.endswith(".tmp"))


def _is_key(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != _ENTRY)


def _seal(folder: Path, key: str, facts: dict[str, Any]) -> None:
    hashes = {path.name: sha256(path) for path in _files(folder)}
    body = json.dumps({"facts": facts, "files": hashes}, allow_nan=True)
    (folder / _ENTRY).write_text(json.dumps({"body": body, "sha256": key_of(key, body)}), encoding="utf-8")


def _checked(folder: Path, key: str) -> dict[str, Any]:
    """Return the facts of an entry whose files are all there and unchanged.

    Raises:
        UserError, ValueError, KeyError, TypeError, AttributeError, OSError: it is damaged.
    """
    sealed = read_json(folder / _ENTRY)
    if sealed["sha256"] != key_of(key, sealed["body"]):
        raise UserError(f"the hash of its {_ENTRY} differs")
    body = json.loads(sealed["body"])
    if {path.name for path in _files(folder)} != set(body["files"]):
        raise UserError("files are missing, or there are others")
    for name, wanted in body["files"].items():
        if sha256(folder / name) != wanted:
            raise UserError(f"the hash of {name} differs")
    facts: dict[str, Any] = body["facts"]
    return facts
