"""What people see on standard error: a live display on a terminal, plain lines in files and pipes, or nothing."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Self

from qgraph.report.terminal import STEP_WIDTH, before_after_rich, step, step_rich, to_rich, to_text
from qgraph.report.units import seconds_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

    from qgraph.artifact import Artifact
    from qgraph.compiler import Event
    from qgraph.report.terminal import Table

__all__ = ["Display", "Live", "open_display"]

_BAR = 20


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
        self._since = 0.0

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

    def table(self, table: Table) -> None:
        """Show a table, which takes the place of the step that led to it."""
        self.close()
        self._write(to_text(table))

    def artifact(self, artifact: Artifact) -> None:
        """Show what has been compiled: the before/after table, then where it lies."""
        self.line()
        self._before_after(artifact)
        self.line()
        files = "  ".join(sorted(path.name for path in artifact.path.iterdir()))
        mark = "" if artifact.verified else "   NOT VERIFIED"
        self.line(f"{artifact.path}/   {files}{mark}   done in {seconds_text(time.perf_counter() - self._opened)}")

    def _before_after(self, artifact: Artifact) -> None:
        self._write(artifact.report.table())

    def progress(self, step: str, done: int, total: int) -> None:
        """Show how far a step is; when another begins, one line stays."""
        if step != self._running:
            self._end_progress()
            self._running, self._since = step, time.perf_counter()
        self._count = f"{done}/{total}"

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
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn(f"{{task.description:<{STEP_WIDTH - 1}}}", style="bold", markup=False),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
    )
