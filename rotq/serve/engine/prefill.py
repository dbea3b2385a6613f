"""Prefill: what others have computed of a prompt is reused, the rest computed chunk by chunk.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from rotq.serve.engine.generation import Generation
from rotq.serve.engine.model_runner import ModelRunner
from rotq.serve.engine.page_allocator import PageAllocator
from rotq.serve.engine.sampling import describe


def reuse_prefix(sequence: Generation, allocator: PageAllocator) -> int:
    """Hold the pages of its prompt that others have computed until now; tokens found."""
    allocation = sequence.allocation
    assert allocation is not None
    while allocator.reuse(allocation):
        pass
    if not allocation.pages:
        return 0
    found = allocator.sinks + len(allocation.pages) * allocator.page_size - sequence.count
    assert found >= 0, "a pass over a prompt did not end where a page ends"
    sequence.count += found
    sequence.cached += found
    return found


def prefill_chunk(
    sequence: Generation, allocator: PageAllocator, runner: ModelRunner
) -> tuple[int, Tensor]:
    """Compute the next chunk of its prompt in one pass: number of tokens, and logits (tokens, V).

    Without ``prompt_logprobs`` the logits are the last token's only, (1, V).
    """
    assert sequence.allocation is not None
    end = runner.pass_end(sequence.count, len(sequence.prompt))
    allocator.extend(sequence.allocation, end)
    ids = sequence.prompt[sequence.count : end]
    wanted = sequence.prompt_logprobs
    logits = runner.prefill(ids, sequence.row(len(ids)), all_logits=wanted)
    if wanted:
        _describe(sequence, end, logits)
    sequence.count = end
    allocator.publish(sequence.allocation, end)
    return len(ids), logits


def _describe(sequence: Generation, end: int, logits: Tensor) -> None:
    """Log probabilities of the tokens after those of the chunk, as far as they are prompt."""
    if not sequence.described:
        sequence.described.append(describe(sequence.prompt[0], logits[0], None))
    following = sequence.prompt[sequence.count + 1 : end + 1]
    number = sequence.sampling.logprobs or 0
    for token, logits_V in zip(following, logits, strict=False):
        sequence.described.append(describe(token, logits_V, number))
