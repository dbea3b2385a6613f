"""The trial before a server takes requests: does the model compute through the pool what it is?

What a configuration does not say shows here: a model that sees what is to come, an attention that
does more than the pool's, anything that raises. A start that is refused costs less than a server
that answers everybody with an error, or wrongly.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotq.devices import double
from rotq.errors import RotqError
from rotq.kv.pool.pool import Row
from rotq.models.limits import vocabulary_of
from rotq.serve.engine.model_runner import ModelRunner

_TOKENS = 8

_ALLOWED = 0.1
"""Of the spread of logits: rms of what other kernels, in 16 bits, may differ by."""


class Trial:
    """A few tokens, and what the model makes of them before a pool changes its attention.

    Args:
        model: In eval mode, on one device.

    Raises:
        RotqError: it is no causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._kind = model.config.model_type
        vocabulary = vocabulary_of(model)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(vocabulary, (_TOKENS + 1,), generator=generator)
        self.ids: list[int] = drawn.tolist()
        self._expected_TV = self._whole(model, self.ids)
        last = (self.ids[-1] + 1) % vocabulary
        other_TV = self._whole(model, [*self.ids[:-1], last])
        if self._distance(other_TV[:-1], self._expected_TV[:-1]) > _ALLOWED:
            raise RotqError(
                f"{self._kind}: the model sees tokens to come; a server needs a causal one"
            )

    def run(self, runner: ModelRunner, longest: int, *, fresh: bool, stored: bool) -> None:
        """Compute the tokens through a pool that nobody uses yet.

        Args:
            runner: Of the model and the pool.
            longest: Tokens that a sequence may have.
            fresh: Tokens of one pass must see each other as without a cache.
            stored: Tokens must see stored ones so, too.

        Raises:
            RotqError: the result is another.
        """
        count = min(_TOKENS, longest)
        sink = 0 if runner.pool.sinks else -1
        row = Row(pages=[0], sink=sink, fresh=count)
        first_TV = runner.prefill(self.ids[:count], row, all_logits=True)
        self._check(first_TV, self._expected_TV[:count], exact=fresh)
        if count < longest:
            row = Row(pages=[0], sink=sink, count=count, fresh=1)
            next_TV = runner.decode(self.ids[count : count + 1], [row])
            self._check(next_TV, self._expected_TV[count : count + 1], exact=stored)

    def _check(self, found_TV: Tensor, expected_TV: Tensor, *, exact: bool) -> None:
        if not found_TV.isfinite().all():
            raise RotqError(f"{self._kind}: with this cache the model's logits are not finite")
        if exact and not self._distance(found_TV, expected_TV) <= _ALLOWED:
            raise RotqError(f"{self._kind}: with this cache the model computes something else")

    @torch.inference_mode()
    def _whole(self, model: Any, ids: Sequence[int]) -> Tensor:
        """fp32 (T, V) without a cache."""
        given = torch.tensor([ids], device=model.device)
        logits_TV: Tensor = model(input_ids=given, use_cache=False).logits[0].float()
        return logits_TV

    @staticmethod
    def _distance(found_TV: Tensor, expected_TV: Tensor) -> float:
        spread = double(expected_TV).std().clamp(min=1e-6)
        return float(double(found_TV - expected_TV).pow(2).mean().sqrt() / spread)
