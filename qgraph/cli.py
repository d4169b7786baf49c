"""The command line's entry: turns whatever ends a command into an exit status and, if need be, one line.

Human output goes to standard error, and `--json` prints exactly one document on standard output. Exit status: 0 done
and verified; 1 a fault of ours; 2 bad input or usage; 3 outside the tolerance; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from qgraph.cli_commands import commands
from qgraph.errors import ToleranceError, UserError

__all__ = ["main"]

FAULT, BAD_INPUT, OUT_OF_TOLERANCE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 1, 2, 3, 130, 141, 143
_MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENOENT}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: without the program's name. When None, those of the process, which is then ours: signals are
            handled and what libraries log is silenced.
    """
    debug = bool(os.environ.get("QGRAPH_DEBUG"))
    if arguments is None:
        arguments = sys.argv[1:]
        # The signal's default would end us without the clean-up of what is half written.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
    try:
        return _invoke(list(arguments))
    except click.UsageError as error:
        return _usage_error(error)
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except ToleranceError as error:
        return _fail(str(error), OUT_OF_TOLERANCE)
    except UserError as error:
        return _fail(str(error), BAD_INPUT)
    except OSError as error:
        if debug or error.errno not in _MENDABLE:
            return _fault(error, debug=debug)
        place = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{place}{error.strerror}", BAD_INPUT)
    except Exception as error:  # noqa: BLE001 - whatever it is, the user gets one line and a status
        return _fault(error, debug=debug)


def _invoke(arguments: list[str]) -> int:
    try:
        with commands.make_context("qgraph", arguments) as context:
            status = commands.invoke(context)
    except click.exceptions.Exit as leaving:
        status = leaving.exit_code
    sys.stdout.flush()
    return int(status or 0)


def _usage_error(error: click.UsageError) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        sys.stderr.write(error.format_message() + "\n")
        return BAD_INPUT
    command = error.ctx.command_path if error.ctx is not None else "qgraph"
    message = error.format_message()
    return _fail(f"{message}{'' if message.endswith(('.', '?')) else '.'} See `{command} --help`.", BAD_INPUT)


def _fault(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    hint = "" if debug else " Set QGRAPH_DEBUG=1 for the traceback, and please report it."
    return _fail(f"a fault of qgraph, not of your input: {type(error).__name__}: {error}.{hint}", FAULT)


def _fail(message: str, status: int) -> int:
    """Print the message as one line and return the status."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {' '.join(message.split())}\n" if status != INTERRUPTED else f"{message}\n")
        sys.stderr.flush()
    return status
