"""The command `compare`."""

from __future__ import annotations

from pathlib import Path

import click

from qgraph.cli_options import PATH, Common, data_options, output_options, pass_common, run_options

__all__ = ["compare"]


@click.command()
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=PATH)
@click.option("--output", "-o", metavar="PAGE.html", type=PATH, help="Write the comparison as a page, too.")
@click.option("--force", is_flag=True, help="Replace a page that stands at the output.")
@click.option("--bench", is_flag=True, help="Time all of them in turn, now; else each one's own figures are shown.")
@click.option("--data", "source", metavar="X.npz", help="Samples to time on, as for --calib [default: random].")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="How long to time.")
@data_options
@run_options
@output_options
@pass_common
def compare(
    common: Common,
    *,
    artifacts: tuple[Path, ...],
    output: Path | None,
    force: bool,
    bench: bool,
    source: str | None,
    seconds: float,
) -> int:
    """Put several artifacts of one model beside each other."""
    from qgraph.comparison import compare_artifacts, refuse_existing_page, write_page
    from qgraph.report.side_by_side import render, terminal_table

    with common.display() as display:
        if output is not None:
            refuse_existing_page(output, force=force)
        found = compare_artifacts(
            artifacts,
            bench=bench,
            data=common.optional_data(source),
            seconds=seconds,
            context=common.context(display),
        )
        display.table(terminal_table(found))
        if output is not None:
            write_page(render(found), output)
            display.line(str(output))
    common.print_json(found.to_json())
    return 0
