"""Text that a model writes itself: calibration where there is no data.

Every window is drawn token by token from the model's own distribution at temperature 1, from its
first token on, as LLM-QAT (arXiv 2305.17888) does for its data:

    z_t ~ p(. | z_<t)        by the largest of  log p(z) + gumbel noise

What ends a text ends none here: a model that was trained on documents one after the other goes on
with the next.

Shape suffixes: B windows, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rotq.calibration.texts import SELF
from rotq.calibration.tokens import beginning
from rotq.errors import RotqError, told

AT_A_TIME = 16
"""Windows that are sampled together: with fewer, reading the weights takes most of the time."""

OnBatch = Callable[[int, int], None]
"""Told windows done, windows in all."""


@dataclass(frozen=True, kw_only=True)
class SampledText:
    """Windows that a model wrote."""

    ids_BT: Tensor
    """int64, on the CPU; the first tokens are those it began with."""
    sha256: str
    """Of the ids."""

    @classmethod
    def of(cls, ids_BT: Tensor) -> SampledText:
        """With their digest."""
        ids_BT = ids_BT.cpu().contiguous()
        return cls(ids_BT=ids_BT, sha256=hashlib.sha256(ids_BT.numpy().tobytes()).hexdigest())


def sampled_first(tokenizer: Any, bos: str = "auto") -> tuple[int, ...]:
    """What every sampled window begins with: what stands before a text, else what parts texts.

    Raises:
        RotqError: the tokenizer has neither.
    """
    first = beginning(tokenizer, "auto" if bos == "no" else bos)
    if first:
        return first
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return (int(token),)
    raise RotqError(
        f"calibration text {SELF}: {type(tokenizer).__name__} has neither BOS nor EOS, from which "
        "the model would begin; name a text"
    )


def writer(
    model: Any, on_batch: OnBatch | None = None
) -> Callable[[tuple[int, ...], int, int, int], SampledText]:
    """``sample_text`` of a model that is there, as ``load_windows`` calls it."""

    def write(first: tuple[int, ...], num_windows: int, length: int, seed: int) -> SampledText:
        return sample_text(
            model, first, num_windows=num_windows, length=length, seed=seed, on_batch=on_batch
        )

    return write


@torch.inference_mode()
def sample_text(
    model: Any,
    first: Sequence[int],
    *,
    num_windows: int,
    length: int,
    seed: int,
    on_batch: OnBatch | None = None,
) -> SampledText:
    """Let a causal language model write; on its device, in its dtype.

    Args:
        model: Of transformers.
        first: Token ids that every window begins with; at least one.
        num_windows, length: Of what is returned.
        seed: Of the draw; torch's own generators are left alone.
        on_batch: Listener.

    Raises:
        RotqError: the model cannot generate, or its logits are not finite.
    """
    if length <= len(first):
        return SampledText.of(torch.tensor([first[:length]]).repeat(num_windows, 1))
    noise = _GumbelNoise(torch.Generator(model.device).manual_seed(seed))
    parts = []
    with _plain_generation(model, length), told("the model cannot write its calibration text"):
        for start in range(0, num_windows, AT_A_TIME):
            rows = min(AT_A_TIME, num_windows - start)
            begun_BT = torch.tensor([list(first)] * rows, device=model.device)
            written_BT = model.generate(
                begun_BT,
                attention_mask=torch.ones_like(begun_BT),
                logits_processor=LogitsProcessorList([noise]),
            )
            parts.append(written_BT.cpu())
            if on_batch is not None:
                on_batch(start + rows, num_windows)
    return SampledText.of(torch.cat(parts))


class _GumbelNoise(LogitsProcessor):
    """Makes the most likely token a draw from the distribution."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores whose largest is the draw."""
        log_p_BV = scores.float().log_softmax(-1)
        if bool(log_p_BV.isnan().any()):
            raise RotqError("its logits are not finite")
        wait_BV = torch.empty_like(log_p_BV).exponential_(generator=self._generator)
        return log_p_BV.sub_(wait_BV.log_())


@contextmanager
def _plain_generation(model: Any, length: int) -> Iterator[None]:
    """Windows of full length by the largest score, whatever the checkpoint's own settings say."""
    if not hasattr(model, "generate") or not model.can_generate():
        raise RotqError(f"{type(model).__name__} cannot generate text; name a calibration text")
    before = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, max_length=length, use_cache=True)
    try:
        yield
    finally:
        model.generation_config = before
