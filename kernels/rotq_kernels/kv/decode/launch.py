"""Launches the three kernels of a decode step: turn the query, split, merge.

The dense tokens are attended to beside the turning (``turn``), which is one launch then. A step of
a text differs from the one before in addresses and a few numbers, so kernels and the arguments that
stay are kept with the layer's tables: a host that looked at all of them at each launch would take
longer than the GPU.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.decode.sizes import (
    COLUMNS,
    MAX_ROWS,
    has_ptx,
    lane_order,
    merge_sizes,
    precision,
    tile_sizes,
    turn_sizes,
)
from rotq_kernels.kv.decode.splits import choose_run, run_of
from rotq_kernels.kv.decode.tables import DecodeTables, decode_tables, page_arguments
from rotq_kernels.kv.format import KVConstants, KVHistory
from rotq_kernels.launching import ALIGNED, Known, launch, require_triton


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
    known: Known | None
    """Of the layer's kernels, for steps like this one."""


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
    known = _known(q_BMTD, position_BT, history, tables)
    step = _allocate(q_BMTD, history, sizes, splits, known)
    _turn(q_BMTD, position_BT, history, scale, step, tables)
    _split(q_BMTD, position_BT, history, step, tables, sizes)
    return _merge(q_BMTD, history.constants, step)


def step_tables(q_BMTD: Tensor, history: KVHistory) -> DecodeTables:
    """What the decode kernels keep of a layer, for queries like these."""
    exact = q_BMTD.dtype == torch.float32
    # the tile's tokens do not depend on the number of rows
    tile = tile_sizes(q_BMTD.shape[3], 1, has_ptx=has_ptx(q_BMTD), exact=exact)["TILE"]
    return decode_tables(history.constants, tile, exact=exact)


def _sizes(q_BMTD: Tensor, history: KVHistory) -> dict[str, int]:
    _, M, T, D = q_BMTD.shape
    rows = M // history.pages.k_codes.shape[1] * T
    exact = q_BMTD.dtype == torch.float32
    return tile_sizes(D, rows, has_ptx=has_ptx(q_BMTD), exact=exact)


def _known(
    q_BMTD: Tensor, position_BT: Tensor, history: KVHistory, tables: DecodeTables
) -> Known | None:
    """Kernels that were launched by steps with the same of all that Triton compiles for.

    None where an address is no multiple of what Triton takes for aligned.
    """
    dense = history.dense
    given = [q_BMTD, position_BT, history.page_table_BJ, history.length_B, history.start_B]
    shape: tuple[Any, ...] = ()
    if history.hidden_B is not None:
        given.append(history.hidden_B)
    if dense is not None:
        k_BHND, v_BHND = dense.k_BHND, dense.v_BHND
        given += [k_BHND, v_BHND, dense.position_BN]
        shape = (k_BHND.dtype, k_BHND.stride(), v_BHND.dtype, v_BHND.stride())
    addresses = 0
    for tensor in given:
        addresses |= tensor.data_ptr()
    if addresses % ALIGNED:
        return None
    gaps = page_arguments(history.pages, history.constants, tables).gaps
    hidden, window = history.hidden_B is None, history.window
    return tables.known[q_BMTD.shape[1:], q_BMTD.dtype, window, hidden, shape, gaps]


def _allocate(
    q_BMTD: Tensor,
    history: KVHistory,
    sizes: dict[str, int],
    splits: int | None,
    known: Known | None,
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
        known=known,
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
    exact = q_BMTD.dtype == torch.float32
    launch(
        turn_kernel,
        (heads, -(-D // COLUMNS) + (dense is not None), 1),
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
        **turn_sizes(D, exact=exact),
        TURN=precision(True),
        DENSE=precision(exact),
        on=q_BMTD,
        known=step.known,
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
    pages = page_arguments(history.pages, history.constants, tables)
    launch(
        decode_kernel,
        (heads, step.splits, 1),
        step.levels,
        step.residual,
        step.cosine,
        step.sine,
        tables.angle_2SR,
        history.constants.inv_freq_R if step.cosine is not None else None,
        *pages.pointers,
        history.page_table_BJ.contiguous(),
        history.length_B.contiguous(),
        history.start_B.contiguous(),
        None if history.hidden_B is None else history.hidden_B.contiguous(),
        position_BT,
        step.sums,
        step.peak,
        step.weight,
        history.pages.k_codes.shape[1],
        rows,
        q_BMTD.shape[2],
        history.page_table_BJ.shape[1],
        step.peak.shape[1],
        step.run,
        *pages.gaps,
        D=q_BMTD.shape[3],
        R=1 if step.cosine is None else step.cosine.shape[2],
        **pages.sizes,
        WINDOW=history.window,
        N=sizes["N"],
        TILE=sizes["TILE"],
        LIMBS=3 if q_BMTD.dtype == torch.float32 else 2,
        PTX=has_ptx(q_BMTD),
        **lane_order(has_ptx=has_ptx(q_BMTD)),
        WARPS=sizes["WARPS"],
        num_warps=sizes["WARPS"],
        num_stages=1,
        on=q_BMTD,
        known=step.known,
    )


def _merge(q_BMTD: Tensor, constants: KVConstants, step: _Step) -> Tensor:
    from rotq_kernels.kv.decode.merge import merge_kernel

    heads, partials, rows, D = step.sums.shape
    out_BMTD = torch.empty_like(q_BMTD)
    named: dict[str, Any] = merge_sizes(D, rows)
    launch(
        merge_kernel,
        (heads, -(-D // COLUMNS), 1),
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
        **named,
        PRECISION=precision(True),
        num_warps=8,
        on=q_BMTD,
        known=step.known,
    )
    return out_BMTD
