"""What it takes: parts of a decode step, splits, prefill, linear layers, rotations.

Llama-3-8B's shapes; times by CUDA events with a cold L2 cache, or of a CUDA graph, beside torch's
own attention and products in the same step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from gpu.cases import attention_case
from gpu.correctness import attend
from gpu.runner import Run, Step
from torch.nn import functional as F

from rotq.rotations.hadamard import fast_hadamard
from rotq_kernels.kv.format import KVFormat
from rotq_kernels.layout import pack
from rotq_kernels.packed_linear import packed_linear_triton


def form_of(run: Run) -> KVFormat:
    return KVFormat(head_dim=run.pick(128, 64), k_bits=3, v_bits=3)


def dtype_of(run: Run) -> torch.dtype:
    return run.pick(torch.bfloat16, torch.float16)


def decode_parts(run: Run) -> None:
    """A layer's attention for one token, eager and in a graph, beside SDPA's flash attention."""
    for length in run.pick((8192, 32768, 131072), (100,)):
        case = attention_case(
            form_of(run), [length], run.device, heads=run.pick(8, 1), dtype=dtype_of(run),
            poison=False,
        )  # fmt: skip
        call = partial(attend, case)
        run.note(f"decode {length} eager", run.device_us(call), "us")
        run.note(f"decode {length} graph", run.graph_us(call), "us")
        run.note(f"decode {length} host", run.host_us(call), "us")
        k_BHND, v_BHND, _ = case.unpacked()
        plain = partial(
            F.scaled_dot_product_attention, case.q_BMTD, k_BHND, v_BHND, enable_gqa=True
        )
        run.note(f"sdpa {length}", run.device_us(plain), "us")
        if not run.dry:
            _launches(run, f"decode {length} launches", call)


def _launches(run: Run, name: str, call: partial[torch.Tensor]) -> None:
    """Each kernel's time, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    rows = [row for row in found.key_averages() if row.device_time_total]
    run.note(name, sum(row.count for row in rows))
    for row in rows:
        run.say("T1", f"    {row.device_time_total:8.1f} us  {row.count} x {row.key[:80]}")


def splits(run: Run) -> None:
    """Chosen number of splits against the best."""
    batches = run.pick((1, 4, 8, 32), (1,))
    for batch in batches:
        for skewed in (False, True):
            lengths = [run.pick(16384, 100)] * batch
            if skewed:
                lengths = [run.pick(16384, 100), *[run.pick(500, 20)] * (batch - 1)]
            case = attention_case(
                form_of(run), lengths, run.device, heads=run.pick(8, 1), dtype=dtype_of(run),
                poison=False,
            )  # fmt: skip
            chosen = run.device_us(partial(attend, case))
            tried = {
                number: run.device_us(partial(attend, case, splits=number))
                for number in run.pick((1, 2, 4, 8, 16, 33, 66, 132), (1, 2))
            }
            best = min(tried, key=lambda number: tried[number])
            name = f"B={batch}{' skewed' if skewed else ''}"
            run.note(f"{name} over the best ({best} splits)", chosen / tried[best])


def prefill(run: Run) -> None:
    """A chunk after a history, and torch's attention over the same tokens whole."""
    for tokens in run.pick((64, 512, 4096), (20,)):
        for length in run.pick((0, 8192, 65536), (0, 30)):
            case = attention_case(
                form_of(run), [length], run.device, heads=run.pick(8, 1), tokens=tokens,
                dtype=dtype_of(run), poison=False, whole=True,
            )  # fmt: skip
            fused = replace(case, history=replace(case.history, extent=None))
            name = f"{tokens} after {length}"
            pairs = tokens * (length + tokens / 2)
            for how, made in (("whole", case), ("prefill", fused)):
                taken = run.device_us(partial(attend, made), number=5)
                run.note(f"{how} {name}", taken / 1e3, "ms")
                run.note(f"{how} {name} rate", 4 * pairs * 128 * 32 / taken / 1e6, "TFLOPS")
            k_BHND, v_BHND, seen_B1TN = case.unpacked()
            plain = partial(
                F.scaled_dot_product_attention, case.q_BMTD, k_BHND, v_BHND,
                attn_mask=seen_B1TN, enable_gqa=True,
            )  # fmt: skip
            run.note(f"sdpa {name}", run.device_us(plain, number=5) / 1e3, "ms")


def linear(run: Run) -> None:
    """Packed linear layers beside F.linear."""
    shapes = run.pick(
        ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192)), ((64, 128),)
    )
    for N, K in shapes:
        weight_NK = torch.randn(N, K, device=run.device, dtype=dtype_of(run))
        scale_NG = torch.ones(N, K // 128, device=run.device, dtype=torch.float16)
        packed = {}
        for bits in run.pick((3, 4), (3,)):
            low = -(2 ** (bits - 1))
            q_NK = torch.randint(low, -low, (N, K), dtype=torch.int8, device=run.device)
            packed[bits] = pack(q_NK, bits)
        for rows in run.pick((1, 2, 4, 16, 64, 256, 2048), (1, 3)):
            x_MK = torch.randn(rows, K, device=run.device, dtype=dtype_of(run))
            plain = run.device_us(partial(F.linear, x_MK, weight_NK))
            run.note(f"{N}x{K} M={rows} dense", plain, "us")
            for bits, words in packed.items():
                ours = run.device_us(
                    partial(packed_linear_triton, x_MK, words, scale_NG, None, None, bits)
                )
                run.note(f"{N}x{K} M={rows} w{bits}", ours, f"us, {plain / ours:.2f} of dense")


def rotations(run: Run) -> None:
    """The online transform beside a product with its dense matrix."""
    for K in run.pick((4096, 14336), (96,)):
        dense_KK = torch.randn(K, K, device=run.device, dtype=dtype_of(run))
        signs_K = torch.ones(K, device=run.device, dtype=torch.int8)
        for rows in run.pick((1, 64, 4096), (3,)):
            x_RK = torch.randn(rows, K, device=run.device, dtype=dtype_of(run))
            run.note(f"{rows}x{K}", run.device_us(partial(fast_hadamard, x_RK, K, signs_K)), "us")
            run.note(
                f"{rows}x{K} dense", run.device_us(partial(torch.matmul, x_RK, dense_KK)), "us"
            )


TIMING: dict[str, tuple[int, Step]] = {
    "T1": (60, decode_parts),
    "T2": (45, splits),
    "T3": (45, prefill),
    "T4": (60, linear),
    "T5": (20, rotations),
}
"""As ``CORRECTNESS``."""
