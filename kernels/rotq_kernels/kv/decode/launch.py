"""Launches the three kernels of a decode step: turn the query, split, merge.

The dense tokens are attended to beside the turning (``turn``), which is one launch then.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.decode.splits import MOST_SPLITS, choose_run, run_of
from rotq_kernels.kv.decode.tables import DecodeTables, decode_tables
from rotq_kernels.kv.format import KVConstants, KVHistory
from rotq_kernels.launching import launch, next_power_of_two, require_triton

MAX_ROWS = 16
"""Query rows of a KV head, heads by tokens, that a decode kernel takes as one tile."""

COLUMNS = 32
"""Elements of the query, and of the output, that a program turns."""


@dataclass(kw_only=True)
class _Step:
    """What the kernels hand on to each other; fp32, scores in units of log2."""

    levels: Tensor
    residual: Tensor | None
    cosine: Tensor | None
    sine: Tensor | None
    constant: Tensor | None
    sums: Tensor
    peak: Tensor
    weight: Tensor
    splits: int
    run: int


def packed_decode(
    q_BMTD: Tensor,
    position_BT: Tensor,
    history: KVHistory,
    *,
    scale: float,
    splits: int | None = None,
    tables: DecodeTables | None = None,
) -> Tensor:
    """``packed_attention`` of at most MAX_ROWS query rows of each KV head, unchecked.

    ``splits`` is the number of programs that share the packed tokens of a KV head, ``tables`` what
    ``decode_tables`` gives. No size is read back from the device, so that a step can be captured in
    a CUDA graph.
    """
    require_triton()
    q_BMTD, position_BT = q_BMTD.contiguous(), position_BT.contiguous()
    sizes = _sizes(q_BMTD, history)
    tables = tables or step_tables(q_BMTD, history)
    step = _allocate(q_BMTD, history, sizes, splits)
    _turn(q_BMTD, position_BT, history, scale, step, tables)
    _split(q_BMTD, position_BT, history, step, tables, sizes)
    return _merge(q_BMTD, history.constants, step)


def step_tables(q_BMTD: Tensor, history: KVHistory) -> DecodeTables:
    """What the decode kernels keep of a layer, for queries like these."""
    exact = q_BMTD.dtype == torch.float32
    # the tile's tokens do not depend on the number of rows
    tile = tile_sizes(q_BMTD.shape[3], 1, has_ptx=_has_ptx(q_BMTD), exact=exact)["TILE"]
    return decode_tables(history.constants, tile, exact=exact)


def tile_sizes(D: int, rows: int, *, has_ptx: bool, exact: bool) -> dict[str, int]:
    """Sizes of the decode kernel's tile: query rows N, tokens TILE, and WARPS.

    Args:
        D: Head width.
        rows: Query rows of a KV head, at most MAX_ROWS.
        has_ptx: Whether the GPU is NVIDIA's.
        exact: fp32 queries, which of wide heads take so much shared memory that a small GPU holds
            half of a tile.
    """
    warps = 2 if exact and D > 128 else 4
    # 16 lines of codes a warp; heads of one or two chunks put four or two tokens on a line
    tokens = 16 * warps * max(1, 4 // -(-D // 32))
    return {"N": 8 if rows <= 8 and has_ptx else MAX_ROWS, "TILE": tokens, "WARPS": warps}


def turn_sizes(D: int, *, exact: bool) -> dict[str, int]:
    """Dense tokens at a time, and stages: of wide fp32 heads as many as a small GPU holds."""
    return {"TILE": 16, "num_stages": 1} if exact and D > 128 else {"TILE": 32, "num_stages": 3}


def merge_sizes(D: int, rows: int) -> dict[str, int]:
    """Sizes of the merge's tile, however many partial results there are.

    N rows, P maxima and PARTS sums at a time, BLOCK elements.
    """
    n = next_power_of_two(rows)
    parts = min(32, max(1, 16384 // (n * next_power_of_two(D))))
    return {"N": n, "P": MOST_SPLITS, "PARTS": parts, "BLOCK": COLUMNS}


def _sizes(q_BMTD: Tensor, history: KVHistory) -> dict[str, int]:
    _, M, T, D = q_BMTD.shape
    rows = M // history.pages.k_codes.shape[1] * T
    exact = q_BMTD.dtype == torch.float32
    return tile_sizes(D, rows, has_ptx=_has_ptx(q_BMTD), exact=exact)


def _has_ptx(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None


def _allocate(
    q_BMTD: Tensor, history: KVHistory, sizes: dict[str, int], splits: int | None
) -> _Step:
    """Memory for a step, and its run of tokens."""
    (B, M, T, D), constants = q_BMTD.shape, history.constants
    heads = B * history.pages.k_codes.shape[1]
    rows, tile = B * M // heads * T, sizes["TILE"]
    tokens = history.page_table_BJ.shape[1] * history.pages.format.page_size
    if history.window:
        tokens = min(tokens, history.window + T + 2 * tile)
    if splits is not None or not q_BMTD.is_cuda:
        run = run_of(tokens, splits or 2, tile)
    else:
        run = choose_run(tokens, heads, _num_sm(q_BMTD.device), sizes["N"], tile)
    splits = max(1, -(-tokens // run))
    partials = splits + (history.dense is not None)
    turns = constants.mean == "rope"
    has_constant = constants.mean == "static"
    pairs = 0
    if turns:
        assert constants.inv_freq_R is not None
        pairs = constants.inv_freq_R.shape[0]
        has_constant = 2 * pairs < D

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q_BMTD.device)

    return _Step(
        levels=empty(heads, rows, D),
        residual=empty(heads, rows, D) if constants.format.residual != "none" else None,
        cosine=empty(heads, rows, pairs) if turns else None,
        sine=empty(heads, rows, pairs) if turns else None,
        constant=empty(heads, rows) if has_constant else None,
        sums=empty(heads, partials, rows, D),
        peak=empty(heads, partials, rows),
        weight=empty(heads, partials, rows),
        splits=splits,
        run=run,
    )


def _num_sm(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _turn(
    q_BMTD: Tensor,
    position_BT: Tensor,
    history: KVHistory,
    scale: float,
    step: _Step,
    tables: DecodeTables,
) -> None:
    from rotq_kernels.kv.decode.turn import turn_kernel

    constants, dense = history.constants, history.dense
    key, D, (heads, rows, _) = constants.key, q_BMTD.shape[3], step.levels.shape
    k_BHND, v_BHND, dense_position = (
        (q_BMTD, q_BMTD, position_BT)
        if dense is None
        else (dense.k_BHND, dense.v_BHND, dense.position_BN.contiguous())
    )
    launch(
        turn_kernel,
        (heads, -(-D // COLUMNS) + (dense is not None)),
        q_BMTD,
        key.inverse_HDD.contiguous(),
        tables.residual_HDD,
        constants.residual_scale_H if constants.format.residual == "sign" else None,
        key.mean_HD.contiguous() if constants.mean != "none" else None,
        step.levels,
        step.residual,
        step.cosine,
        step.sine,
        step.constant,
        k_BHND,
        v_BHND,
        dense_position,
        position_BT,
        step.sums,
        step.peak,
        step.weight,
        key.mean_HD.shape[0],
        rows,
        q_BMTD.shape[2],
        k_BHND.shape[2],
        step.peak.shape[1],
        scale * math.log2(math.e),
        constants.rotary_scale,
        *k_BHND.stride()[:3],
        *v_BHND.stride()[:3],
        D=D,
        R=0 if step.cosine is None else step.cosine.shape[2],
        WINDOW=history.window,
        N=MAX_ROWS,
        BLOCK=COLUMNS,
        **turn_sizes(D, exact=q_BMTD.dtype == torch.float32),
        TURN=_precision(True),
        DENSE=_precision(q_BMTD.dtype == torch.float32),
        on=q_BMTD,
    )


def _split(
    q_BMTD: Tensor,
    position_BT: Tensor,
    history: KVHistory,
    step: _Step,
    tables: DecodeTables,
    sizes: dict[str, int],
) -> None:
    from rotq_kernels.kv.decode.kernel import decode_kernel

    heads, rows, _ = step.levels.shape
    launch(
        decode_kernel,
        (heads, step.splits),
        step.levels,
        step.residual,
        step.cosine,
        step.sine,
        tables.angle_2SR,
        history.constants.inv_freq_R if step.cosine is not None else None,
        **_page_arguments(history, tables),
        page_table_ptr=history.page_table_BJ.contiguous(),
        length_ptr=history.length_B.contiguous(),
        start_ptr=history.start_B.contiguous(),
        hidden_ptr=None if history.hidden_B is None else history.hidden_B.contiguous(),
        position_ptr=position_BT,
        sums_ptr=step.sums,
        peak_ptr=step.peak,
        weight_ptr=step.weight,
        H=history.pages.k_codes.shape[1],
        rows=rows,
        T=q_BMTD.shape[2],
        table_width=history.page_table_BJ.shape[1],
        partials=step.peak.shape[1],
        run=step.run,
        D=q_BMTD.shape[3],
        R=1 if step.cosine is None else step.cosine.shape[2],
        WINDOW=history.window,
        LIMBS=3 if q_BMTD.dtype == torch.float32 else 2,
        PTX=_has_ptx(q_BMTD),
        **sizes,
        num_warps=sizes["WARPS"],
        num_stages=1,
        on=q_BMTD,
    )


def _page_arguments(history: KVHistory, tables: DecodeTables) -> dict[str, Any]:
    pages, constants = history.pages, history.constants
    form, key, value = pages.format, constants.key, constants.value
    return {
        "k_codes_ptr": pages.k_codes,
        "k_norm_ptr": pages.k_norm,
        "k_sign_ptr": pages.k_sign,
        "k_gamma_ptr": pages.k_gamma,
        "k_table_ptr": tables.k_words,
        "k_base_ptr": key.base_H.contiguous(),
        "gamma_base_ptr": constants.gamma_base_H if pages.k_gamma is not None else None,
        "v_codes_ptr": pages.v_codes,
        "v_norm_ptr": pages.v_norm,
        "v_table_ptr": tables.v_words,
        "v_base_ptr": value.base_H.contiguous(),
        **{f"gap_{name}": gap for name, gap in pages.gaps.items()},
        "K_BITS": form.k_bits,
        "V_BITS": form.v_bits,
        "PAGE": form.page_size,
    }


def _merge(q_BMTD: Tensor, constants: KVConstants, step: _Step) -> Tensor:
    from rotq_kernels.kv.decode.merge import merge_kernel

    heads, partials, rows, D = step.sums.shape
    out_BMTD = torch.empty_like(q_BMTD)
    launch(
        merge_kernel,
        (heads, -(-D // COLUMNS)),
        step.sums,
        step.peak,
        step.weight,
        step.constant,
        constants.value.inverse_HDD.contiguous(),
        constants.value.mean_HD.contiguous(),
        out_BMTD,
        constants.value.mean_HD.shape[0],
        rows,
        step.splits,
        partials,
        D=D,
        **merge_sizes(D, rows),
        PRECISION=_precision(True),
        num_warps=8,
        on=q_BMTD,
    )
    return out_BMTD


def _precision(exact: bool) -> str:
    """Of products of fp32 tiles. tf32 holds 16-bit floats as they are; AMD has no three passes."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if exact else "tf32"
