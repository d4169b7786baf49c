"""The folder beside an artifact where long passes keep what they have finished: OUTPUT.work.

It appears when a pass keeps something, outlives a run that is stopped, and vanishes when the artifact is written. What
is in it is only ever what passes have put there; a folder of that name with anything else in it is refused.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qgraph.errors import UserError

__all__ = ["SCRATCH", "name_of", "work_folder"]

SCRATCH = "scratch-"
"""Beginning of the names of folders whose contents are of no use to another run."""
_FINISHED = re.compile(r"[0-9a-f-]{16,}\.(npz|unfinished)")


def name_of(output: Path) -> Path:
    """Return the work folder of an artifact."""
    return output.with_name(f"{output.name}.work")


@contextlib.contextmanager
def work_folder(output: Path, *, resume: bool, resumable: bool = True) -> Iterator[Path]:
    """Give the work folder of `output`, which may not exist yet; remove it if the block ends well.

    Args:
        output: the artifact's folder.
        resume: keep what a run before has finished, if there was one; otherwise it is removed now.
        resumable: leave what is finished where the block breaks off, since another run can go on from it.

    Raises:
        UserError: what stands there is no work folder.
    """
    folder = name_of(output)
    _require_ours(folder)
    _clear(folder, everything=not resume)
    try:
        yield folder
    except BaseException:
        _clear(folder, everything=not resumable)
        raise
    _clear(folder, everything=True)


def _require_ours(folder: Path) -> None:
    if not folder.exists():
        return
    foreign = next((one for one in sorted(folder.iterdir()) if not _is_ours(one)), None) if folder.is_dir() else folder
    if foreign is not None:
        raise UserError(
            f"{folder} is needed to keep finished layers, but {foreign} is none of them. Choose another -o."
        )


def _is_ours(path: Path) -> bool:
    return path.name.startswith(SCRATCH) if path.is_dir() else bool(_FINISHED.fullmatch(path.name))


def _clear(folder: Path, *, everything: bool) -> None:
    """Remove what is of no use any more, and the folder if it is empty then."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif everything or path.suffix != ".npz":
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
