"""Models from end to end: a CPU's text, memory, quantization, the engine of a server."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from gpu.runner import Run, Step
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.pool.packed import PackedPool
from rotq.kv.pool.pool import Row
from rotq.kv.presets import preset
from rotq.serve.bench import Load, measure
from rotq.serve.engine.model_runner import ModelRunner
from rotq.serve.settings import Settings

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
TINY = SMOLLM2 | {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@cache
def fp32_model(run: Run) -> tuple[Any, KVCalibration]:
    """On the CPU: the folder's, or seeded random weights of SmolLM2's shape; and constants."""
    if run.model is not None:
        model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**run.pick(SMOLLM2, TINY)))
        for parameter in model.parameters():
            # larger than initial weights, so that attention chooses
            parameter.data *= 2 if parameter.ndim > 1 else 1
    model.eval()
    ids_BT = torch.randint(model.config.vocab_size, (run.pick(4, 2), run.pick(256, 24)))
    return model, calibrate(model, ids_BT, preset("k3v3"), on_note=lambda note: None)


@torch.no_grad()
def text_of(model: Any, calibration: KVCalibration | None, ids_BT: Tensor, steps: int) -> Tensor:
    """Greedy ids, by the packed cache or transformers' own, padded on the left."""
    made = DynamicCache() if calibration is None else PackedCache(model, calibration)
    mask_BT = (ids_BT != 0).long()
    found: Tensor = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        past_key_values=made,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
    )
    return found[:, ids_BT.shape[1] :]


def generate(run: Run) -> None:
    """fp32 texts of GPU and CPU are equal; then the time of a step."""
    model, calibration = fp32_model(run)
    length = run.pick(300, 12)
    ids_BT = torch.randint(1, model.config.vocab_size, (3, length))
    ids_BT[1, : length // 2] = 0
    steps = run.pick(30, 3)
    expected = text_of(model, calibration, ids_BT, steps)
    there = copy.deepcopy(model).to(run.device)
    found = text_of(there, calibration, ids_BT.to(run.device), steps).cpu()
    run.expect(
        torch.equal(found, expected), f"fp32 text of {steps} tokens, three rows, is the CPU's"
    )
    half = there.to(run.pick(torch.bfloat16, torch.float32))
    for name, constants in (("dense", None), ("packed", calibration)):
        number = run.pick(300, 2)
        text_of(half, constants, ids_BT[:1].to(run.device), min(number, 10))
        run.synchronize()
        begun = time.perf_counter()
        text_of(half, constants, ids_BT[:1].to(run.device), number)
        run.synchronize()
        taken = time.perf_counter() - begun
        run.note(f"{name} a step", 1e3 * taken / number, "ms")


@torch.no_grad()
def memory(run: Run) -> None:
    """What a cache says that it takes, against what torch has allocated and reserved."""
    model, calibration = fp32_model(run)
    there = copy.deepcopy(model).to(run.device, run.pick(torch.bfloat16, torch.float32))
    length, chunk = run.pick((8000, 500), (24, 12))
    before = 0 if run.dry else torch.cuda.memory_allocated()
    held = PackedCache(there, calibration)
    for _ in range(length // chunk):
        ids = torch.randint(1, model.config.vocab_size, (1, chunk), device=run.device)
        there(input_ids=ids, past_key_values=held, logits_to_keep=1)
    report = held.report()
    run.note("reported", report.total / 2**20, "MiB")
    if not run.dry:
        run.note("allocated", (torch.cuda.memory_allocated() - before) / 2**20, "MiB")
        run.note("reserved", torch.cuda.memory_reserved() / 2**20, "MiB")


def quantize(run: Run) -> None:
    """``rotq quantize`` there and on the CPU, two recipes; needs --model."""
    if run.model is None or run.dry:
        run.say("E3", "skipped: no --model" if run.model is None else "skipped: no GPU")
        return
    for recipe in ("w4", "rtn"):
        logits = []
        for device in ("cpu", "cuda"):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                begun = time.perf_counter()
                command = [sys.executable, "-m", "rotq", "quantize", str(run.model), "-o", str(out)]
                done = subprocess.run(
                    [*command, "-c", recipe, "--device", device, "--calibration", "pydoc"],
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    run.fail(f"{recipe} on {device}: {done.stderr.strip()[-300:]}")
                    continue
                run.note(f"{recipe} on {device}", time.perf_counter() - begun, "s")
                loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
                ids = torch.arange(1, 33)[None]
                with torch.no_grad():
                    logits.append(loaded(input_ids=ids).logits)
        if len(logits) == 2:
            change = float((logits[0] - logits[1]).abs().max() / logits[0].std())
            run.note(f"{recipe} largest difference of logits", change, "of their deviation")


def server_steps(run: Run) -> None:
    """A server's decode steps in a CUDA graph are the eager ones, bitwise, with other lengths."""
    model, calibration = fp32_model(run)
    there = copy.deepcopy(model).to(run.device, run.pick(torch.bfloat16, torch.float32))
    length, steps = run.pick(300, 9), run.pick(40, 3)
    ids = torch.randint(1, model.config.vocab_size, (length,)).tolist()
    eager, replaying = (
        ModelRunner(
            there,
            PackedPool(there, calibration, num_pages=16, num_sinks=3, table_width=8),
            rows=4,
        )
        for _ in range(2)
    )
    eager.captured = None
    same = torch.equal(*(_two_texts(runner, ids, steps) for runner in (replaying, eager)))
    run.expect(same, f"{steps} steps of two texts are the eager ones, bitwise")
    run.note("a step, eager", run.host_us(partial(eager.decode, [], [])), "us")
    if replaying.captured is not None:
        run.expect(replaying.captured.is_captured, f"captured ({replaying.captured.refused})")
        run.note("a step, in a graph", run.host_us(partial(replaying.decode, [], [])), "us")


def _two_texts(runner: ModelRunner, ids: list[int], steps: int) -> Tensor:
    """Logits of two prompts' steps, the second of which begins later."""
    found = []
    for sink, first in ((0, 0), (1, 8)):
        start, pages = 0, list(range(first, first + 8))
        prompt = ids[: len(ids) // (1 + sink)]
        while start < len(prompt):
            end = runner.pass_end(start, len(prompt))
            row = Row(pages=pages, sink=sink, count=start, fresh=end - start)
            runner.prefill(prompt[start:end], row)
            start = end
    for step in range(steps):
        rows = [
            Row(pages=list(range(8 * i, 8 * i + 8)), sink=i, count=count + step, fresh=1)
            for i, count in enumerate((len(ids), len(ids) // 2))
        ]
        found.append(runner.decode([ids[step], ids[-1 - step]], rows))
    return torch.stack(found)


def serve(run: Run) -> None:
    """A server's engine, packed and dense: one request, then sixteen at once."""
    model, calibration = fp32_model(run)
    there = copy.deepcopy(model).to(run.device, run.pick(torch.bfloat16, torch.float32))
    settings = Settings(kv_memory=run.pick(1 << 30, 1 << 21), max_batch=run.pick(32, 2))
    for clients in run.pick((1, 16), (1,)):
        load = Load(
            requests=clients,
            clients=clients,
            prompt_tokens=run.pick(2000, 8),
            output_tokens=run.pick(64, 2),
        )
        for constants in (calibration, None):
            found = measure(there, constants, settings, load, lambda ids: "")
            name = f"{clients} clients, {found.kv}"
            run.note(f"{name}: first token, median", found.first_token["p50"], "s")
            run.note(f"{name}: output", found.output_tokens_per_second, "tokens/s")


MODELS: dict[str, tuple[int, Step]] = {
    "G2": (40, server_steps),
    "E1": (90, generate),
    "E2": (30, memory),
    "E3": (120, quantize),
    "E4": (90, serve),
}
"""As ``CORRECTNESS``."""
