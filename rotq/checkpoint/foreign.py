"""Errors of other libraries as one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rotq.errors import RotqError

_OURS = (RotqError, KeyboardInterrupt, SystemExit, GeneratorExit)


@contextmanager
def library_errors(what: object) -> Iterator[None]:
    """Turn whatever a library raises about a file into a RotqError: ``what: its first line``.

    Native code that panics raises what does not derive from Exception; that is an error of the
    file, too.

    Args:
        what: The file, or what was being done with it.
    """
    try:
        yield
    except _OURS:
        raise
    except BaseException as error:
        raise RotqError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
