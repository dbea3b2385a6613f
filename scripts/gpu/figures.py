"""The figures of docs/gpu.md: what was modelled, and what a run has measured.

Modelled for Llama-3-8B, one sequence, on an H100 SXM with Triton 3.9: from instructions and bytes,
and for bf16 attention from published times of FlashAttention 3.
"""

from __future__ import annotations

from typing import Any

FIGURES: dict[str, tuple[str, str]] = {
    "decode, a layer, 8k tokens, graph, us": ("18", "T1 decode 8192 graph"),
    "decode, a layer, 32k tokens, graph, us": ("27", "T1 decode 32768 graph"),
    "decode, a layer, 128k tokens, graph, us": ("63", "T1 decode 131072 graph"),
    "bf16 attention, a layer, 32k tokens, us": ("58", "T1 sdpa 32768"),
    "bf16 attention, a layer, 128k tokens, us": ("201", "T1 sdpa 131072"),
    "4096 tokens after 64k, fused, TFLOPS": ("190 to 200", "T3 prefill 4096 after 65536 rate"),
    "4096 tokens after 64k, made whole, TFLOPS": ("300 to 340", "T3 whole 4096 after 65536 rate"),
    "w3 8192x8192, 1 row, us": ("22 to 25", "T4 8192x8192 M=1 w3"),
    "w3 4096x4096, 1 row, us": ("7 to 12", "T4 4096x4096 M=1 w3"),
    "w3 4096x14336, 1 row, us": ("25 to 41", "T4 4096x14336 M=1 w3"),
    "w3 4096x4096, 16 rows, us": ("21 to 38", "T4 4096x4096 M=16 w3"),
}
"""Modelled value, and the name of the result, by figure."""


def figures(results: dict[str, Any]) -> str:
    """The table, with what was measured in this run."""
    lines = [f"{'figure':42} {'modelled':>10} {'measured':>10}"]
    for name, (modelled, key) in FIGURES.items():
        measured = f"{results[key]:.4g}" if key in results else ""
        lines.append(f"{name:42} {modelled:>10} {measured:>10}")
    return "\n".join(lines)
