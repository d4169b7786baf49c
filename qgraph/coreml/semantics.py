"""What the tables of MIL's operations have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Semantics", "axes_of"]

Semantics: TypeAlias = Callable[..., Any]
"""Computes an operation from its parameters by name; returns an array, or several. An argument that is a tuple is a
list, text a string, and everything else an array, also what is one number."""


def axes_of(axes: np.ndarray | None, rank: int) -> tuple[int, ...]:
    """Return axes from 0 on; all of them for None."""
    return tuple(range(rank)) if axes is None else tuple(int(axis) % rank for axis in np.atleast_1d(axes))
