"""One at a time, and clients take turns: whoever asks much waits for those who ask little."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Any

from rotq.serve.http.encoder_process import EncoderProcess
from rotq.serve.http.errors import of_full_queue


class Turns:
    """For one event loop.

    Args:
        limit: That may wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lines: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._taken = False

    @property
    def full(self) -> bool:
        """Whether nobody more may wait."""
        return sum(map(len, self._lines.values())) >= self._limit

    async def take(self, client: str) -> None:
        """Wait for a turn; whoever gets it must ``give`` it back."""
        if not self._taken:
            self._taken = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._lines.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
            else:
                self._leave(client, turn)
            raise

    def _leave(self, client: str, turn: asyncio.Future[None]) -> None:
        line = self._lines.get(client, deque())
        if turn in line:
            line.remove(turn)
            if not line:
                del self._lines[client]

    def give(self) -> None:
        """End a turn: the next client that still waits has it."""
        while self._lines:
            client, line = next(iter(self._lines.items()))
            turn = line.popleft()
            self._lines.move_to_end(client)
            if not line:
                del self._lines[client]
            # one that was cancelled in this very moment is about to leave
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False


class Lane:
    """A process that does one thing after the other, for clients in turn.

    Args:
        process: Not used by others.
        limit: Requests that may wait.
    """

    def __init__(self, process: EncoderProcess, limit: int) -> None:
        self.process = process
        self._turns = Turns(limit)

    async def run(self, client: str, name: str, seconds: float, **given: Any) -> dict[str, Any]:
        """``EncoderProcess.call`` when it is the client's turn.

        Raises:
            ApiError: too many wait.
            RotqError: see ``EncoderProcess.call``.
        """
        if self._turns.full:
            raise of_full_queue(1)
        await self._turns.take(client)
        work = asyncio.get_running_loop().run_in_executor(
            None, lambda: self.process.call(name, seconds, **given)
        )
        # the turn ends with the work, even where nobody waits for it any more
        work.add_done_callback(self._over)
        return await asyncio.shield(work)

    def _over(self, work: asyncio.Future[dict[str, Any]]) -> None:
        if not work.cancelled():
            work.exception()
        self._turns.give()
