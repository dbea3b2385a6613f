"""What a decode step on a GPU takes of the host: launches and CPU time, counted without a GPU.

    python scripts/bench/gpu_step_host.py [--layers 32] [--steps 60] [--kv k3v3]

A model's step with the packed cache goes a GPU's way: Triton compiles its kernels for sm_90, binds
the arguments of every call, and the launch itself does nothing. Beside it, in turns, the same step
with transformers' DynamicCache. Printed are launches of a layer (as tests/support/stubbed_step.py
counts them), the CPU time of a layer that the packed cache adds, the median of all steps, and that
of the operators alone. Ratios hold; a quiet server's core is two to three times faster than a busy
desk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime.driver import driver

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from stubbed_step import counted_step  # noqa: E402

from rotq.kv.cache import attention, batched_encoding  # noqa: E402
from rotq.kv.cache.packed_cache import PackedCache  # noqa: E402
from rotq.kv.calibration.calibrate import calibrate  # noqa: E402
from rotq.kv.presets import preset  # noqa: E402
from rotq_kernels.kv import attention as kernels  # noqa: E402
from rotq_kernels.kv import encoding  # noqa: E402
from rotq_kernels.kv.decode.launch import step_tables  # noqa: E402
from rotq_kernels.kv.encoding import encode_kv  # noqa: E402
from rotq_kernels.kv.format import KVHistory, KVPages  # noqa: E402


class NoGPU:
    """Triton's driver of a GPU that does nothing."""

    class utils:  # noqa: N801
        """What loads binaries."""

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: None


def go_a_gpus_way() -> None:
    """In this process: operators of CPU tensors run what those of a GPU's would."""
    driver.set_active(NoGPU())
    compiler.max_shared_mem = lambda device: 227 * 1024
    library = torch.library.Library("rotq", "IMPL")
    library.impl("encode_side", encoding._on_cuda, "CPU", allow_override=True)
    globals()["_library"] = library
    attention.packed_attention = attend
    batched_encoding.JOINED = ("cpu",)


def attend(q_BMTD: Tensor, position_BT: Tensor, history: KVHistory, *, scale: float) -> Tensor:
    """``packed_attention``, as of a GPU's query."""
    kernels._check(q_BMTD, history)
    kernels._check_integers(q_BMTD, position_BT, history)
    tables = step_tables(q_BMTD, history)
    options: dict[str, Any] = {"scale": scale, "tables": tables}
    return kernels.packed_attention_triton(q_BMTD, position_BT, history, **options)


def cpu_us(call: Callable[[], Any], number: int) -> float:
    """Median CPU time of a call after some that are not counted."""
    found = []
    for _ in range(number + 5):
        begun = time.process_time_ns()
        call()
        found.append((time.process_time_ns() - begun) / 1e3)
    return statistics.median(found[5:])


def model_of(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kv", default="k3v3", metavar="PRESET")
    given = parser.parse_args()
    model = model_of(given.layers)
    ids = torch.randint(64, (1, 40))
    wide = model.float()
    calibration = calibrate(wide, ids, preset(given.kv), on_note=lambda note: None)
    model = wide.to(torch.bfloat16)
    caches = {"dense": DynamicCache(), "packed": PackedCache(model, calibration)}
    for cache in caches.values():
        model(input_ids=ids, past_key_values=cache)
    go_a_gpus_way()

    def step(name: str) -> None:
        model(input_ids=ids[:, :1], past_key_values=caches[name])

    times: dict[str, list[float]] = {name: [] for name in caches}
    for number in range(given.steps + 5):
        for name in caches:
            begun = time.process_time_ns()
            step(name)
            if number >= 5:
                times[name].append((time.process_time_ns() - begun) / 1e3 / given.layers)
    median = {name: statistics.median(found) for name, found in times.items()}
    print(f"CPU time of a layer and step: dense {median['dense']:.0f} us,", end=" ")
    print(f"packed {median['packed']:.0f} us, {median['packed'] - median['dense']:+.0f} us")
    counts = counted_step(model, caches["packed"], lambda: step("packed"))
    print(f"launches of a layer: {counts.layers.total() / given.layers:.2f} {dict(counts.layers)}")
    print(f"launches of a step's end: {counts.end.total()} {dict(counts.end)}")
    print(
        f"launches of a layer, its share of the end included: {counts.per_layer(given.layers):.2f}"
    )
    layer = caches["packed"].layers[0]
    pages = KVPages.empty(layer.constants.format, 1, 2)
    k_BHTD, place = torch.randn(1, 2, 1, 128), torch.zeros(1, 1, dtype=torch.int64)
    taken = cpu_us(lambda: encode_kv(k_BHTD, k_BHTD, place, place, layer.constants, pages), 200)
    print(f"encode_kv, one token: {taken:.0f} us")


if __name__ == "__main__":
    main()
