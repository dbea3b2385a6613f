"""What jobs on large models would need, modelled: counts of the work, times rates of a machine.

    python scripts/bench/modelled.py

Nothing here is run. The counts are those of ``--dry-run`` (``quantize.job_seconds`` and
``peak_memory``), which are compared with jobs in docs/speed.md. The CPU's rates are measured when
this starts, on one core, and divided by the cores of the box; the GPU's are a share of its data
sheet, written below. Memory is of one process and, on a GPU, of the GPU; the streams are in the
host's memory or on its disk.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from rotq.formats.integer import Grid
from rotq.job.plan import make_plan
from rotq.models.skeleton import Skeleton
from rotq.quantize.estimate import SHARED
from rotq.quantize.job_seconds import job_seconds
from rotq.quantize.peak_memory import peak_memory
from rotq.quantize.rates import Rates, measure_rates
from rotq.recipe import Recipe, load_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WINDOWS = {"calibration.num_samples": 128, "calibration.seq_len": 2048, "tuning.steps": 0}
CORES = 64

H100 = Rates(
    start=10.0,
    compiling=0.0,
    passes=2 / (0.5 * 989e12),  # half of the bf16 tensor cores' peak
    moments=2 / (0.5 * 495e12),  # TF32, which calibration.precision=medium allows
    single=2 / (0.5 * 67e12),  # fp32
    double=2 / (0.3 * 67e12),  # fp64 tensor cores, thin panels
    solved=4e-9,  # eight launches of 4 us for each column of 8192 rows
    factored=4 * 8 / 3.35e12,
    simple=3 * 4 / 3.35e12,  # bytes over the memory's bandwidth, a third of it reached
    packed=40 / 3.35e12,
    hashed=1.4e-9,  # on the host, one core: measured on this machine
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A shape, and how often its block is repeated."""

    name: str
    config: PretrainedConfig
    blocks: int

    def skeleton(self, blocks: int) -> Skeleton:
        """With a few of the blocks."""
        self.config.num_hidden_layers = blocks
        return Skeleton.open(SimpleNamespace(config=self.config, names=list, load=None))


def llama(hidden: int, mlp: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


MODELS = (
    Model(name="8B", config=llama(4096, 14336, 32), blocks=32),
    Model(name="70B", config=llama(8192, 28672, 64), blocks=80),
    Model(
        name="600B MoE",
        config=Qwen3MoeConfig(
            hidden_size=7168,
            moe_intermediate_size=2048,
            num_experts=256,
            num_experts_per_tok=8,
            num_attention_heads=56,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128256,
            tie_word_embeddings=False,
            architectures=["Qwen3MoeForCausalLM"],
        ),
        blocks=54,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", dest="recipes", action="append", help="preset; several times")
    given = parser.parse_args()
    for name in given.recipes or ["gptq", "w3"]:
        recipe = load_recipe(CONFIGS / f"{name}.yaml", WINDOWS)
        grid = Grid(bits=recipe.weights.bits, group_size=recipe.weights.group_size, symmetric=False)
        here = measure_rates(recipe, grid, (8192, 8192), torch.bfloat16, torch.bfloat16)
        for model in MODELS:
            _print(name, recipe, model, here)


def _print(name: str, recipe: Recipe, model: Model, here: Rates) -> None:
    one, two = model.skeleton(1), model.skeleton(2)
    plan = make_plan(one, recipe, torch.bfloat16, torch.bfloat16)
    steps = peak_memory(one, recipe, plan, torch.bfloat16, 1)
    step = max(steps, key=steps.__getitem__)
    parameters = [sum(p.numel() for p in each.model.parameters()) for each in (one, two)]
    total = parameters[0] + (model.blocks - 1) * (parameters[1] - parameters[0])
    tokens = recipe.calibration.num_samples * recipe.calibration.seq_len
    streams = tokens * one.config.hidden_size * 2 * (2 if recipe.needs_original else 1)
    print(
        f"{name}, {model.name}: {total / 1e9:.0f} G parameters, {steps[step] / 1e9:.1f} GB in "
        f"{step}, {steps['solving'] / 1e9:.1f} in solving, streams {streams / 1e9:.1f} GB"
    )
    for machine, rates, share in (
        ("one H100", H100, 1),
        ("eight H100", H100, 8),
        (f"{CORES} cores like this one", _spread(here, CORES), 1),
    ):
        seconds = _seconds(recipe, model, (one, two), rates, 2 * total)
        shared = sum(seconds.get(phase, 0.0) for phase in SHARED)
        wall = sum(seconds.values()) - shared + shared / share
        dearest = sorted(seconds.items(), key=lambda item: -item[1])[:3]
        told = ", ".join(f"{phase} {spent / 3600:.2f}" for phase, spent in dearest)
        print(f"  {machine}: {wall / 3600:.2f} h ({told}, before sharing)", flush=True)


def _spread(rates: Rates, cores: int) -> Rates:
    """What threads share; starting, packing and hashing are on one core."""
    shared = ("passes", "moments", "single", "double", "solved", "factored", "simple")
    return replace(rates, **{name: getattr(rates, name) / cores for name in shared})


def _seconds(
    recipe: Recipe,
    model: Model,
    skeletons: tuple[Skeleton, Skeleton],
    rates: Rates,
    source_bytes: int,
) -> dict[str, float]:
    """By phase; blocks behind the second cost what the second does."""
    first, second = (
        job_seconds(
            each,
            recipe,
            make_plan(each, recipe, torch.bfloat16, torch.bfloat16),
            rates,
            source_bytes=source_bytes,
            output_bytes=int(source_bytes / 2 * (recipe.weights.bits + 0.3) / 8),
        )
        for each in skeletons
    )
    return {
        phase: first[phase] + (model.blocks - 1) * (second[phase] - first[phase]) for phase in first
    }


if __name__ == "__main__":
    main()
