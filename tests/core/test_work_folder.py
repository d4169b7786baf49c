"""The work folder outlives what was stopped, vanishes with success, and is never somebody else's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from qgraph.errors import UserError
from qgraph.work_folder import SCRATCH, work_folder

NAME = f"{'0' * 32}-{'1' * 16}.npz"


def stopped(output: Path, *, resume: bool = False) -> list[str]:
    """Finish a layer and be stopped; return what was there before."""
    with pytest.raises(KeyboardInterrupt), work_folder(output, resume=resume) as folder:
        before = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        (folder / f"{SCRATCH}x").mkdir(parents=True)
        (folder / f"{SCRATCH}x" / "0.npy").write_bytes(b"a")
        (folder / NAME).write_bytes(b"b")
        (folder / NAME).with_suffix(".unfinished").write_bytes(b"c")
        raise KeyboardInterrupt
    return before


def test_what_is_finished_outlives_a_stop_and_serves_a_resumed_run(tmp_path: Path) -> None:
    output = tmp_path / "model.cpu-int4"
    assert stopped(output) == []
    work = tmp_path / "model.cpu-int4.work"
    assert [path.name for path in work.iterdir()] == [NAME]
    assert stopped(output, resume=True) == [NAME]
    assert stopped(output) == []
    with work_folder(output, resume=True) as folder:
        assert folder == work
    assert not work.exists()


def test_a_run_that_keeps_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), work_folder(tmp_path / "a", resume=False) as folder:
        folder.mkdir()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_with_nothing_to_resume_it_starts_anew(tmp_path: Path) -> None:
    with work_folder(tmp_path / "a", resume=True) as folder:
        assert not folder.exists()


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "a.work").mkdir()
    (tmp_path / "a.work" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"thesis\.txt is none of them"), work_folder(tmp_path / "a", resume=False):
        pass
    assert (tmp_path / "a.work" / "thesis.txt").read_text() == "years"
