"""Errors that a user can mend, told in one line."""

import difflib
import errno
from collections.abc import Iterable
from typing import Any

__all__ = ["SearchInterrupted", "ToleranceError", "UserError", "is_disk_full", "nearest"]


class UserError(Exception):
    """Bad input or usage: says what is wrong, where it is and how to mend it.

    The command line prints the message as one line and exits with status 2.
    """


class ToleranceError(UserError):
    """A verification figure lies outside the tolerance that the user gave (exit status 3).

    Attributes:
        result: what was made or measured all the same: the artifact of `compile`, the verification of `verify`.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a search that had complete candidates: the best of them was kept.

    Attributes:
        result: its artifact.
    """

    def __init__(self, result: Any) -> None:
        super().__init__("interrupted")
        self.result = result


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether an error, or what it was raised for, is that a disk or a quota is used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'X'?" for the known name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
