"""coremltools, imported where it is needed and without a word on standard error."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any, NamedTuple

from qgraph.errors import UserError

__all__ = ["SPECIFICATION", "Toolkit", "toolkit"]

SPECIFICATION = 9
"""Of the packages: iOS 18, macOS 15, the first with weights of 4 bits in blocks."""


class Toolkit(NamedTuple):
    """What building a program needs: the builder of operations, programs and functions, data types, the writer."""

    builder: Any
    program: Any
    function: Any
    types: Any
    opset: Any
    write: Any


@functools.cache
def toolkit() -> Toolkit:
    """Import coremltools.

    Raises:
        UserError: it is not installed.
    """
    # It warns of everything that it cannot do here, such as running a model off macOS.
    logging.getLogger("coremltools").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools
            from coremltools.converters.mil.backend.mil import load
            from coremltools.converters.mil.mil import Builder, Function, Program, types
    except ImportError:
        raise UserError("writing a Core ML package needs coremltools: pip install 'qgraph-compiler[apple]'") from None
    return Toolkit(Builder, Program, Function, types, coremltools.target.iOS18, load.load)
