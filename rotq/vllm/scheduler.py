"""vLLM's scheduler, with prompts cut where blocks end.

A token sees its own pass whole and older ones as codes, so where a prompt is cut is part of its
answer. The attention cuts passes at the ends of blocks; a scheduler that shares a budget of tokens
among prompts must not add cuts of its own. Nor may it run an answer's tokens again in one pass,
after it took a request's blocks from it, or give a block with tokens of an answer to a prompt that
begins like that: they were run one by one. So blocks of answers are not found again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from rotq.vllm.passes import tokens_to_run


class _CutsAtBlocks:
    """Mixed into a scheduler; the hook is the last word on how many tokens a request gets."""

    block_size: int
    kv_cache_manager: Any

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        coordinator = self.kv_cache_manager.coordinator
        coordinator.cache_blocks = _of_prompts(coordinator.cache_blocks)

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        number = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        prompt = request.num_prompt_tokens
        return tokens_to_run(number, num_computed_tokens, prompt, self.block_size)


def _of_prompts(cache_blocks: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """Let blocks be found by others up to the end of the prompt."""

    def cached(request: Any, num_computed_tokens: int) -> None:
        cache_blocks(request, min(num_computed_tokens, request.num_prompt_tokens))

    return cached


class BlockScheduler(_CutsAtBlocks, Scheduler):
    """Without asynchronous scheduling."""


class AsyncBlockScheduler(_CutsAtBlocks, AsyncScheduler):
    """With asynchronous scheduling."""
