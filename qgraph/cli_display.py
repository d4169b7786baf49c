"""What people see on standard error: a live display on a terminal, plain lines in files and pipes, or nothing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from qgraph.report.terminal import (
    STEP_WIDTH,
    before_after_rich,
    left_text,
    progress_text,
    rung_text,
    seconds_left,
    step,
    step_rich,
    to_rich,
    to_text,
    undone_text,
)
from qgraph.report.units import seconds_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, ProgressColumn, Task, TaskID
    from rich.text import Text

    from qgraph.artifact import Artifact
    from qgraph.compiler import Event
    from qgraph.report.ladder import Rung
    from qgraph.report.terminal import Table

__all__ = ["Display", "Live", "open_display"]

_BAR = 20
_EVERY = 10.0
"""Seconds between two lines on a step that goes on."""


def open_display(*, quiet: bool) -> Display:
    """Return the display that suits standard error."""
    if quiet:
        return Quiet()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Live()
    return Display()


class Display:
    """Plain lines."""

    def __init__(self) -> None:
        self._opened = time.perf_counter()
        self._running = ""
        self._count = ""
        self._done = 0
        self._since = self._told = 0.0
        self._rungs = 0
        self._metrics: dict[str, None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def line(self, text: str = "") -> None:
        """Show one or more lines."""
        self._end_progress()
        self._write(text)

    def step(self, name: str, text: str) -> None:
        """Show an aligned line: a step's name and what it did."""
        self._end_progress(superseded_by=name)
        self._write(step(name, text))

    def event(self, event: Event) -> None:
        """Show a stage of the compilation that has ended."""
        if event.stage != "write":  # the closing line says where
            self.step(event.stage, event.text)

    def rung(self, rung: Rung) -> None:
        """Show a candidate of a search, as soon as it is known what became of it."""
        self._rungs += 1
        self._metrics |= dict.fromkeys(rung.figures)
        self.step(f"search {self._rungs}", rung_text(rung, self._metrics))

    def warn(self, text: str) -> None:
        """Show a line about what is not as it should be, and costs nothing but time."""
        self.line(f"warning: {' '.join(text.split())}")

    def done(self, path: Path) -> None:
        """Show what was written, and how long all took."""
        files = "  ".join(sorted(one.name for one in path.iterdir()))
        self.line()
        self.line(f"{path}/   {files}   done in {seconds_text(time.perf_counter() - self._opened)}")

    def table(self, table: Table) -> None:
        """Show a table, which takes the place of the step that led to it."""
        self.close()
        self._write(to_text(table))

    def artifact(self, artifact: Artifact) -> None:
        """Show what has been compiled: the before/after table, then where it lies."""
        self.line()
        self._before_after(artifact)
        self.line()
        undone = (artifact.manifest.get("placement") or {}).get("undone", ())
        if undone:
            self.line(undone_text(undone))
        files = "  ".join(sorted(path.name for path in artifact.path.iterdir()))
        mark = "" if artifact.verified else "   NOT VERIFIED"
        self.line(f"{artifact.path}/   {files}{mark}   done in {seconds_text(time.perf_counter() - self._opened)}")

    def _before_after(self, artifact: Artifact) -> None:
        self._write(artifact.report.table())

    def progress(self, step: str, done: int, total: int) -> None:
        """Show how far a step is; when another begins, one line stays."""
        now = time.perf_counter()
        if step != self._running or done < self._done:
            self._end_progress(superseded_by=step)
            self._running, self._since, self._told = step, now, now
        self._count, self._done = f"{done}/{total}", done
        if now - self._told >= _EVERY and done < total:
            self._told = now
            self._go_on(step, progress_text(now - self._since, done, total))

    def _go_on(self, name: str, text: str) -> None:
        """Tell that a long step goes on."""
        self._write(step(name, text))

    def close(self) -> None:
        """End what still runs."""
        self._running = ""

    def _end_progress(self, superseded_by: str = "") -> None:
        name, self._running = self._running, ""
        if name and name != superseded_by:
            self._end_line(name, f"{self._count}   {seconds_text(time.perf_counter() - self._since)}")

    def _end_line(self, name: str, text: str) -> None:
        self._write(step(name, text))

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
        except OSError:
            # Nobody reads on, or nothing more fits; the work itself goes on.
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123


class Quiet(Display):
    """Nothing at all."""

    def _write(self, text: str) -> None:
        del text


class Live(Display):
    """A terminal: styles, and a bar for the step that runs."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console

        self._console: Console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def step(self, name: str, text: str) -> None:
        """Show an aligned line, the name in bold."""
        self._end_progress(superseded_by=name)
        self._print(step_rich(name, text))

    def table(self, table: Table) -> None:
        """Show a table with rules."""
        self.close()
        self._print(to_rich(table))

    def _before_after(self, artifact: Artifact) -> None:
        self._print(before_after_rich(artifact.report.manifest, artifact.report.bench))

    def progress(self, step: str, done: int, total: int) -> None:
        """Move the bar."""
        super().progress(step, done, total)
        if self._bars is None or self._task is None:
            self._bars = _bars(self._console)
            self._bars.start()
            self._task = self._bars.add_task(step, total=total)
        self._bars.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away."""
        super().close()
        self._stop_bars()

    def _end_progress(self, superseded_by: str = "") -> None:
        self._stop_bars()
        super()._end_progress(superseded_by)

    def _go_on(self, name: str, text: str) -> None:
        del name, text  # the bar tells

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None

    def _end_line(self, name: str, text: str) -> None:
        self._print(step_rich(name, f"{'█' * _BAR} {text}"))

    def _write(self, text: str) -> None:
        from rich.text import Text

        self._print(Text(text))

    def _print(self, thing: RenderableType) -> None:
        self._console.print(thing)


def _bars(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        TextColumn(f"{{task.description:<{STEP_WIDTH - 1}}}", style="bold", markup=False),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _time_left(),
        console=console,
        transient=True,
    )


def _time_left() -> ProgressColumn:
    """Return a column with the time left: that of all done so far, for units may take longer than anybody waits."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        """The time left, counted down between two units."""

        max_refresh = 0.5

        def __init__(self) -> None:
            super().__init__()
            self._ends: dict[tuple[TaskID, float], float] = {}

        def render(self, task: Task) -> Text:
            elapsed = task.elapsed or 0.0
            key = (task.id, task.completed)
            if key not in self._ends:
                left = seconds_left(elapsed, int(task.completed), int(task.total or 0))
                if left is None:
                    return Text("")
                self._ends = {key: elapsed + left}
            left = max(self._ends[key] - elapsed, 0.0)
            return Text(left_text(left) if left else "", style="dim")

    return TimeLeft()
