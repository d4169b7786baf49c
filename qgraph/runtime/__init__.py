"""Running a graph or an artifact: sessions, verification, benchmark.

`open` needs numpy and ONNX Runtime only (see `qgraph.runtime.serving`).
"""

from qgraph.runtime.serving import Served
from qgraph.runtime.serving import open_artifact as open  # noqa: A004 - reads like the builtin on purpose

__all__ = ["Served", "open"]
