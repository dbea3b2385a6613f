"""What is right: compilation, kernels against fp64 oracles, repeats, the sanitizer, CUDA graphs.

A kernel passes where its largest error is at most twice that of plain PyTorch in the same dtype.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu.cases import AttentionCase, attention_case, moved, worst
from gpu.runner import Run, Step
from kv_cases import paged_slots, tokens_of, transform_of
from torch.nn import functional as F

from rotq.rotations.hadamard import core_order, paley_core, random_signs
from rotq_kernels.hadamard import hadamard_reference, hadamard_triton
from rotq_kernels.kv.attention import packed_attention_triton
from rotq_kernels.kv.encode.launch import encode_kv_triton
from rotq_kernels.kv.encode.reference import encode_kv_reference
from rotq_kernels.kv.format import KVFormat, KVPages
from rotq_kernels.kv.prefill.whole import WHOLE_TOKENS
from rotq_kernels.layout import pack
from rotq_kernels.packed_linear import dequantize_reference, packed_linear_triton

FORMATS = {
    "k3v3 D128": KVFormat(head_dim=128, k_bits=3, v_bits=3),
    "k3v3 D64": KVFormat(head_dim=64, k_bits=3, v_bits=3),
    "k4v2 D80": KVFormat(head_dim=80, k_bits=4, v_bits=2, page_size=16),
    "k8v3 D96": KVFormat(head_dim=96, k_bits=8, v_bits=3, page_size=16),
    "k5v7 D256": KVFormat(head_dim=256, k_bits=5, v_bits=7, norm="float16"),
    "k2v6 qjl D128": KVFormat(head_dim=128, k_bits=2, v_bits=6, residual="qjl"),
    "k3v3 sign D64": KVFormat(head_dim=64, k_bits=3, v_bits=3, residual="sign", norm="none"),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def kernel_of(run: Run, dtype: torch.dtype) -> bool:
    """bf16 products are wrong in the interpreter (tests/kernels/conftest.py)."""
    return not (run.dry and dtype == torch.bfloat16)


def environment(run: Run) -> None:
    run.note("torch", torch.__version__)
    run.note("triton", __import__("triton").__version__)
    if run.dry:
        return
    card = torch.cuda.get_device_properties(0)
    run.note("card", f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} SMs")
    run.note("shared memory of a block", card.shared_memory_per_block_optin / 1024, "KiB")
    source = torch.empty(1 << 29, dtype=torch.int8, device=run.device)
    target = torch.empty_like(source)
    taken = run.device_us(partial(target.copy_, source))
    run.note("copy bandwidth", 2 * source.nbytes / taken / 1e3, "GB/s")


def compile_all(run: Run) -> None:
    """``compile_check`` for this card, in eight processes."""
    if run.dry:
        run.say("C0", "nothing is compiled in the interpreter")
        return
    major, minor = torch.cuda.get_device_capability(0)
    nearest = {"86": "89"}.get(f"{major}{minor}", f"{major}{minor}")
    modules = ("decode", "prefill", "encode", "hadamard", "gemv", "gemm", "merge", "unpack")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rotq_kernels.compile_check", "--target", f"sm_{nearest}"]
    running = [
        subprocess.Popen(
            [*command, "--only", name],
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in modules
    ]
    for process in running:
        rows, errors = process.communicate()
        run.say("C0", "\n".join(line for line in rows.splitlines() if "| sm_" in line))
        for line in errors.splitlines():
            if "a launch would fail" in line or "Error" in line:
                run.fail(line)


def encoding(run: Run) -> None:
    """Codes and norms of kernel and reference; sums of another order may fall to either side."""

    def case(name: str, mean: str, tokens: int) -> None:
        form = FORMATS[name]
        constants = transform_of(form, 2, mean=mean)
        k_BHTD, v_BHTD = tokens_of(constants, 1, tokens)
        slot_BT, _, num_pages = paged_slots([tokens], form.page_size)
        slot_BT[0, tokens // 2] = -1
        given = (k_BHTD, v_BHTD, torch.arange(tokens)[None], slot_BT)
        expected = KVPages.empty(form, num_pages, 2)
        encode_kv_reference(*given, constants, expected)
        found = KVPages.empty(form, num_pages, 2, run.device)
        encode_kv_triton(*(x.to(run.device) for x in given), moved(constants, run.device), found)
        same = [
            float((ours.cpu() == theirs).float().mean())
            for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True)
        ]
        run.expect(min(same) > 0.995, f"{name} {mean} T={tokens}: {min(same):.5f} of words equal")

    means = run.pick(("rope", "static", "none"), ("rope",))
    names = run.pick(tuple(FORMATS), ("k3v3 D64", "k4v2 D80"))
    sizes = run.pick((1, 17, 4096), (17,))
    run.each({f"{n} {m} {t}": partial(case, n, m, t) for n in names for m in means for t in sizes})


def attend(case: AttentionCase, **options: Any) -> torch.Tensor:
    return packed_attention_triton(
        case.q_BMTD, case.position_BT, case.history, scale=case.scale, **options
    )


def check_attention(run: Run, name: str, case: AttentionCase, **options: Any) -> None:
    """Kernel against baseline."""
    exact = case.oracle()
    ours, theirs = worst(attend(case, **options), exact), worst(case.baseline(), exact)
    allowed = 2 * theirs + 1e-5
    run.expect(ours <= allowed, f"{name}: error {ours:.2e}, plain PyTorch's {theirs:.2e}")


def decoding(run: Run) -> None:
    """Ragged lengths, windows, groups, pages, dtypes."""

    def case(name: str, dtype: torch.dtype, group: int, window: int) -> None:
        lengths = run.pick([1000, 1, 0, 333], [20, 0])
        made = attention_case(
            FORMATS[name], lengths, run.device, group=group, dtype=dtype, window=window
        )
        check_attention(run, f"{name} {dtype} group {group} window {window}", made)

    names = run.pick(tuple(FORMATS), ("k3v3 D64",))
    shapes = run.pick(((1, 0), (4, 0), (8, 100), (16, 0)), ((4, 40),))
    run.each(
        {
            f"{n} {d} {g}": partial(case, n, d, g, w)
            for n in names
            for d in DTYPES
            if kernel_of(run, d)
            for g, w in shapes
        }
    )


def long_history(run: Run) -> None:
    """131072 tokens, and rows at position a million."""
    form, length = FORMATS["k3v3 D128"], run.pick(131072, 70)
    for start in (4, 10**6):
        made = attention_case(
            form, [length], run.device, heads=run.pick(8, 1), start=start, poison=False
        )
        check_attention(run, f"{length} tokens from {start}", made)


def repeats(run: Run) -> None:
    """A race shows as a difference; splits agree but for roundings."""
    case = attention_case(FORMATS["k3v3 D128"], run.pick([20000, 777], [70]), run.device)
    first = attend(case)
    for _ in range(run.pick(50, 1)):
        if not torch.equal(attend(case), first):
            run.fail("two runs differ")
            break
    for splits in run.pick((1, 7, 66), (1, 2)):
        run.note(f"splits {splits}", worst(attend(case, splits=splits), first), "largest change")


def other_kernels(run: Run) -> None:
    """Prefill, packed linear layers, Hadamard; with TF32 allowed; on a second GPU."""

    def prefill(dtype: torch.dtype, tokens: int, length: int, whole: bool) -> None:
        form = FORMATS[run.pick("k3v3 D128", "k3v3 D64")]
        made = attention_case(form, [length], run.device, tokens=tokens, dtype=dtype, whole=whole)
        how = ", history made whole" if whole else ""
        check_attention(run, f"prefill {tokens} after {length} {dtype}{how}", made)

    def linear(bits: int, rows: int, group: int, dtype: torch.dtype) -> None:
        N, K = run.pick((1024, 2048), (40, 256))
        generator = torch.Generator().manual_seed(bits)
        q_NK = torch.randint(2**bits, (N, K), generator=generator, dtype=torch.uint8)
        q_NK = (q_NK.int() - 2 ** (bits - 1)).to(torch.int8)
        groups = 1 if group < 0 else K // group
        scale_NG = torch.rand(N, groups, generator=generator).half() * 0.02
        x_MK = torch.randn(rows, K, generator=generator).to(dtype)
        given = [x.to(run.device) for x in (x_MK, pack(q_NK, bits), scale_NG)]
        found = packed_linear_triton(*given, None, None, bits)
        weight_NK = dequantize_reference(*given[1:], None, K, bits, torch.float64)
        exact = given[0].double() @ weight_NK.mT
        plain = F.linear(given[0], weight_NK.to(dtype))
        ours, theirs = worst(found, exact), worst(plain, exact)
        name = f"linear {bits} bits {rows} rows group {group} {dtype}"
        run.expect(ours <= 2 * theirs + 1e-4, f"{name}: error {ours:.2e}, torch's {theirs:.2e}")

    def transform(K: int, rows: int, dtype: torch.dtype) -> None:
        core_MM, signs_K = paley_core(core_order(K)), random_signs(K, 1)
        x_RK = torch.randn(rows, K, generator=torch.Generator().manual_seed(K)).to(dtype)
        given = [x.to(run.device) for x in (x_RK, core_MM, signs_K)]
        exact = hadamard_reference(given[0].double(), *given[1:])
        near = {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 8e-3)
        found = worst(hadamard_triton(*given), exact) / float(exact.abs().max())
        run.expect(found <= near, f"hadamard {K} x {rows} {dtype}: relative error {found:.1e}")

    dtypes = [dtype for dtype in DTYPES if kernel_of(run, dtype)]
    chunks = run.pick([(17, 1000), (68, 0), (300, 1000), (2048, 20000)], [(20, 30), (256, 30)])
    rows = run.pick((1, 2, 3, 16, 17, 64, 65, 300), (1, 3))
    cases: dict[str, Any] = {}
    for t, n in chunks:
        hows = [False, True] if t >= WHOLE_TOKENS else [False]
        for whole in hows[-1:] if run.dry else hows:
            cases[f"prefill {t} {n} {whole}"] = partial(prefill, dtypes[0], t, n, whole)
    for bits in run.pick(range(2, 9), (3,)):
        for number in rows:
            cases[f"linear {bits} {number}"] = partial(linear, bits, number, 128, dtypes[0])
    cases["linear whole rows"] = partial(linear, 3, rows[-1], -1, dtypes[-1])
    for K in run.pick((576, 4096, 14336, 28672, 32768), (64, 96)):
        cases[f"hadamard {K}"] = partial(transform, K, 3, dtypes[0])
    run.each(cases)
    if not run.dry and torch.cuda.device_count() > 1:
        away = torch.device("cuda:1")
        case = attention_case(FORMATS["k3v3 D128"], [1000], away)
        check_attention(run, "on cuda:1 while cuda:0 is current", case)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        form = FORMATS[run.pick("k3v3 D128", "k3v3 D64")]
        case = attention_case(form, run.pick([1000], [40]), run.device, dtype=torch.float32)
        check_attention(run, "fp32 with TF32 allowed", case)
    finally:
        torch.set_float32_matmul_precision(before)


def sanitizer(run: Run) -> None:
    """Memory errors and races of small cases, in a process of their own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or run.dry:
        run.say("S1", "skipped: no compute-sanitizer" if tool is None else "skipped: no GPU")
        return
    script = Path(__file__).parents[1] / "gpu_check.py"
    command = [sys.executable, str(script), "--only", "C4", "--seconds", "60"]
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in ("memcheck", "racecheck"):
        done = subprocess.run(
            [tool, "--tool", kind, "--error-exitcode", "9", *command],
            env=alone,
            capture_output=True,
            text=True,
        )
        run.expect(done.returncode == 0, f"{kind}: {done.stdout.strip().splitlines()[-1:]}")


def graphs(run: Run) -> None:
    """Captured once, replayed with other lengths and queries in the same memory."""
    if run.dry:
        run.say("G1", "skipped: no GPU")
        return
    case = attention_case(FORMATS["k3v3 D128"], [900, 300], run.device)
    found: list[torch.Tensor] = []

    def call() -> None:
        found[:] = [attend(case)]

    graph = run.captured(call)
    case.history.length_B.copy_(torch.tensor([333, 17]))
    case.q_BMTD.mul_(0.5)
    graph.replay()
    replayed = found[0].clone()
    run.expect(torch.equal(replayed, attend(case)), "a replay with other lengths is eager's answer")
    if not math.isfinite(float(replayed.abs().max())):
        run.fail("a replay is not finite")


CORRECTNESS: dict[str, tuple[int, Step]] = {
    "0": (20, environment),
    "C0": (120, compile_all),
    "C1": (60, encoding),
    "C2": (90, decoding),
    "C3": (40, long_history),
    "C4": (20, repeats),
    "C5": (60, other_kernels),
    "S1": (60, sanitizer),
    "G1": (20, graphs),
}
"""Steps by name, in order, with the seconds that each may take."""
