"""A decode step at long context on a CPU: packed cache, transformers' quantized cache, dense fp32.

    python scripts/bench/kv_decode_cpu.py MODEL --csv out/results.csv
        [--kv-calibration FILE] [--peer-python /path/with/hqq/bin/python]

Every provider runs in a process of its own, which loads the model in fp32, fills the cache with
``--context`` random tokens in chunks, and then decodes one token at a time. Times are whole model
steps, also given less those of the same model with an almost empty cache ("attention and cache").
Memory is read from the kernel: the peak during the decode steps, above what the process held with
the model alone. A provider whose package is missing is skipped, and said so.

Rows: op, provider, shape, metric, unit, p20, p50, p80, machine, threads, torch, transformers,
commit, date.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIELDS = (
    *("op", "provider", "shape", "metric", "unit", "p20", "p50", "p80"),
    *("machine", "threads", "torch", "transformers", "commit", "date"),
)


def packed(model: Any, options: argparse.Namespace) -> Any:
    """rotq, from a calibration file or data-oblivious."""
    from rotq.kv.cache.packed_cache import PackedCache
    from rotq.kv.calibration.calibrate import data_oblivious
    from rotq.kv.calibration.file import load_calibration
    from rotq.kv.presets import preset

    if options.kv_calibration:
        found = load_calibration(options.kv_calibration, model.config)
        if found.spec.name != options.kv:
            found = found.under(preset(options.kv))
        return PackedCache(model, found)
    return PackedCache(model, data_oblivious(model.config, preset(options.kv)))


def dynamic(model: Any, options: argparse.Namespace) -> Any:
    """transformers' default."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def quantized(backend: str) -> Callable[[Any, argparse.Namespace], Any]:
    """transformers' QuantizedCache with its defaults (4 bits, groups of 64, 128 recent tokens)."""

    def make(model: Any, options: argparse.Namespace) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache(backend, model.config)

    return make


PROVIDERS: dict[str, tuple[Callable[[Any, argparse.Namespace], Any], str]] = {
    "packed": (packed, "rotq"),
    "dynamic-fp32": (dynamic, "transformers"),
    "quantized-hqq4": (quantized("hqq"), "hqq"),
    "quantized-quanto4": (quantized("quanto"), "optimum.quanto"),
    "quantized-fp8": (quantized("fp8"), "transformers"),
}
"""How to make each cache, and the package it takes."""


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def settle() -> int:
    """Give freed memory back, forget the peak, and say what is held."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def decode(model: Any, cache: Any, steps: int) -> list[float]:
    """Milliseconds of each step, after two that warm up."""
    import torch

    token = torch.full((1, 1), 5)
    times = []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[2:]


def allocated(cache: Any) -> int | None:
    """Bytes of the tokens, where the cache can say."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    if type(cache).__name__ == "DynamicCache":
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return None


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One provider in this process."""
    import torch
    import transformers

    make, package = PROVIDERS[options.provider]
    try:
        importlib.import_module(package)
    except ImportError:
        return {"skipped": f"{options.provider}: package {package} is not installed"}
    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, model.config.vocab_size, (1, options.context), generator=generator)
    with torch.no_grad():
        empty = decode(model, make(model, options), options.steps)
        before = settle()
        cache = make(model, options)
        for at in range(0, options.context, options.chunk):
            chunk = ids[:, at : at + options.chunk]
            model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        filled = settle()
        times = decode(model, cache, options.steps)
        peak = resident("VmHWM")
    return {
        "times": times,
        "extra": [value - sorted(empty)[len(empty) // 2] for value in times],
        "held": filled - before,
        "peak": peak - before,
        "allocated": allocated(cache),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def rows_of(
    provider: str, found: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """CSV rows of what ``measure`` found."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    shared = {
        "op": "kv_decode_cpu",
        "provider": provider if provider != "packed" else f"packed-{options.kv}",
        "shape": f"{Path(options.model).name}-B1-T{options.context}",
        "machine": cpu_name(),
        "threads": options.threads,
        "torch": found["torch"],
        "transformers": found["transformers"],
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }

    def spread(values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        at = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
        return {name: round(ordered[int(q * (len(ordered) - 1))], 2) for name, q in at.items()}

    mib = {name: found[name] / 2**20 for name in ("held", "peak", "allocated") if found[name]}
    return [
        shared | {"metric": "step", "unit": "ms"} | spread(found["times"]),
        shared | {"metric": "attention and cache", "unit": "ms"} | spread(found["extra"]),
        *(
            shared | {"metric": f"memory {name}", "unit": "MiB"} | spread([value])
            for name, value in mib.items()
        ),
    ]


def cpu_name() -> str:
    """Model name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def run(provider: str, options: argparse.Namespace) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    python = sys.executable
    if provider.startswith("quantized") and options.peer_python:
        python = options.peer_python
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [python, __file__, *sys.argv[1:], "--provider", provider]
    threads = str(options.threads)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure all providers one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--context", type=int, default=8192, help="tokens in the cache")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a prefill pass")
    parser.add_argument("--steps", type=int, default=20, help="decode steps that are timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--kv", default="k3v3", help="preset of the packed cache")
    parser.add_argument("--kv-calibration", type=Path, help="file of rotq calibrate-kv")
    parser.add_argument("--peer-python", help="interpreter that has the quantized caches' packages")
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="comma-separated")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--provider", choices=PROVIDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.provider:
        sys.stdout.write(json.dumps(measure(options)) + "\n")
        return
    rows = []
    for provider in options.providers.split(","):
        found = run(provider, options)
        if "skipped" in found:
            sys.stderr.write(found["skipped"] + "; skipped\n")
            continue
        new = rows_of(provider, found, options)
        rows += new
        sys.stdout.writelines(json.dumps(row) + "\n" for row in new)
    if options.csv:
        fresh = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
