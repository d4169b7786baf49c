"""Functions of the user, named as module:function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qgraph.errors import UserError

__all__ = ["load_function"]


def load_function(path: str, what: str) -> Callable[..., Any]:
    """Return what `path`, written module:function, names; modules of the current folder are found too.

    Args:
        path: of the function.
        what: what it must be, in words such as "a function that yields feeds".

    Raises:
        UserError: it cannot be imported, or is not callable.
    """
    module, _, attribute = path.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)  # a console script does not look into the folder it is run in
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(f"{path} cannot be loaded: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise UserError(f"{path} is not callable: it must be {what}")
    return found  # type: ignore[no-any-return]
