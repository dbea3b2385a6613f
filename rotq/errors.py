"""What went wrong in the world (a file, a model, the data) and the exit code that says so.

Exit codes of every ``rotq`` command:

    0   done
    1   RotqError: one clear line on stderr, nothing half-written is left in place of a result
    2   wrong usage: unknown option, recipe key or value (click's own code)
    3   CheckFailed: the job stopped because its own check found a wrong result
    75  Stopped: interrupted, and ``--resume`` will continue from the last finished block
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_REASON = 400


class RotqError(Exception):
    """Something outside the program is not as it must be; the message is one clear line."""

    exit_code = 1


class CheckFailed(RotqError):  # noqa: N818
    """A self-check (exactness of the rotation, reload, checksum) failed; nothing is kept."""

    exit_code = 3


class Stopped(RotqError):  # noqa: N818
    """The job was interrupted; finished blocks are kept and can be resumed."""

    exit_code = 75


@contextmanager
def told(what: str) -> Iterator[None]:
    """Let what a library raises be told in one line: ``{what}: {reason}``, as a RotqError.

    Panics of native code are told too: pyo3's PanicException derives from BaseException alone. A
    RotqError, and what is to end the program (KeyboardInterrupt, SystemExit), pass as they are.
    """
    try:
        yield
    except RotqError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise RotqError(f"{what}: {reason(error)}") from error


def is_panic(error: BaseException) -> bool:
    """Whether native code of a library has panicked."""
    return type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """What an error says, and what has caused it, in one line that is not too long."""
    said = " ".join(str(error).split()) or type(error).__name__
    if error.__cause__ is not None:
        said = f"{said}: {reason(error.__cause__)}"
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]} ..."
