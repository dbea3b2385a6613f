"""Processor time of the engine's forward passes: over a piece of a prompt, and of a decode step.

    python scripts/bench/serve_passes_cpu.py MODEL --kv k3v3,dense --kv-calibration kv.safetensors

One thread, the load of ``rotq bench serve`` made small. Processor time is that of the engine's
thread, so that other work on the machine moves it by some percent only.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from rotq.cli.loading import load_to_serve
from rotq.cli.serve_options import checked_settings, find_calibration, named_caches
from rotq.serve.bench import Load, measure
from rotq.serve.engine.model_runner import ModelRunner

LOAD = Load(requests=8, clients=8, prompt_tokens=128, output_tokens=24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kv", default="k3v3,dense")
    parser.add_argument("--kv-calibration", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    times = {name: timed(name) for name in ("prefill", "decode")}
    specs = named_caches(given.kv, given.kv_calibration, None)
    _, model, tokenizer = load_to_serve(
        given.model, specs, device="cpu", dtype="float32", trust_remote_code=False
    )
    settings = checked_settings(
        kv_memory="1GiB", max_batch=32, prefill_chunk=0, max_queue=LOAD.clients
    )
    for spec in specs:
        calibration = find_calibration(model, tokenizer, spec, given.kv_calibration)
        measured = measure(model, calibration, settings, LOAD, tokenizer.decode)
        for name, found in times.items():
            # trial, warm-up and one request come first, compile, and are the shorter part
            late = sorted(found[len(found) // 2 :])
            print(f"{measured.kv:8} {name:8} {1000 * late[len(late) // 2]:6.1f} ms (median)")
            found.clear()


def timed(name: str) -> list[float]:
    """Seconds of each call of a method of ``ModelRunner``, from now on."""
    whole, found = getattr(ModelRunner, name), list[float]()

    def measured(*arguments: Any, **named: Any) -> Any:
        began = time.thread_time()
        result = whole(*arguments, **named)
        found.append(time.thread_time() - began)
        return result

    setattr(ModelRunner, name, measured)
    return found


if __name__ == "__main__":
    main()
