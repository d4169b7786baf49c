"""qgraph: rewrites ONNX models so that they get smaller and faster, and proves that they still behave.

The public interface is what `__all__` lists. Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgraph.artifact import Artifact
    from qgraph.artifact import open_artifact as open  # noqa: A004 - qgraph.open reads like the builtin on purpose
    from qgraph.builder import Build, build
    from qgraph.compiler import compile  # noqa: A004 - qgraph.compile is the main entry point
    from qgraph.errors import UserError
    from qgraph.ir import load, save
    from qgraph.pipeline import Context, Pass, Pipeline, Report, Skipped
    from qgraph.targets.base import Target

__all__ = [
    "Artifact",
    "Build",
    "Context",
    "Pass",
    "Pipeline",
    "Report",
    "Skipped",
    "Target",
    "UserError",
    "build",
    "compile",
    "load",
    "open",
    "save",
]

__version__ = "0.1.0"

_HOMES = {
    "Artifact": ("qgraph.artifact", "Artifact"),
    "Build": ("qgraph.builder", "Build"),
    "Context": ("qgraph.pipeline", "Context"),
    "Pass": ("qgraph.pipeline", "Pass"),
    "Pipeline": ("qgraph.pipeline", "Pipeline"),
    "Report": ("qgraph.pipeline", "Report"),
    "Skipped": ("qgraph.pipeline", "Skipped"),
    "Target": ("qgraph.targets.base", "Target"),
    "UserError": ("qgraph.errors", "UserError"),
    "build": ("qgraph.builder", "build"),
    "compile": ("qgraph.compiler", "compile"),
    "load": ("qgraph.ir", "load"),
    "open": ("qgraph.artifact", "open_artifact"),
    "save": ("qgraph.ir", "save"),
}

# In a checkout the passes, targets and models lie beside this folder, not inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "passes" / "__init__.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qgraph' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
