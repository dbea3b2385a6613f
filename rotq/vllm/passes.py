"""Where a batch of vLLM's is cut into passes of attention.

A token sees the tokens of its own pass whole and older ones as codes. Passes end where blocks end,
so that an answer does not depend on whether its beginning was found in the cache, nor on which
other prompts shared the scheduler's budget. Requests with a single new token, as a rule all that
decode, are one pass together. Tokens of an answer are a pass each, also where they are run again
because the request had to give its blocks back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Request:
    """New tokens of one request."""

    row: int
    """Of the block table."""
    first: int
    """Row of its first new token in the batch."""
    count: int
    """New tokens."""
    before: int
    """Tokens before them."""

    def passes(self, block_size: int) -> Iterator[Request]:
        """The same tokens in parts that end where blocks end."""
        first, count, before = self.first, self.count, self.before
        while count:
            number = min(count, block_size - before % block_size)
            yield Request(row=self.row, first=first, count=number, before=before)
            first, count, before = first + number, count - number, before + number


def requests_of(starts: Sequence[int], lengths: Sequence[int]) -> list[Request]:
    """The requests of a batch; those without new tokens are padding and left out.

    Args:
        starts: Rows where each request's new tokens begin, and their end; one more than requests.
        lengths: Tokens of each request, the new ones included.
    """
    found = []
    for row, length in enumerate(lengths):
        count = starts[row + 1] - starts[row]
        if count:
            found.append(Request(row=row, first=starts[row], count=count, before=length - count))
    return found


def batches(requests: Sequence[Request], block_size: int) -> Iterator[list[Request]]:
    """Passes in the order in which they are run, each with the same number of tokens per request.

    Single tokens come first, all together; they are of other sequences than the passes after them.
    """
    single = [request for request in requests if request.count == 1]
    if single:
        yield single
    for request in requests:
        if request.count > 1:
            for part in request.passes(block_size):
                yield [part]


def tokens_to_run(number: int, before: int, prompt: int, block_size: int) -> int:
    """How many of ``number`` tokens to run at once: prompts are cut where blocks end, answers are
    run token by token.

    Args:
        number: Tokens that could be run.
        before: Tokens that have been.
        prompt: Tokens of the request's prompt.
        block_size: Tokens of a block.
    """
    if before >= prompt:
        return min(number, 1)
    end = min(before + number, prompt)
    if end < prompt:
        end = max(end // block_size * block_size, before)
    return end - before
