"""Reading a prompt: what others have computed of it, and one pass over what is left.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from rotq.serve.engine.generation import Generation
from rotq.serve.engine.model_runner import ModelRunner
from rotq.serve.engine.page_allocator import PageAllocator
from rotq.serve.engine.sampling import describe


def take_over(sequence: Generation, allocator: PageAllocator) -> int:
    """Take the pages of its prompt that others have computed until now; tokens found."""
    allocation = sequence.allocation
    assert allocation is not None
    while allocator.reuse(allocation):
        pass
    if not allocation.pages:
        return 0
    found = allocator.sinks + len(allocation.pages) * allocator.page_size - sequence.count
    whole = found >= 0 and (not sequence.count or found % allocator.page_size == 0)
    assert whole, "a pass over a prompt did not end where a page ends"
    sequence.count += found
    sequence.cached += found
    return found


def pass_over(
    sequence: Generation, allocator: PageAllocator, runner: ModelRunner
) -> tuple[int, Tensor]:
    """Compute the next tokens of its prompt; how many, and logits of which the last are last."""
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
    """Log probabilities of the tokens after those of the pass, as far as they are prompt."""
    if not sequence.described:
        sequence.described.append(describe(sequence.prompt[0], logits[0], None))
    following = sequence.prompt[sequence.count + 1 : end + 1]
    number = sequence.sampling.logprobs or 0
    for token, logits_V in zip(following, logits, strict=False):
        sequence.described.append(describe(token, logits_V, number))
