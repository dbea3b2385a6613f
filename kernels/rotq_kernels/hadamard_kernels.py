# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Triton kernels of ``hadamard``: Sylvester's matrix along runs, then the core across them."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_runs"])
def sylvester_kernel(
    x_ptr,
    signs_ptr,
    y_ptr,
    num_runs,
    stride_xr,
    M,
    scale,
    HAS_SIGNS: tl.constexpr,
    LOG_P: tl.constexpr,
    P: tl.constexpr,
    RUNS: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    j = tl.arange(0, P)
    first = (run % M) * P
    inside = (run < num_runs)[:, None] & (j < P)[None, :]
    source = (run // M * stride_xr + first)[:, None] + j[None, :]
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)  # [RUNS, P]
    if HAS_SIGNS:
        x *= tl.load(signs_ptr + first[:, None] + j[None, :], mask=inside, other=0).to(tl.float32)
    for _ in tl.static_range(LOG_P):
        # the lowest bit of the index becomes the highest: after all steps the order is natural
        a, b = tl.split(tl.reshape(x, (RUNS, P // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (RUNS, P))
    y = (x * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + run[:, None] * P + j[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["num_columns"])
def core_kernel(
    z_ptr,
    core_ptr,
    y_ptr,
    num_columns,
    M,
    P,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # a column is one place in the runs of one row
    column = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = column // P * M * P + column % P
    o = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k in range(0, M, BLOCK_I):
        i = k + tl.arange(0, BLOCK_I)
        in_core = (i < M)[None, :] & (o < M)[:, None]
        core = tl.load(core_ptr + i[None, :] * M + o[:, None], mask=in_core, other=0)
        in_rows = (i < M)[:, None] & (column < num_columns)[None, :]
        z = tl.load(z_ptr + start[None, :] + i[:, None] * P, mask=in_rows, other=0.0)
        # [BLOCK_M, BLOCK_I] @ [BLOCK_I, BLOCK_C]
        y = tl.dot(core.to(tl.float32), z, y, input_precision="ieee")
    inside = (o < M)[:, None] & (column < num_columns)[None, :]
    y = (y * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + start[None, :] + o[:, None] * P, y, mask=inside)
