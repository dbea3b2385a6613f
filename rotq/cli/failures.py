"""The one place where errors become lines and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import click

from rotq.cli.hints import hint_for_option
from rotq.cli.options import debug_wanted
from rotq.errors import RotqError, is_panic, reason
from rotq.report.columns import printable

LONGEST_LINE = 1500


@contextlib.contextmanager
def failing(ctx: click.Context) -> Iterator[None]:
    """Answer an error with one line on stderr and its exit code; with ``--debug`` let it pass."""
    try:
        yield
    except (click.exceptions.Exit, click.Abort):
        raise
    except BrokenPipeError:
        _leave_pipe()
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        debug = debug_wanted(ctx)
        if isinstance(error, click.ClickException):
            if debug and error.__cause__ is not None:
                raise error.__cause__ from None
            fail(_usage_line(error), error.exit_code)
        if debug:
            raise
        fail(_line(error), error.exit_code if isinstance(error, RotqError) else 1)


def fail(message: str, exit_code: int) -> NoReturn:
    """End with a line on stderr: printable, without line breaks, not too long."""
    line = printable(" ".join(message.split()))
    if len(line) > LONGEST_LINE:
        line = f"{line[:LONGEST_LINE]} ..."
    click.echo(f"rotq: error: {line}", err=True)
    sys.exit(exit_code)


def _line(error: BaseException) -> str:
    if isinstance(error, RotqError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else str(error.filename)
        place = name if len(name) <= 300 else f"{name[:300]}..."
        return f"{place}: {error.strerror}" if place else error.strerror
    if _is_out_of_memory(error):
        return f"not enough memory: {reason(error)}"
    if _wants_triton(error):
        return str(error)
    return f"unexpected {type(error).__name__}: {error}; --debug shows where"


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, torch's on a GPU, and torch's on the CPU, which is any RuntimeError."""
    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or cpu


def _wants_triton(error: BaseException) -> bool:
    """Whether a kernel was asked for where Triton is not installed."""
    ops = sys.modules.get("rotq.ops")  # loaded if a kernel was asked for
    return ops is not None and isinstance(error, ops.TritonMissing)


def _usage_line(error: click.ClickException) -> str:
    message = error.format_message()
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return message
    if isinstance(error, click.NoSuchOption):
        hint = hint_for_option(error.option_name, context)
        message = f"{error.message.rstrip('.')}; {hint}" if hint else message
    return f"{' '.join(message.split()).rstrip('.')}; see '{context.command_path} --help'"


def _leave_pipe() -> NoReturn:
    """Whoever reads has gone, as ``head`` does; what is buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def ignore_signals() -> None:
    """Of what ends a program; for atexit, where Python would print a traceback."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
