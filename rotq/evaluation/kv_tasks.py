"""What a packed KV cache costs where it matters: finding something far back, and going on writing.

    passkey, needle   what was said at a depth of a haystack is asked for, see ``haystacks``
    drift             tokens that greedy decoding writes before the first that the whole cache
                      would not

Answers count if every token of them is the most likely one behind those before it: what greedy
decoding would write. All is run on whole windows, as in ``quantized_history``. An answer that the
model does not find with an unquantized cache says nothing about others: that cache has a row too.

Shape suffixes: N tokens of the text, T positions, A tokens of an answer, B prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rotq.errors import RotqError
from rotq.evaluation.haystacks import DEPTHS, Prompt
from rotq.evaluation.quantized_history import KVScheme, QuantizedHistory
from rotq.evaluation.streamed_logits import StreamedLogits
from rotq.models.attention.replaced import replaced_attention
from rotq.models.limits import embedding_device, limits_of

UNQUANTIZED = "unquantized"
"""Name of the row of a cache that keeps all whole."""

DRIFT = "drift"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How often one cache finds what was said."""

    preset: str
    task: str
    found: float
    """Share of all prompts."""
    by_depth: list[float]
    """Share at each of ``depths``."""
    depths: list[float]
    prompts: int
    seq_len: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How long one cache writes what the unquantized one writes."""

    preset: str
    task: str
    median: float
    """Tokens before the first that differs; those that never do count ``new_tokens``."""
    mean: float
    unchanged: float
    """Share of prompts where none differs."""
    new_tokens: int
    prompt_tokens: int
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@torch.inference_mode()
def find_answers(
    model: Any,
    prompts: Sequence[Prompt],
    schemes: Sequence[KVScheme],
    *,
    task: str,
    on_prompt: Progress | None = None,
) -> list[Retrieval]:
    """Ask every prompt, with an unquantized cache and with each scheme.

    Raises:
        RotqError: prompts are longer than the model's positions, or see ``evaluate_kv``.
    """
    limits = limits_of(model)
    length = len(prompts[0].ids_T)
    if limits.cut(length, least=2) < length:
        raise RotqError(f"{task}: prompts of {length} tokens are more than the model has positions")
    found: dict[str, list[tuple[float, bool]]] = {UNQUANTIZED: []}
    found |= {scheme.name: [] for scheme in schemes}
    for number, prompt in enumerate(prompts):
        limits.check(prompt.ids_T)
        for name, attention in _caches(model, schemes):
            with attention:
                logits = StreamedLogits(model, prompt.ids_T)
            first = length - len(prompt.answer_A) - 1
            best_A = logits[slice(first, length - 1)].argmax(-1).cpu()
            found[name].append((prompt.depth, torch.equal(best_A, prompt.answer_A)))
        if on_prompt is not None:
            on_prompt(number + 1, len(prompts))
    return [
        Retrieval(
            preset=name,
            task=task,
            found=fmean(right for _, right in answers),
            by_depth=[fmean(r for d, r in answers if d == depth) for depth in DEPTHS],
            depths=list(DEPTHS),
            prompts=len(prompts),
            seq_len=length,
        )
        for name, answers in found.items()
    ]


def _caches(
    model: Any, schemes: Sequence[KVScheme]
) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    yield UNQUANTIZED, nullcontext()
    for scheme in schemes:
        yield scheme.name, replaced_attention(model, QuantizedHistory(scheme, compares=False))


@torch.inference_mode()
def measure_drift(
    model: Any,
    prompts_BT: Tensor,
    schemes: Sequence[KVScheme],
    *,
    new_tokens: int,
    on_prompt: Progress | None = None,
) -> list[Drift]:
    """Write on greedily with an unquantized cache, and see how far each scheme agrees.

    Up to the first token that differs both have read the same, so that one pass over what the
    unquantized cache has written tells where that is.

    Args:
        model: A causal language model of transformers.
        prompts_BT: int64 token ids.
        schemes: Each with its constants for this model.
        new_tokens: That are written behind each prompt.
        on_prompt: Called with prompts done and in all.

    Raises:
        RotqError: see ``evaluate_kv``.
    """
    limits_of(model).check(prompts_BT)
    written_BT = _greedy(model, prompts_BT, new_tokens)
    length = prompts_BT.shape[1]
    same: dict[str, list[int]] = {scheme.name: [] for scheme in schemes}
    for number, ids_T in enumerate(written_BT):
        for scheme in schemes:
            with replaced_attention(model, QuantizedHistory(scheme, compares=False)):
                logits = StreamedLogits(model, ids_T)
            best_A = logits[slice(length - 1, len(ids_T) - 1)].argmax(-1).cpu()
            same[scheme.name].append(_first_false(best_A == ids_T[length:]))
        if on_prompt is not None:
            on_prompt(number + 1, len(written_BT))
    return [
        Drift(
            preset=name,
            task=DRIFT,
            median=median(counts),
            mean=fmean(counts),
            unchanged=fmean(count == new_tokens for count in counts),
            new_tokens=new_tokens,
            prompt_tokens=length,
            prompts=len(counts),
        )
        for name, counts in same.items()
    ]


def _greedy(model: Any, prompts_BT: Tensor, new_tokens: int) -> Tensor:
    """Prompts and what is written behind them, on the CPU; a token that ends texts ends none."""
    cache = DynamicCache(config=model.config)
    ids_BT = prompts_BT.to(embedding_device(model))
    parts = [ids_BT]
    for _ in range(new_tokens):
        logits_BTV = model(input_ids=parts[-1], past_key_values=cache, use_cache=True).logits
        parts.append(logits_BTV[:, -1:].argmax(-1).to(ids_BT.device))
    return torch.cat(parts, dim=1).cpu()


def _first_false(same_A: Tensor) -> int:
    return int(same_A.long().cumprod(0).sum())
