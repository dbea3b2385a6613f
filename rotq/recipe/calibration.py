"""Sections of a recipe: the texts that statistics are taken from, and how much a token counts.

The string below a field is its documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rotq.recipe.sections import check, check_seed

BOS = Literal["auto", "yes", "no"]
"""What windows of text begin with, see ``Calibration``."""

Strategy = Literal[
    "none",
    "attention",
    "first_n",
    "token_frequency",
    "activation_norm",
    "activation_difference",
    "token_similarity",
    "gradient",
]
"""What decides the importance of a token."""

MOST_TOKENS = 2**30
"""Of all calibration windows; as int64 they take 8 GiB."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of several calibration texts."""

    source: str
    """As ``calibration.source``."""
    share: float = 1.0
    """Of the windows, against the shares of the others."""

    def __post_init__(self) -> None:
        check("share", self.share, 0 < self.share <= 10**6, "above 0, at most 1000000")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text that statistics are taken from."""

    source: str = "pydoc"
    """A .txt, .jsonl, .json or .fasta file, a ``datasets`` id, ``pydoc`` (ships with Python), or
    ``self``: what the model writes itself, drawn token by token from its own distribution."""
    mix: tuple[Share, ...] = ()
    """Several texts in place of ``source``, each with its share of the windows."""
    masked: float = 0.15
    """Share of residues that a masked language model of proteins finds masked."""
    num_samples: int = 64
    """Windows that are drawn from the text."""
    seq_len: int = 1024
    """Tokens of each window; a model with fewer positions gets as many as it has."""
    batch_size: int = 4
    """Windows of one forward pass."""
    bos: BOS = "auto"
    """What a window of text begins with: the special tokens that the tokenizer puts before a text,
    its BOS in any case, or nothing."""
    seed: int = 0
    """Seed of the windows' draw; the rotation has its own."""
    offload: bool = False
    """Keep the activation streams in files in the job folder instead of in memory."""
    precision: Literal["highest", "medium"] = "medium"
    """fp32 matrix products of the calibration passes: fp32, or bf16 products with fp32 sums."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len", "batch_size"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        tokens = self.num_samples * self.seq_len
        check("num_samples x seq_len", tokens, tokens <= MOST_TOKENS, f"at most {MOST_TOKENS}")
        check("batch_size", self.batch_size, self.batch_size <= 10**6, "at most 1000000")
        check("masked", self.masked, 0 <= self.masked < 1, "0 or more, below 1")
        check_seed(self.seed)
        texts = len(self.mix)
        check("number of texts in mix", texts, texts <= self.num_samples, "at most num_samples")

    @property
    def texts(self) -> tuple[Share, ...]:
        """What the windows are drawn from."""
        return self.mix or (Share(source=self.source),)


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much each calibration token counts (RSQ, arXiv 2503.01820)."""

    strategy: Strategy = "none"
    """What a token's score is; ``gradient`` (GuidedQuant, arXiv 2505.07004) is its weight itself,
    layer by layer, and looks at none of scaling, floor, power and first_n."""
    groups: Literal[1, 2, 4] = 1
    """Groups of a layer's output rows with weights of their own; only ``gradient`` tells them."""
    scaling: Literal["minmax", "quantile", "sink"] = "quantile"
    """How scores become weights: min-max, 1 %-99 % min-max, or min-max with sinks left out."""
    floor: float = 0.1
    """Weight of the least important token; the most important one has 1."""
    power: Literal[1, 2] = 1
    """Exponent on the weights: 1 as RSQ's code does, 2 as its formula says."""
    first_n: float = 0.125
    """Share of the window that ``first_n`` favours."""

    def __post_init__(self) -> None:
        check("floor", self.floor, 0 < self.floor <= 1, "above 0, at most 1")
        check("first_n", self.first_n, 0 < self.first_n <= 1, "above 0, at most 1")
        if self.groups != 1 and self.strategy != "gradient":
            raise ValueError("groups: only strategy gradient weighs groups of rows apart")
