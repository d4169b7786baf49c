"""The commands on what was compiled: run, verify, bench, inspect, diff."""

from __future__ import annotations

from pathlib import Path

import click

from qgraph.cli_options import PATH, Common, data_options, output_options, pass_common, run_options
from qgraph.cli_options import shapes as read_shapes
from qgraph.errors import ToleranceError, UserError

__all__ = ["bench", "diff", "inspect", "run", "verify"]


@click.command()
@click.argument("artifact", metavar="ARTIFACT", type=PATH)
@click.option("--input", "-i", "source", metavar="X.npz", required=True, help="Samples, as for --calib.")
@click.option("--output", "-o", metavar="Y.npz", type=PATH, help="Write the outputs here.")
@click.option("--force", is_flag=True, help="Replace a file that stands at the output.")
@data_options
@run_options
@output_options
@pass_common
def run(
    common: Common,
    *,
    artifact: Path,
    source: str,
    output: Path | None,
    force: bool,
) -> int:
    """Run an artifact on samples."""
    from qgraph import verbs
    from qgraph.cli_pages import outputs_table

    with common.display() as display:
        result = verbs.run(
            artifact,
            common.data(source),
            output=output,
            force=force,
            context=common.context(display),
        )
        display.table(outputs_table(result))
    common.print_json(result.to_json())
    return 0


@click.command()
@click.argument("artifact", metavar="ARTIFACT", type=PATH)
@click.option("--data", "source", metavar="X.npz", help="Samples, as for --calib [default: random].")
@click.option("--source", "model", metavar="MODEL.onnx", type=PATH, help="The source [default: beside the artifact].")
@click.option("--tolerance", metavar="METRIC=VALUE", multiple=True, help="Replace the bounds it was compiled with.")
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION", help="Your measure: session -> number, higher is better."
)
@data_options
@run_options
@output_options
@pass_common
def verify(
    common: Common,
    *,
    artifact: Path,
    source: str | None,
    model: Path | None,
    tolerance: tuple[str, ...],
    evaluation: str | None,
) -> int:
    """Prove again that an artifact matches its source."""
    from qgraph import compiler
    from qgraph.cli_pages import verification_table
    from qgraph.runtime.tolerances import parse_tolerance

    failure: ToleranceError | None = None
    with common.display() as display:
        try:
            result = compiler.verify(
                artifact,
                source=model,
                data=common.optional_data(source),
                tolerance=dict(map(parse_tolerance, tolerance)) if tolerance else None,
                evaluation=evaluation,
                context=common.context(display),
            )
        except ToleranceError as error:
            result, failure = error.result, error
        display.step("verify", f"{result.samples} samples   {result.summary()}")
        display.table(verification_table(result))
    common.print_json(result.to_json())
    if failure is not None:
        raise failure
    return 0


@click.command()
@click.argument("artifact", metavar="ARTIFACT", type=PATH)
@click.option("--against", metavar="MODEL", type=PATH, help="Model or artifact to compare with [default: the source].")
@click.option("--data", "source", metavar="X.npz", help="Samples, as for --calib [default: random].")
@click.option(
    "--shape", "shapes", metavar="INPUT=8,128", callback=read_shapes, multiple=True, help="Shape of random samples."
)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="How long to measure.")
@data_options
@run_options
@output_options
@pass_common
def bench(
    common: Common,
    *,
    artifact: Path,
    against: Path | None,
    source: str | None,
    shapes: dict[str, tuple[int, ...]],
    seconds: float,
) -> int:
    """Measure latency, throughput, memory and size."""
    from qgraph import verbs
    from qgraph.cli_pages import bench_table

    with common.display() as display:
        result = verbs.bench(
            artifact,
            against=against,
            data=common.optional_data(source),
            shapes=shapes,
            seconds=seconds,
            context=common.context(display),
        )
        display.table(bench_table(result))
    common.print_json(result.to_json())
    return 0


@click.command()
@click.argument("model", metavar="MODEL|ARTIFACT", type=PATH)
@click.option("--against", metavar="MODEL", type=PATH, help="What it was made from: show before and after, by layer.")
@click.option("--placement", is_flag=True, help="Show what runs where instead: kernels, providers, precisions.")
@click.option(
    "--target", "-t", metavar="NAME", help="Whose runtime tells the placement [default: the artifact's, or cpu-fp32]."
)
@output_options
@pass_common
def inspect(common: Common, model: Path, against: Path | None, *, placement: bool, target: str | None) -> int:
    """Show operators, weights, precisions and bytes."""
    from qgraph import verbs
    from qgraph.cli_pages import inspection_tables, placement_tables

    if target is not None and not placement:
        raise UserError("--target says whose runtime tells the placement: pass --placement with it")
    if against is not None and placement:
        raise UserError("--placement looks at one model: leave out --against, and ask for the other by itself")
    result = verbs.inspect(model, against, placement=placement, target=target)
    with common.display() as display:
        for table in inspection_tables(result) if result.placement is None else placement_tables(result.placement):
            display.table(table)
            display.line()
    common.print_json(result.to_json())
    return 0


@click.command()
@click.argument("model", metavar="MODEL", type=PATH)
@click.argument("artifact", metavar="ARTIFACT", type=PATH)
@click.option("--calib", metavar="DATA", required=True, help="Samples to compare on, as for compile.")
@data_options
@run_options
@output_options
@pass_common
def diff(
    common: Common,
    *,
    model: Path,
    artifact: Path,
    calib: str,
) -> int:
    """Show the error layer by layer: where the accuracy goes."""
    from qgraph import verbs
    from qgraph.cli_pages import difference_tables

    with common.display() as display:
        result = verbs.diff(
            model,
            artifact,
            common.data(calib),
            context=common.context(display),
        )
        for table in difference_tables(result):
            display.table(table)
    common.print_json(result.to_json())
    return 0
