"""What runtimes can execute, as data: one TOML file per runtime and provider, each entry with its source."""

from qgraph.capabilities.constraints import Constraint
from qgraph.capabilities.tables import Entry, Fusion, Table, Types, names, parse, table

__all__ = ["Constraint", "Entry", "Fusion", "Table", "Types", "names", "parse", "table"]
