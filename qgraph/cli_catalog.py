"""The commands that tell what there is: targets, passes, and what is usable here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qgraph.cli_options import Common, output_options, pass_common

if TYPE_CHECKING:
    from qgraph.registry import Kind
    from qgraph.runtime.capability_check import TableCheck

__all__ = ["doctor", "passes", "targets"]

_DIFFERS = 3
"""Exit status where something does not hold that was promised."""


@click.command()
@click.argument("name", required=False)
@output_options
@pass_common
def targets(common: Common, name: str | None) -> int:
    """List the targets, or show one with every option and default."""
    return _show_catalog(common, "target", name)


@click.command()
@click.argument("name", required=False)
@output_options
@pass_common
def passes(common: Common, name: str | None) -> int:
    """List the passes, or show one with every option and default."""
    return _show_catalog(common, "pass", name)


def _show_catalog(common: Common, kind: Kind, name: str | None) -> int:
    from qgraph import catalog
    from qgraph.cli_pages import catalog_table, show_entry

    with common.display() as display:
        if name is not None:
            one = catalog.entry(kind, name)
            show_entry(display, one)
            document: Any = one.to_json()
        else:
            entries = catalog.catalog(kind)
            display.table(catalog_table(kind, entries))
            document = [one.to_json() for one in entries]
    common.print_json(document)
    return 0


@click.command()
@click.option("--probe", is_flag=True, help="Hold the tables of capabilities against the installed runtimes too.")
@output_options
@pass_common
def doctor(common: Common, *, probe: bool) -> int:
    """Tell which runtimes and targets are usable here.

    --probe asks the runtimes for their kernels, loads small models of every operator and data type, and says what is
    otherwise than the tables that the targets go by; the exit status is then 3.
    """
    from qgraph.cli_pages import probe_lines, survey_tables
    from qgraph.doctor import survey
    from qgraph.runtime.capability_check import check_tables

    result = survey()
    document = result.to_json()
    checks: tuple[TableCheck, ...] = ()
    with common.display() as display:
        for table in survey_tables(result):
            display.table(table)
            display.line()
        if probe:
            checks = check_tables(display.progress)
            document["tables"] = [one.to_json() for one in checks]
            for name, text in probe_lines(checks):
                display.step(name, text)
    common.print_json(document)
    return 0 if all(one.agrees for one in checks) else _DIFFERS
