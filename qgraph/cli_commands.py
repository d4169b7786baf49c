"""The commands, in the order of use: each parses its arguments, makes one API call, and prints what comes back.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import click

import qgraph
from qgraph.cli_artifact import bench, diff, inspect, run, verify
from qgraph.cli_build import build
from qgraph.cli_catalog import doctor, passes, targets
from qgraph.cli_compare import compare
from qgraph.cli_compile import compile_command
from qgraph.cli_language import export, perplexity
from qgraph.errors import nearest

__all__ = ["commands"]


class _Commands(click.Group):
    """A group that suggests the nearest command for one that it does not have."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            ctx.fail(f"there is no command '{name}'.{nearest(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)  # in the order of use, not of the alphabet


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(qgraph.__version__, prog_name="qgraph", message="%(prog)s %(version)s")
def commands() -> None:
    """Make ONNX models smaller and faster, and prove that they still behave."""


@click.group("eval", cls=_Commands)
def evaluate() -> None:
    """Measure what a model is worth on data of its task."""


evaluate.add_command(perplexity)
for command in (
    compile_command, build, run, verify, bench, inspect, diff, export, evaluate, targets, passes, doctor, compare,
):  # fmt: skip
    commands.add_command(command)
