"""How long a job takes, phase by phase: what it does, counted, times rates that were measured.

Multiplications are counted, additions with them. Shape suffixes: N out features, K in features,
P parameters of a block, M calibration tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import prod

from torch import nn

from rotq.evaluation.flatness import SAMPLED_TOKENS
from rotq.job.plan import Plan
from rotq.models.skeleton import Skeleton
from rotq.quantize.invariance import CHECKED_TOKENS
from rotq.quantize.rates import Rates, products_of_solving
from rotq.recipe import Recipe
from rotq.report.lines import ROTATIONS

STARTS = 2.7
"""Of a process, in a job: its own, that of the process which reloads the result, and what is read
and written once whatever the model's size; measured on the smallest jobs."""

TOUCHES = 3
"""Times that a layer's inputs and outputs are read and written between products, in norms, rotary
embeddings, activations and sums; counted on SmolLM2."""

RUNS = {"qkv": 1, "o": 3, "gate_up": 2, "down": 1}
"""Times that a site's layers run for each token and stream: for the moments of those behind them,
and to go on to the next block. Attention is replayed once it is settled."""


def job_seconds(
    skeleton: Skeleton,
    recipe: Recipe,
    plan: Plan,
    rates: Rates,
    *,
    source_bytes: int,
    output_bytes: int,
) -> dict[str, float]:
    """Seconds of one processor by phase.

    Args:
        source_bytes, output_bytes: Of the checkpoint's weights, and of the result's.

    Raises:
        ValueError: the recipe trains what no rate is measured of; names it.
    """
    check_counted(recipe)
    seconds: dict[str, float] = defaultdict(float)
    for index in range(skeleton.num_blocks):
        for phase, spent in _block(skeleton, recipe, plan, rates, index).items():
            seconds[phase] += spent
    embedding = skeleton.model.get_submodule(skeleton.adapter.embedding)
    table = _numel(embedding.parameters())
    tables = table * (1 if skeleton.tied else 2)
    seconds["start"] += STARTS * rates.start + rates.compiling
    seconds["load"] += source_bytes * rates.hashed + 4 * tables * rates.simple
    # written and hashed as parts, hashed again and copied
    seconds["packing"] += 3 * output_bytes * rates.hashed
    if plan.outer:
        seconds["packing"] += tables * (rates.packed + rates.solved)
    seconds["checks"] += CHECKED_TOKENS * table * 2 * rates.passes
    if recipe.tuning.steps:
        seconds["tuning"] = _tuning(skeleton, recipe, rates, table)
    return dict(seconds)


def check_counted(recipe: Recipe) -> None:
    """Raise ValueError for a recipe with a training that is not counted here."""
    uncounted = {
        f"transform.method={recipe.transform.method}": recipe.transform.method != "fixed",
        "tuning.code_steps": recipe.tuning.code_steps > 0,
        "gradients": recipe.needs_gradients,
        "calibration.source=self": recipe.calibration.source == "self",
    }
    for name, wanted in uncounted.items():
        if wanted:
            raise ValueError(f"no time is predicted with {name}")


def _block(
    skeleton: Skeleton, recipe: Recipe, plan: Plan, rates: Rates, index: int
) -> dict[str, float]:
    block, prefix = skeleton.blocks[index], skeleton.block_name(index)
    parameters = _numel(block.parameters())
    seconds: dict[str, float] = defaultdict(float)
    seconds["load"] += 3 * parameters * rates.simple
    seconds["packing"] += parameters * rates.packed
    seconds["checks"] += 2 * CHECKED_TOKENS * parameters * rates.single
    # made dense of codes here and in the process that reloads them, four numbers touched for each
    seconds["checks"] += 2 * 4 * parameters * rates.simple
    if any(getattr(recipe.rotation, name) != "none" for name in ROTATIONS):
        hidden = skeleton.config.hidden_size
        seconds["checks"] += parameters * (hidden + 2 * CHECKED_TOKENS) * rates.double
        seconds["checks"] += 2 * SAMPLED_TOKENS * parameters * rates.passes
    tokens = recipe.calibration.num_samples * recipe.calibration.seq_len
    streams = 2 if recipe.needs_original else 1
    for site in skeleton.adapter.sites(block):
        planned = [path for path in site.linears if f"{prefix}.{path}" in plan.grids]
        shapes = [tuple(block.get_submodule(path).weight.shape) for path in planned]  # type: ignore[arg-type]
        if not shapes:
            continue
        N, K = sum(shape[0] for shape in shapes), shapes[0][1]
        seconds["solving"] += N * K * rates.solved
        seconds["solving"] += products_of_solving(recipe, N, K) * rates.single
        if not recipe.needs_data:
            continue
        kind = site.name.split(".")[0]
        share = _share(skeleton, kind)
        runs = RUNS.get(kind, 2) * streams * share * tokens
        seconds["forward passes"] += runs * N * K * rates.passes
        seconds["forward passes"] += runs * TOUCHES * (N + 2 * K) * rates.simple
        seen = streams * share * tokens * K
        seconds["moments"] += seen * (K * rates.moments + 2 * rates.simple)
        if recipe.solver.method == "gptq":
            seconds["factor"] += (K**3 / 6) * rates.double + K**2 * rates.factored
            if recipe.solver.needs_original:
                seconds["solving"] += N * K**2 * rates.double
    if recipe.needs_data:
        length = recipe.calibration.seq_len
        attended = 2 * tokens * length * skeleton.config.hidden_size * streams
        seconds["forward passes"] += attended * rates.passes
    return seconds


def _tuning(skeleton: Skeleton, recipe: Recipe, rates: Rates, table: int) -> float:
    """Blocks forward, forward again and backward; weights made for both; logits of both models."""
    length = recipe.tuning.seq_len or recipe.calibration.seq_len
    windows = recipe.tuning.steps * recipe.tuning.windows
    parameters = sum(_numel(block.parameters()) for block in skeleton.blocks)
    tokens = windows * length
    vocabulary = table // skeleton.config.hidden_size
    seconds = tokens * parameters * 4 * rates.passes
    seconds += windows * parameters * 6 * rates.simple
    return seconds + tokens * (table * 3 * rates.passes + vocabulary * 8 * rates.simple)


def _share(skeleton: Skeleton, kind: str) -> float:
    """Of the tokens that reach one of a kind's sites: experts share them."""
    config = skeleton.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if not experts or kind not in ("gate_up", "down"):
        return 1.0
    return float(getattr(config, "num_experts_per_tok", 1) / experts)


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(prod(parameter.shape) for parameter in parameters)
