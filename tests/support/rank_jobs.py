"""``python rank_jobs.py MODEL OUT``: jobs of several processes, as a launcher starts them."""

import sys
from pathlib import Path
from typing import Any

from rotq.processes import joined
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import Given, Recipe, resolve

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
    "calibration.source": "pydoc",
    "calibration.num_samples": 4,
    "calibration.seq_len": 32,
    "calibration.batch_size": 1,
    "output.format": "rotq",
}
TRAINED = {
    "importance.strategy": "gradient",
    "tuning.steps": 2,
    "tuning.windows": 2,
    "tuning.code_steps": 2,
}
JOBS: dict[str, tuple[str, dict[str, object]]] = {
    "trained": ("w3", TRAINED),
    "mixed": ("gptq", {"weights.average_bits": 4.0, "weights.group_size": 16}),
    "rotated": ("quarot-w4a4kv4", {"importance.strategy": "token_frequency"}),
    "ranges": ("nvfp4", {"importance.strategy": "attention", "output.format": "compressed-tensors"}),
    "trellis": ("t3", {"tuning.steps": 0}),
}


def recipe_of(name: str) -> Recipe:
    config, changes = JOBS[name]
    given = [Given(key=k, value=v, origin="test") for k, v in (SMALL | changes).items()]
    return resolve(CONFIGS / f"{config}.yaml", given)


def run(model: Path, out: Path, **how: Any) -> None:
    for name in JOBS:
        quantize_model(model, recipe_of(name), out / name, device="cpu", dtype="float32", **how)


if __name__ == "__main__":
    with joined(1, []) as ranks:
        run(Path(sys.argv[1]), Path(sys.argv[2]), ranks=ranks)
