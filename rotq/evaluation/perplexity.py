"""Perplexity of a causal language model on a text, under a named protocol.

    nll_t = -log p(x_t | x_<t, from its window's start),     ppl = exp(mean over scored positions)

``windowed``: the text is cut into non-overlapping windows from its start; every position of a
window but the first is scored. ``strided``: windows start every ``stride`` tokens and each scores
only what no earlier window scored, so most tokens have at least T - stride tokens of context.
A window begins with the protocol's special tokens, if any, and holds as many tokens of the text
fewer; they are not scored.
Figures of different protocols, lengths or window counts do not compare.

Shape suffixes: N tokens of the text, B windows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rotq.calibration.limits import Limits
from rotq.calibration.tokenized import begun
from rotq.errors import RotqError
from rotq.evaluation.divergence import PERCENTILES, Divergence, compare
from rotq.evaluation.logits import CHUNK, summed_nll, window_logits
from rotq.models.attention.replaced import Attention, replaced_attention
from rotq.models.limits import limits_of
from rotq.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which windows of a text are scored, and which of their positions."""

    windows: int = 16
    """Windows taken from the start of the text; 0 takes all that fit."""
    seq_len: int = 1024
    """Tokens of a window."""
    stride: int = 0
    """Tokens between window starts; 0 is the windowed protocol, without overlap."""
    first: tuple[int, ...] = ()
    """Ids of the special tokens that every window begins with."""

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise ValueError(f"windows: {self.windows} is not 0 or more")
        if self.seq_len < 2:
            raise ValueError(f"seq_len: {self.seq_len} is not at least 2")
        if not 0 <= self.stride < self.seq_len:
            raise ValueError(f"stride: {self.stride} is not below seq_len {self.seq_len}")

    @property
    def text_len(self) -> int:
        """Tokens of the text in a window."""
        return self.seq_len - len(self.first)

    def within(self, limits: Limits) -> Protocol:
        """The same, with windows that are no longer than a model has positions.

        Raises:
            RotqError: it has too few for two tokens, or no more than ``stride``.
        """
        least = max(2, self.stride + 1) + len(self.first)
        return replace(self, seq_len=limits.cut(self.seq_len, least=least))

    def cut(self, ids_N: Tensor) -> Tensor:
        """Windows ids_BT of a text.

        Raises:
            RotqError: the text is too short (says how many windows fit), or windows are, with what
                they begin with.
        """
        if self.text_len <= self.stride:
            raise RotqError(
                f"windows of {self.seq_len} tokens, {len(self.first)} of them special, hold "
                f"{max(0, self.text_len)} of the text; {self.stride + 1} are needed"
            )
        step = self.stride or self.text_len
        fitting = max(0, (ids_N.numel() - self.text_len) // step + 1)
        wanted = self.windows or max(fitting, 1)
        if fitting < wanted:
            raise RotqError(
                f"text is too short: {ids_N.numel()} tokens hold {fitting} of the {wanted} "
                f"windows of {self.text_len} asked for"
            )
        return begun(ids_N.unfold(0, self.text_len, step)[:wanted], self.first)

    def first_scored(self, window: int) -> int:
        """First scored position of a window."""
        if window and self.stride:
            return self.seq_len - self.stride
        return max(1, len(self.first))

    def describe(self, num_windows: int) -> str:
        """One line that names the protocol."""
        special = "no special tokens"
        if self.first:
            special = f"each behind special tokens {', '.join(map(str, self.first))}"
        if self.stride:
            return (
                f"strided: {num_windows} windows of {self.seq_len} tokens every {self.stride}, "
                f"each token scored once, {special}"
            )
        return (
            f"windowed: first {num_windows} non-overlapping windows of {self.seq_len} tokens, "
            f"{self.seq_len - self.first_scored(0)} scored in each, {special}"
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one model on one text."""

    ppl: float
    kl: float | None
    """KL(reference || model) in nats per token; None without a reference."""
    top1: float | None
    """Share of positions where both models' most likely token is the same."""
    reference_ppl: float | None
    tokens: int
    """Positions that were scored, over all windows."""
    protocol: str
    kl_p50: float | None = None
    """Half of the positions have no more, as the next two: 99 %, 99.9 %."""
    kl_p99: float | None = None
    kl_p999: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class WindowScores:
    """Sums of each window, in its order."""

    nll: list[float] = field(default_factory=list)
    """Nats."""
    tokens: list[int] = field(default_factory=list)
    """Positions that were scored."""
    reference_nll: list[float] = field(default_factory=list)
    """Empty without a reference, as the next."""
    divergence: Divergence = field(default_factory=Divergence)

    @classmethod
    def of(cls, runs: Sequence[WindowScores]) -> WindowScores:
        """Of runs of windows that follow each other."""
        return cls(
            nll=[nll for run in runs for nll in run.nll],
            tokens=[tokens for run in runs for tokens in run.tokens],
            reference_nll=[nll for run in runs for nll in run.reference_nll],
            divergence=sum((run.divergence for run in runs), Divergence()),
        )


def evaluate(
    model: Any,
    ids_N: Tensor,
    *,
    protocol: Protocol,
    reference: Any = None,
    attention: Attention | None = None,
    on_window: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Score a text; arguments and errors as ``score_windows``."""
    scores, described = score_windows(
        model,
        ids_N,
        protocol=protocol,
        reference=reference,
        attention=attention,
        on_window=on_window,
        ranks=ranks,
    )
    return summary(scores, described)


def summary(scores: WindowScores, protocol: str) -> Evaluation:
    """The figures of a whole text; ``protocol`` in a line."""
    tokens, alone = sum(scores.tokens), not scores.reference_nll
    divergence = scores.divergence
    return Evaluation(
        ppl=_exp_mean(sum(scores.nll), tokens),
        kl=None if alone else divergence.kl,
        **(dict.fromkeys(PERCENTILES) if alone else divergence.percentiles()),
        top1=None if alone else divergence.top1,
        reference_ppl=None if alone else _exp_mean(sum(scores.reference_nll), tokens),
        tokens=tokens,
        protocol=protocol,
    )


@torch.inference_mode()
def score_windows(
    model: Any,
    ids_N: Tensor,
    *,
    protocol: Protocol,
    reference: Any = None,
    attention: Attention | None = None,
    on_window: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[WindowScores, str]:
    """Score a text, window by window; one window's logits are held at a time.

    Windows are cut to the positions of both models.

    Args:
        model: A causal language model of transformers, on any device.
        ids_N: int64 token ids of the whole text.
        reference: The model to compare with; same vocabulary.
        attention: In place of the model's own, as ``QuantizedHistory``; not the reference's.
        on_window: Called with windows done and windows in all, of this process.
        ranks: The processes that call this with the same arguments: each scores a run of the
            windows, and has the scores of all.

    Returns:
        The scores, and the protocol in a line.

    Raises:
        RotqError: text too short, fewer windows than processes, vocabularies differ, a token id
            outside the vocabulary, or logits that are not finite.
    """
    limits = limits_of(model)
    if reference is not None:
        limits = limits.within(limits_of(reference))
    protocol = protocol.within(limits)
    ids_BT = protocol.cut(ids_N)
    limits.check(ids_BT)
    if len(ids_BT) < ranks.size:
        raise RotqError(f"{ranks.size} processes share {len(ids_BT)} windows; use fewer processes")
    scores, windows = WindowScores(), ranks.own(range(len(ids_BT)))
    for done, window in enumerate(windows, start=1):
        ids_T = ids_BT[window]
        first = protocol.first_scored(window)
        with _attending(model, attention):
            logits_TV = window_logits(model, ids_T)[first - 1 : -1]
        target_T = ids_T[first:].to(logits_TV.device)
        scores.tokens.append(target_T.numel())
        scores.nll.append(summed_nll(logits_TV, target_T))
        if reference is not None:
            reference_TV = window_logits(reference, ids_T)[first - 1 : -1].to(logits_TV.device)
            scores.reference_nll.append(summed_nll(reference_TV, target_T))
            scores.divergence += compare(reference_TV, logits_TV, chunk=CHUNK)
        if on_window is not None:
            on_window(done, len(windows))
    return WindowScores.of(ranks.gathered(scores)), protocol.describe(len(ids_BT))


def _attending(model: Any, attention: Attention | None) -> AbstractContextManager[None]:
    return nullcontext() if attention is None else replaced_attention(model, attention)


def _exp_mean(nll: float, tokens: int) -> float:
    mean = nll / tokens
    return math.exp(mean) if mean < 700 else math.inf
