"""vLLM's scheduler, with prompts cut where blocks end.

A token sees its own pass whole and older ones as codes, so where a prompt is cut is part of its
answer. The attention cuts passes at the ends of blocks; a scheduler that shares a budget of tokens
among prompts must not add cuts of its own.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from rotq.vllm.passes import end_at_block


class _CutsAtBlocks:
    """Mixed into a scheduler; the hook is the last word on how many tokens a request gets."""

    block_size: int

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        number = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        return end_at_block(number, num_computed_tokens, request.num_tokens, self.block_size)


class BlockScheduler(_CutsAtBlocks, Scheduler):
    """Without asynchronous scheduling."""


class AsyncBlockScheduler(_CutsAtBlocks, AsyncScheduler):
    """With asynchronous scheduling."""
