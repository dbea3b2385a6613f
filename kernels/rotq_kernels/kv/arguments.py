"""Pages, constants and dense tokens as the flat lists that operators take, and back.

``torch.library`` knows tensors, numbers and strings, and lists of them, but no dataclasses.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rotq_kernels.kv.format import DenseKV, KVConstants, KVFormat, KVPages, SideConstants

PAGES = ("k_codes", "v_codes", "k_norm", "v_norm", "k_sign", "k_gamma")
SIDE = ("inverse_HDD", "matrix_HDD", "mean_HD", "levels_HL", "thresholds_HL", "base_H", "unit_H")
LAYER = ("inv_freq_R", "sketch_DD", "residual_scale_H", "gamma_base_H")
DENSE = ("k_BHND", "v_BHND", "position_BN")

Tensors = list[Tensor | None]


def flatten_pages(pages: KVPages) -> Tensors:
    """Tensors in the order of PAGES."""
    return [getattr(pages, name) for name in PAGES]


def flatten_transform(transform: KVConstants) -> Tensors:
    """Tensors of keys and of values in the order of SIDE, then those of LAYER."""
    sides = [getattr(side, name) for side in (transform.key, transform.value) for name in SIDE]
    return sides + [getattr(transform, name) for name in LAYER]


def flatten_dense(dense: DenseKV | None) -> list[Tensor]:
    """Tensors in the order of DENSE, none without dense tokens."""
    return [] if dense is None else [getattr(dense, name) for name in DENSE]


def restore_pages(tensors: Sequence[Tensor | None], form: KVFormat) -> KVPages:
    """Undo ``flatten_pages``."""
    return KVPages(format=form, **dict(zip(PAGES, tensors, strict=True)))  # type: ignore[arg-type]


def restore_transform(
    tensors: Sequence[Tensor | None], form: KVFormat, *, mean: str, rotary_scale: float
) -> KVConstants:
    """Undo ``flatten_transform``; the sides' ``gain``, which only encoding reads, is not kept."""
    number = len(SIDE)
    key, value = (
        SideConstants(**dict(zip(SIDE, side, strict=True)))  # type: ignore[arg-type]
        for side in (tensors[:number], tensors[number : 2 * number])
    )
    return KVConstants(
        format=form,
        key=key,
        value=value,
        mean=mean,  # type: ignore[arg-type]
        rotary_scale=rotary_scale,
        **dict(zip(LAYER, tensors[2 * number :], strict=True)),  # type: ignore[arg-type]
    )


def restore_dense(tensors: Sequence[Tensor]) -> DenseKV | None:
    """Undo ``flatten_dense``."""
    return DenseKV(**dict(zip(DENSE, tensors, strict=True))) if tensors else None


def restore_arguments(
    q_BMTD: Tensor,
    pages: Sequence[Tensor | None],
    page_table_BJ: Tensor,
    length_B: Tensor,
    start_B: Tensor,
    query_position_BT: Tensor,
    constants: Sequence[Tensor | None],
    dense: Sequence[Tensor],
    k_bits: int,
    v_bits: int,
    norm: str,
    residual: str,
    mean: str,
    rotary_scale: float,
    window: int,
    scale: float,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of ``packed_attention`` from those of its operator."""
    assert pages[0] is not None
    form = KVFormat(
        head_dim=q_BMTD.shape[-1],
        k_bits=k_bits,
        v_bits=v_bits,
        norm=norm,  # type: ignore[arg-type]
        residual=residual,  # type: ignore[arg-type]
        page_size=pages[0].shape[2],
    )
    transform = restore_transform(constants, form, mean=mean, rotary_scale=rotary_scale)
    where = (page_table_BJ, length_B, start_B, query_position_BT)
    keywords = {"dense": restore_dense(dense), "window": window, "scale": scale}
    return (q_BMTD, restore_pages(pages, form), *where, transform), keywords
