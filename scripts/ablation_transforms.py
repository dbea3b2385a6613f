"""What rotations and scalings are worth: one model, one row per way to find them, and a table.

    python scripts/ablation_transforms.py --model DIR --calibration FILE --text FILE \\
        --results transforms.jsonl [--rows rtn,quarot,best] [--seeds 0,1,2]

Rows without a prefix are W4A4KV4: weights per channel, activations per token, keys and values per
head and token. Rows ``w3_`` and ``w2_`` round weights only. Options and the results file are those
of ablation.py; rows that are in the file are not run again.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import ablation

from rotq.recipe import load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
W4A4KV4: dict[str, Any] = {
    "weights.bits": 4,
    "weights.group_size": -1,
    "weights.symmetric": True,
    "activations.bits": 4,
    "kv_cache.bits": 4,
    "output.format": "rotq",
    "solver.scale_search": "mse",
}
FUSED = {"rotation.residual": "hadamard", "rotation.value": "hadamard"}
DOWN = {"rotation.down": "hadamard"}


def preset(name: str) -> dict[str, Any]:
    """A recipe of configs/ as dotted keys; where its text comes from is the command line's."""
    values = load_recipe(CONFIGS / f"{name}.yaml", {}).to_dict()
    return {
        f"{section}.{key}": value
        for section, keys in values.items()
        if isinstance(keys, dict) and section != "calibration"
        for key, value in keys.items()
    }


def sections(recipe: dict[str, Any], *names: str) -> dict[str, Any]:
    """The part of a recipe that these sections are."""
    return {key: value for key, value in recipe.items() if key.partition(".")[0] in names}


def weight_only(bits: int) -> dict[str, dict[str, Any]]:
    """Hadamard, OptRot and learned rotations in front of the main job's GPTQ."""
    base = {**preset("w3-channel"), "weights.bits": bits, "tuning.steps": 0}
    learned = {
        "transform.method": "learned",
        "transform.layer_steps": 32,
        "transform.steps": 0,
        "transform.seq_len": 512,
    }
    return {
        f"w{bits}_hadamard": base,
        f"w{bits}_optrot": {**base, "transform.method": "optrot", "transform.steps": 32},
        f"w{bits}_learned": {**base, **learned},
    }


QUAROT, BEST = preset("quarot-w4a4kv4"), preset("w4a4kv4")
ROWS: dict[str, dict[str, Any]] = {
    "rtn": {**W4A4KV4, "solver.method": "rtn"},
    "gptq": W4A4KV4,
    "fused_only": {**W4A4KV4, **FUSED},
    "fused_and_down": {**W4A4KV4, **FUSED, **DOWN},
    "quarot": QUAROT,
    # what best gains by its solver and tuning, without its transform
    "quarot_tuned": {**QUAROT, **sections(BEST, "solver", "tuning")},
    "spinquant": preset("spinquant"),
    "ostquant": preset("ostquant"),
    "best": BEST,
    **weight_only(3),
    **weight_only(2),
}
BASELINE = "quarot"
"""What the share of the KL gap that is closed is told against."""


def table(results: Path) -> str:
    """Means over seeds, as Markdown."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    names = [name for name in ROWS if any(line["row"] == name for line in lines)]
    rows = {name: [line for line in lines if line["row"] == name] for name in names}
    kl = {name: mean(line["kl"] for line in found) for name, found in rows.items()}
    told = [
        "| row | ppl | KL | top-1 | gap closed | transform s | whole job s | seeds |",
        "|" + "---|" * 8,
    ]
    for name, found in rows.items():
        closed = ""
        if BASELINE in kl and not name.startswith("w"):
            closed = f"{1 - kl[name] / kl[BASELINE]:.0%}"
        keys = ("ppl", "top1", "transform_seconds", "seconds")
        figures = [mean(line[key] for line in found) for key in keys]
        told.append(
            f"| {name} | {figures[0]:.4g} | {kl[name]:.4f} | {figures[1]:.1%} | {closed} "
            f"| {figures[2]:.0f} | {figures[3]:.0f} | {len(found)} |"
        )
    return "\n".join(told)


if __name__ == "__main__":
    print(table(ablation.main(ROWS, str(__doc__))))
