"""The command `build`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from qgraph.cli_options import PATH, Common, data_options, memory, output_options, pass_common, run_options

__all__ = ["build"]

_FAILED, _REFUSED, _OUTSIDE = 1, 2, 3


@click.command()
@click.argument("recipe", metavar="RECIPE.toml", type=PATH)
@click.option("--output", "-o", metavar="DIR", type=PATH, help="The build's folder [default: RECIPE.build].")
@click.option("--force", is_flag=True, help="Replace a build that stands at the output.")
@click.option("--model", metavar="MODEL.onnx", type=PATH, help="The model, instead of the recipe's.")
@click.option("--calib", metavar="DATA", help="The samples, instead of the recipe's.")
@click.option(
    "--calib-memory", metavar="SIZE", callback=memory, help="Bound on activations held at once [default: 1GiB]."
)
@data_options
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Run the passes of N targets at once, in processes; timing comes after.",
)
@click.option("--cache", metavar="DIR", type=PATH, help="Keep models behind long passes here, for other builds.")
@click.option("--cache-size", metavar="SIZE", callback=memory, help="Remove what was not used for longest beyond this.")
@run_options
@output_options
@pass_common
def build(
    common: Common,
    *,
    recipe: Path,
    output: Path | None,
    force: bool,
    model: Path | None,
    calib: str | None,
    calib_memory: int | None,
    workers: int,
    cache: Path | None,
    cache_size: int | None,
) -> int:
    """Compile one model for many targets: RECIPE.toml names the model, its data and the targets.

    Exit status: 0 all are built and verified; 3 some lie outside their tolerance or budget; 2 some were refused; 1 some
    failed by a fault of qgraph's. The others are built all the same, and the index says which is what.
    """
    from qgraph.build_recipe import TargetRecipe, read_recipe
    from qgraph.builder import build as build_all
    from qgraph.builder import default_output
    from qgraph.cache import Cache
    from qgraph.report.build_page import terminal_table

    wanted = read_recipe(recipe)
    if wanted.seed is None:
        wanted = dataclasses.replace(wanted, seed=common.seed)
    with common.display() as display:

        def begin(one: TargetRecipe, number: int, count: int) -> None:
            display.line(f"{number}/{count}  {one.name}")

        result = build_all(
            wanted,
            output=output or wanted.output or default_output(recipe),
            model=model,
            calibration=common.optional_data(calib),
            cache=None if cache is None else Cache(cache, limit=cache_size, tell=display.warn),
            workers=workers,
            context=common.context(display, calib_memory),
            force=force,
            observer=display.event,
            on_target=begin,
        )
        for one in result.entries:
            if one.reason and common.quiet:
                told = f"was {one.status}" if one.artifact is None else "is outside its bounds"
                click.echo(f"error: {one.name} {told}: {one.reason}", err=True)
            elif one.reason:
                display.step(one.name, f"{one.status}: {one.reason}")
        display.table(terminal_table(*result.rows()))
        display.done(result.path)
    common.print_json({"path": str(result.path), **result.to_json()})
    if result.count("failed"):
        return _FAILED
    if result.count("refused"):
        return _REFUSED
    return _OUTSIDE if result.count("outside") else 0
