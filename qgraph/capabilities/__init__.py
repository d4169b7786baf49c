"""What runtimes can execute, as data: one TOML file per runtime and provider, each entry with its source."""

from qgraph.capabilities.constraints import Constraint, parse_constraint
from qgraph.capabilities.tables import DEFAULT_DOMAINS, Entry, Fusion, Table, Types, names, operator_name, parse, table

__all__ = [
    "DEFAULT_DOMAINS",
    "Constraint",
    "Entry",
    "Fusion",
    "Table",
    "Types",
    "names",
    "operator_name",
    "parse",
    "parse_constraint",
    "table",
]
