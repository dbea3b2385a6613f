"""What went wrong in the world (a file, a model, the data) and the exit code that says so.

Exit codes of every ``rotq`` command:

    0   done
    1   RotqError: one clear line on stderr, nothing half-written is left in place of a result
    2   wrong usage: unknown option, recipe key or value (click's own code)
    3   CheckFailed: the job stopped because its own check found a wrong result
    75  Stopped: interrupted, and ``--resume`` will continue from the last finished block
"""


class RotqError(Exception):
    """Something outside the program is not as it must be; the message is one clear line."""

    exit_code = 1


class CheckFailed(RotqError):  # noqa: N818
    """A self-check (exactness of the rotation, reload, checksum) failed; nothing is kept."""

    exit_code = 3


class Stopped(RotqError):  # noqa: N818
    """The job was interrupted; finished blocks are kept and can be resumed."""

    exit_code = 75
