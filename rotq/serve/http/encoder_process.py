"""The server's end of ``encoding``: a process that is made, asked, and replaced when it is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

from rotq.errors import RotqError

MODULE = "rotq.serve.http.encoding"


class EncoderLost(RotqError):  # noqa: N818
    """The process ended over a job: it took too long, or crashed."""


class EncoderProcess:
    """One process with a tokenizer. Not for several threads at once, but for ``close``.

    Args:
        pickled: The tokenizer.
    """

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self.closed = False
        """Whether it was told to end; it does nothing more."""

    def start(self) -> None:
        """Start the process, unless it runs, and wait until it takes jobs.

        Raises:
            RotqError: it cannot take the tokenizer.
        """
        if self._connection is not None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            # what this process can import, the tokenizer's own code included, that one can too
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        try:
            self._connection.send_bytes(self._pickled)
            found = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            found = {"failed": "it ended"}
        if "failed" in found:
            self._end()
            line = f"the tokenizer does not load in a process of its own: {found['failed']}"
            raise RotqError(line)

    def call(self, name: str, seconds: float, **given: Any) -> dict[str, Any]:
        """Have ``Encoder`` do something; blocks.

        Args:
            name: The method.
            seconds: It may take so long.
            given: Its arguments.

        Raises:
            EncoderLost: the process ended over this; the next call has a new one.
            RotqError: see ``start``.
        """
        job = json.dumps({"call": name, "given": given, "seconds": seconds}).encode()
        try:
            return self._exchange(job)
        except BrokenPipeError:
            # it was gone before: not over this job
            self._end()
            return self._exchange(job)

    def _exchange(self, job: bytes) -> dict[str, Any]:
        if self.closed:
            raise EncoderLost("the server is shutting down")
        self.start()
        assert self._connection is not None
        try:
            self._connection.send_bytes(job)
            found: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except BrokenPipeError:
            raise
        except (EOFError, OSError):
            code = self._end()
            why = "took too long" if code == -signal.SIGALRM else f"crashed ({code})"
            raise EncoderLost(why) from None
        if found.get("last"):
            self._end()
        return found

    def close(self) -> None:
        """End the process, even in the middle of a job, for good; again is harmless."""
        self.closed = True
        # the thread of a job may end both at the same time, and forget them
        process, connection = self._process, self._connection
        if process is not None:
            process.kill()
            process.wait()
        if connection is not None:
            _close(connection)

    def _end(self) -> int:
        """Reap the process, and forget it; its exit code."""
        assert self._process is not None
        assert self._connection is not None
        _close(self._connection)
        code = self._process.wait()
        self._connection = self._process = None
        return code


def _close(connection: Connection) -> None:
    """Close it, though another thread may have."""
    with contextlib.suppress(OSError):
        connection.close()
