"""``python rank_jobs.py MODEL OUT``: jobs of several processes, as a launcher starts them."""

import sys
from pathlib import Path
from typing import Any

import rotq.quantize.publish
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
    "weights.average_bits": 3.5,
    "tuning.steps": 2,
    "tuning.windows": 2,
    "tuning.code_steps": 2,
}
JOBS: dict[str, tuple[str, dict[str, object]]] = {
    "trained": ("w3", TRAINED),
    "rotated": ("quarot-w4a4kv4", {"importance.strategy": "token_frequency"}),
    "ranges": (
        "nvfp4",
        {"importance.strategy": "attention", "output.format": "compressed-tensors"},
    ),
    "two_sided": ("w3", {"solver.two_sided": True, "tuning.steps": 0}),
    "trellis": ("t3", {"tuning.steps": 0, "weights.state_bits": 8, "weights.bits": 2}),
}


def recipe_of(name: str) -> Recipe:
    config, changes = JOBS[name]
    given = [Given(key=k, value=v, origin="test") for k, v in (SMALL | changes).items()]
    return resolve(CONFIGS / f"{config}.yaml", given)


def run(model: Path, out: Path, **how: Any) -> None:
    """All jobs, without the last check, which is no matter of several processes."""
    rotq.quantize.publish.check_reload = lambda *_, **__: None
    for name in JOBS:
        dtype = "bfloat16" if name == "ranges" else "float32"
        quantize_model(model, recipe_of(name), out / name, device="cpu", dtype=dtype, **how)


if __name__ == "__main__":
    with joined(1, []) as ranks:
        run(Path(sys.argv[1]), Path(sys.argv[2]), ranks=ranks)
