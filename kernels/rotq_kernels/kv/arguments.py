"""A history as the flat arguments that ``rotq::packed_attention`` takes, and back.

``torch.library`` knows tensors, numbers and strings, and lists of them, but no dataclasses.
"""

from collections.abc import Sequence
from typing import Any

from rotq_kernels.kv.format import (
    DenseKV,
    Extent,
    KVConstants,
    KVFormat,
    KVHistory,
    KVPages,
    SideConstants,
)

SCHEMA = (
    "(Tensor q_BMTD, Tensor position_BT, float scale, Tensor?[] tables, "
    "Tensor page_table_BJ, Tensor length_B, "
    "Tensor start_B, Tensor? hidden_B, Tensor?[] pages, Tensor?[] constants, Tensor[] dense, "
    "int k_bits, int v_bits, str norm, str residual, str mean, float rotary_scale, int window, "
    "int[] extent) "
    "-> Tensor"
)
"""Queries, positions, scale, ``decode.tables`` (none on a CPU), what ``flatten_history`` gives."""

PAGES = ("k_codes", "v_codes", "k_norm", "v_norm", "k_sign", "k_gamma")
SIDE = ("inverse_HDD", "matrix_HDD", "mean_HD", "levels_HL", "thresholds_HL", "base_H", "unit_H")
LAYER = ("inv_freq_R", "sketch_DD", "residual_scale_H", "gamma_base_H")
DENSE = ("k_BHND", "v_BHND", "position_BN")
EXTENT = ("packed", "skipped", "end")


def flatten_history(history: KVHistory) -> tuple[Any, ...]:
    """Tensors in the order of PAGES, SIDE (keys, then values), LAYER and DENSE; then numbers."""
    form, constants, dense = history.pages.format, history.constants, history.dense
    sides = [getattr(side, name) for side in (constants.key, constants.value) for name in SIDE]
    return (
        history.page_table_BJ,
        history.length_B,
        history.start_B,
        history.hidden_B,
        [getattr(history.pages, name) for name in PAGES],
        sides + [getattr(constants, name) for name in LAYER],
        [] if dense is None else [getattr(dense, name) for name in DENSE],
        form.k_bits,
        form.v_bits,
        form.norm,
        form.residual,
        constants.mean,
        constants.rotary_scale,
        history.window,
        [] if history.extent is None else [getattr(history.extent, name) for name in EXTENT],
    )


def restore_history(*flat: Any) -> KVHistory:
    """Undo ``flatten_history``; of the sides, what only encoding reads is not kept."""
    page_table_BJ, length_B, start_B, hidden_B, pages, tensors, dense, *rest = flat
    k_bits, v_bits, norm, residual, mean, rotary_scale, window, extent = rest
    form = KVFormat(
        head_dim=tensors[0].shape[-1],
        k_bits=k_bits,
        v_bits=v_bits,
        norm=norm,
        residual=residual,
        page_size=pages[0].shape[2],
    )
    constants = _restore_constants(tensors, form)
    constants.mean, constants.rotary_scale = mean, rotary_scale
    return KVHistory(
        pages=KVPages(format=form, **dict(zip(PAGES, pages, strict=True))),
        page_table_BJ=page_table_BJ,
        length_B=length_B,
        start_B=start_B,
        hidden_B=hidden_B,
        constants=constants,
        dense=DenseKV(**dict(zip(DENSE, dense, strict=True))) if dense else None,
        window=window,
        extent=Extent(**dict(zip(EXTENT, extent, strict=True))) if extent else None,
    )


def _restore_constants(tensors: Sequence[Any], form: KVFormat) -> KVConstants:
    number = len(SIDE)
    key, value = (
        SideConstants(**dict(zip(SIDE, side, strict=True)))
        for side in (tensors[:number], tensors[number : 2 * number])
    )
    layer = dict(zip(LAYER, tensors[2 * number :], strict=True))
    return KVConstants(format=form, key=key, value=value, **layer)
