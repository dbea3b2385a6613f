"""What a decode step needs of a layer beside its constants: made once, kept with them.

Angles depend on the layer alone, and so does the matrix that a query meets the signs of a sketch
with, c A^-1 S^T: one product instead of two for each query.

Shape suffixes: H KV heads, D head width, R rotary pairs, S tokens of a tile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.format import KVConstants, KVPages, level_words
from rotq_kernels.kv.rope_mean import angle_table
from rotq_kernels.launching import Known

_KEPT = "_decode_tables"
_KEPT_PAGES = "_decode_arguments"


@dataclass(frozen=True, kw_only=True)
class DecodeTables:
    """Of one layer, for queries of fp32 or of 16 bits."""

    angle_2SR: Tensor | None
    """fp16, fp32 for fp32 queries; None unless the mean turns."""
    residual_HDD: Tensor | None
    """fp32 c A^-1 S^T; None without a sketch."""
    k_words: Tensor | None
    """Levels of keys as kernels look them up; see ``level_words``."""
    v_words: Tensor | None
    known: defaultdict[Any, Known] = field(default_factory=lambda: defaultdict(Known), repr=False)
    """Kernels that steps of this layer have launched, by what these are compiled for."""

    def flat(self) -> list[Tensor | None]:
        """The tensors, in the order of the fields."""
        return [self.angle_2SR, self.residual_HDD, self.k_words, self.v_words]

    @classmethod
    def restore(cls, flat: Sequence[Tensor | None]) -> DecodeTables:
        """Undo ``flat``."""
        angle_2SR, residual_HDD, k_words, v_words = flat
        return cls(angle_2SR=angle_2SR, residual_HDD=residual_HDD, k_words=k_words, v_words=v_words)


@dataclass(frozen=True, kw_only=True)
class PageArguments:
    """What the split kernel is given of pages and constants, in its order."""

    of: tuple[Tensor, DecodeTables]
    """Codes of keys and tables of the layer, by which it is known whether they are still these."""
    pointers: tuple[Tensor | None, ...]
    gaps: tuple[int | None, ...]
    sizes: dict[str, int]


def page_arguments(pages: KVPages, constants: KVConstants, tables: DecodeTables) -> PageArguments:
    """Kept with the pages from the first call on, and made anew when their memory is another."""
    kept: PageArguments | None = vars(pages).get(_KEPT_PAGES)
    if kept is None or kept.of[0] is not pages.k_codes or kept.of[1] is not tables:
        kept = vars(pages)[_KEPT_PAGES] = _page_arguments(pages, constants, tables)
    return kept


def _page_arguments(pages: KVPages, constants: KVConstants, tables: DecodeTables) -> PageArguments:
    form, gaps = pages.format, pages.gaps
    return PageArguments(
        of=(pages.k_codes, tables),
        pointers=(
            pages.k_codes,
            pages.k_norm,
            pages.k_sign,
            pages.k_gamma,
            tables.k_words,
            constants.key.base_H.contiguous(),
            constants.gamma_base_H if pages.k_gamma is not None else None,
            pages.v_codes,
            pages.v_norm,
            tables.v_words,
            constants.value.base_H.contiguous(),
        ),
        gaps=tuple(
            gaps[name] for name in ("k_codes", "k_norm", "k_sign", "k_gamma", "v_codes", "v_norm")
        ),
        sizes={"K_BITS": form.k_bits, "V_BITS": form.v_bits, "PAGE": form.page_size},
    )


def decode_tables(constants: KVConstants, tokens: int, *, exact: bool) -> DecodeTables:
    """The tables of a layer, kept on ``constants`` from the first call on.

    Args:
        constants: Of the layer; its tensors must not be changed in place afterwards.
        tokens: S, of a tile of the decode kernel.
        exact: For fp32 queries.
    """
    kept = vars(constants).setdefault(_KEPT, {})
    if (tokens, exact) not in kept:
        kept[tokens, exact] = _make(constants, tokens, exact)
    found: DecodeTables = kept[tokens, exact]
    return found


def _make(constants: KVConstants, tokens: int, exact: bool) -> DecodeTables:
    angle_2SR = residual_HDD = None
    if constants.mean == "rope":
        assert constants.inv_freq_R is not None
        dtype = torch.float32 if exact else torch.float16
        angle_2SR = angle_table(constants.inv_freq_R, tokens, dtype)
    if constants.format.residual == "qjl":
        assert constants.sketch_DD is not None
        assert constants.residual_scale_H is not None
        weight_H11 = constants.residual_scale_H[:, None, None]
        if constants.format.norm == "none":
            # the signs are multiplied by s_t, which is one number, as g_t is
            assert constants.gamma_base_H is not None
            ratio_H = torch.exp2(constants.gamma_base_H - constants.key.base_H)
            weight_H11 = weight_H11 * ratio_H[:, None, None]
        whole_HDD = constants.key.inverse_HDD.double() @ constants.sketch_DD.mT.double()
        residual_HDD = (whole_HDD * weight_H11).float()
    form = constants.format
    return DecodeTables(
        angle_2SR=angle_2SR,
        residual_HDD=residual_HDD,
        k_words=level_words(constants.key.levels_HL, form.k_bits),
        v_words=level_words(constants.value.levels_HL, form.v_bits),
    )
