"""What runtimes can execute, as data: one TOML file per runtime and provider, each entry with its source."""

from qgraph.capabilities.constraints import Constraint, parse_constraint
from qgraph.capabilities.reading import names, parse, table
from qgraph.capabilities.tables import (
    DEFAULT_DOMAINS,
    PROCESSORS,
    ByteProduct,
    Entry,
    Fusion,
    Table,
    Types,
    operator_name,
)

__all__ = [
    "DEFAULT_DOMAINS",
    "PROCESSORS",
    "ByteProduct",
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
