"""Who waits: a bounded queue in which clients take turns.

Each client's sequences stay in order; between clients it goes round. Nobody overtakes the one
whose turn it is, even if it would fit and the other does not: long prompts must not starve.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from rotq.serve.engine.generation import Generation


class FairQueue:
    """Sequences that were accepted and not yet admitted; safe to share between threads.

    Args:
        limit: Sequences that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._lines: OrderedDict[str, deque[Generation]] = OrderedDict()
        self._number = 0
        self._closed = False

    def __len__(self) -> int:
        return self._number

    def enter(self, sequences: Sequence[Generation]) -> bool:
        """Let all of a request in, or none if they are too many, or the queue is closed."""
        with self._lock:
            if self._closed or self._number + len(sequences) > self.limit:
                return False
            for sequence in sequences:
                self._lines.setdefault(sequence.client, deque()).append(sequence)
            self._number += len(sequences)
            return True

    def admit(self, fits: Callable[[Generation], bool]) -> Generation | None:
        """The next in turn, if it fits; its client goes to the end of the round."""
        with self._lock:
            if not self._lines:
                return None
            client, line = next(iter(self._lines.items()))
            if not fits(line[0]):
                return None
            found = line.popleft()
            self._number -= 1
            self._lines.move_to_end(client)
            if not line:
                del self._lines[client]
            return found

    def leave(self, gone: Callable[[Generation], bool]) -> list[Generation]:
        """Take out those for whom ``gone`` holds."""
        with self._lock:
            left = [item for line in self._lines.values() for item in line if gone(item)]
            for sequence in left:
                self._lines[sequence.client].remove(sequence)
                if not self._lines[sequence.client]:
                    del self._lines[sequence.client]
            self._number -= len(left)
            return left

    def close(self) -> None:
        """Refuse all that come from now on; those who wait stay."""
        with self._lock:
            self._closed = True
