"""A measure of the user's own: `--eval module:function`.

    def accuracy(session) -> float:                     # higher is better
        (scores,) = session.run(None, {"image": images})
        return (scores.argmax(1) == labels).mean()

The function is called once with the source's session and once with that of every result that is verified. It takes that
one argument, with `run(None, feeds)`, and returns a finite number, the higher the better.
"""

from __future__ import annotations

import inspect
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from qgraph.errors import UserError
from qgraph.runtime.metrics import round_figure
from qgraph.runtime.recorded import Recorded
from qgraph.targets.base import Session
from qgraph.user_code import load_function

__all__ = ["UserMetric"]

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_DIGITS = 6
_WHAT = "a function of a session that returns a number"


class UserMetric:
    """The user's function, with what it gave for the source.

    Args:
        function: or its name, written module:function.

    Raises:
        UserError: it cannot be loaded, or does not take one argument.
    """

    def __init__(self, function: str | Callable[[Session], float]) -> None:
        if isinstance(function, str) and not _PATH.fullmatch(function):
            raise UserError(f"--eval takes MODULE:FUNCTION, not '{function}'")
        self.name = (
            function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__name__)
        )
        self._function = load_function(function, _WHAT) if isinstance(function, str) else function
        self._source: float | None = None
        try:
            inspect.signature(self._function).bind(None)
        except TypeError as error:
            raise UserError(
                f"--eval {self.name} must take one argument, a session with run(None, feeds): {error}"
            ) from None
        except ValueError:
            pass  # some functions of C tell no signature

    def __call__(self, session: Session) -> float:
        """Return what the function gives for a session.

        Raises:
            UserError: it raises, or returns no finite number.
        """
        try:
            value: Any = self._function(session)
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"--eval {self.name} failed: {type(error).__name__}: {error}") from error
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real | np.number):
            raise UserError(f"--eval {self.name} must return a number, the higher the better, not {_shown(value)}")
        if not math.isfinite(float(value)):
            raise UserError(f"--eval {self.name} returned {float(value)}, which is no finite number")
        return round_figure(float(value), _DIGITS)

    def source(self, session: Any) -> float:
        """Return what the function gives for the source, which is measured once."""
        if self._source is None:
            self._source = self(session.session if isinstance(session, Recorded) else session)
        return self._source


def _shown(value: Any) -> str:
    return "None: does it lack a return?" if value is None else f"{type(value).__name__}"
