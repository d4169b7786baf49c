"""The options that several commands share, and the conversion of their texts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

if TYPE_CHECKING:
    from qgraph.cli_display import Display
    from qgraph.compiler import Data
    from qgraph.pipeline import Context

__all__ = ["PATH", "Common", "data_options", "memory", "output_options", "pass_common", "run_options", "shapes"]

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def memory(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Read 512M, 1.5G or 2GiB as bytes (an option's callback)."""
    del context, parameter
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ki|mi|gi|k|m|g|)b?\s*", value.lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count <= 0:
        raise click.BadParameter(f"'{value}' is no size such as 512M or 2GiB")
    return count


def pairs(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """Read NAME=INPUT texts, split at the first equals sign (an option's callback)."""
    del context, parameter
    found = {}
    for value in values:
        left, equals, right = value.partition("=")
        if not (equals and left and right):
            raise click.BadParameter(f"'{value}' is not written NAME=INPUT")
        found[left] = right
    return found


def shapes(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read INPUT=1,3,224,224 texts; names may hold equals signs themselves (an option's callback)."""
    del context, parameter
    found = {}
    for value in values:
        name, _, text = value.rpartition("=")
        if not name or not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text):
            raise click.BadParameter(f"'{value}' is not written INPUT=1,3,224,224")
        found[name] = tuple(int(size) for size in text.split(","))
    return found


@dataclasses.dataclass
class Common:
    """What the shared options say, and what follows from it."""

    rename: dict[str, str] = dataclasses.field(default_factory=dict)
    labels: str | None = None
    preprocess: str | None = None
    tokenizer: Path | None = None
    window: int | None = None
    seed: int = 0
    jobs: int = 0
    as_json: bool = False
    quiet: bool = False
    _documents: TextIO | None = None

    def data(self, source: str, *, labelled: bool = True) -> Data:
        """Return where samples come from and how they are read; unless `labelled`, --labels is not about them."""
        from qgraph.compiler import Data

        labels = self.labels if labelled else None
        return Data(source, self.rename, self.preprocess, self.tokenizer, labels, self.window)

    def optional_data(self, source: str | None, *, labelled: bool = True) -> Data | None:
        """Return the same, or None where no source was given."""
        return None if source is None else self.data(source, labelled=labelled)

    def display(self) -> Display:
        """Open the display that suits standard error; with --json, what the user's own code prints goes there too."""
        from qgraph.cli_display import open_display

        if self.as_json and self._documents is None:
            self._documents = sys.stdout
            click.get_current_context().with_resource(contextlib.redirect_stdout(sys.stderr))

        return open_display(quiet=self.quiet)

    def context(self, display: Display, calibration_memory: int | None = None) -> Context:
        """Return what the passes of a run share."""
        from qgraph.pipeline import Context

        context = Context(seed=self.seed, threads=self.jobs, progress=display.progress)
        if calibration_memory is not None:
            context.calibration_memory = calibration_memory
        return context

    def print_json(self, document: Any) -> None:
        """Print one document on standard output, if it is wanted."""
        if self.as_json:
            (self._documents or sys.stdout).write(json.dumps(document, indent=2, allow_nan=False) + "\n")


pass_common = click.make_pass_decorator(Common, ensure=True)


def _shared(*names: str, field: str, convert: Callable[..., Any] | None = None, **settings: Any) -> Callable[[F], F]:
    """Return an option whose value goes into the `Common` of the command instead of its parameters."""

    def keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        converted = value if convert is None else convert(context, parameter, value)
        setattr(context.ensure_object(Common), field, converted)

    return click.option(*names, callback=keep, expose_value=False, **settings)


def data_options(function: F) -> F:
    """Add the options that say how samples are read."""
    return _add(
        function,
        _shared(
            "--map",
            field="rename",
            convert=pairs,
            metavar="NAME=INPUT",
            multiple=True,
            help="Feed the array NAME of the data to the model's INPUT; repeatable.",
        ),
        _shared("--labels", field="labels", metavar="NAME", help="The data's array of class labels [default: labels]."),
        _shared(
            "--preprocess", field="preprocess", metavar="PRESET", help="How images are prepared; for image folders."
        ),
        _shared("--tokenizer", field="tokenizer", metavar="FILE", type=PATH, help="tokenizer.json or bytes, for text."),
        _shared(
            "--window",
            field="window",
            metavar="N",
            type=click.IntRange(min=1),
            help="Cut text into windows of N tokens [default: a line is a sample].",
        ),
    )


def run_options(function: F) -> F:
    """Add the options that say how models are run."""
    return _add(
        function,
        _shared(
            "--seed",
            field="seed",
            metavar="N",
            type=click.IntRange(min=0),
            default=0,
            help="Seed of everything random [default: 0].",
        ),
        _shared(
            "--jobs",
            "-j",
            field="jobs",
            metavar="N",
            type=click.IntRange(min=0),
            default=0,
            help="Cores to use: threads, or candidates of a search at once [default: all].",
        ),
    )


def output_options(function: F) -> F:
    """Add the options that say what is printed."""
    return _add(
        function,
        _shared("--json", field="as_json", is_flag=True, help="Print one JSON document on standard output."),
        _shared("--quiet", "-q", field="quiet", is_flag=True, help="Print nothing on standard error but errors."),
    )


def _add(function: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        function = option(function)
    return function
