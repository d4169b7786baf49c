"""The passes: one to a file, each a frozen dataclass that rewrites a model in place."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DynamicInt8": "dynamic_int8",
    "FuseAttention": "fuse_attention",
    "Qdq": "qdq",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qgraph.passes' has no attribute '{name}'")
    return getattr(importlib.import_module(f"qgraph.passes.{_HOMES[name]}"), name)
