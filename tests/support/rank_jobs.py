"""``python rank_jobs.py MODEL OUT``: jobs of several processes, as a launcher starts them."""

import sys
from pathlib import Path
from typing import Any

import rotq.quantize.publish
from rotq.processes import joined
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import Given, Recipe, resolve
from rotq_kernels.rounding import native

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {
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


def recipe_of(name: str, text: Path) -> Recipe:
    config, changes = JOBS[name]
    values = SMALL | {"calibration.source": str(text)} | changes
    given = [Given(key=k, value=v, origin="test") for k, v in values.items()]
    return resolve(CONFIGS / f"{config}.yaml", given)


def run(model: Path, out: Path, **how: Any) -> None:
    """All jobs on ``text.txt`` beside the model, without what is no matter of several processes.

    That is the last check, and rounding by native code, which each would compile for seconds.
    """
    rotq.quantize.publish.check_reload = lambda *_, **__: None
    native.NATIVE_FROM = sys.maxsize
    for name in JOBS:
        dtype = "bfloat16" if name == "ranges" else "float32"
        recipe = recipe_of(name, model.with_name("text.txt"))
        quantize_model(model, recipe, out / name, device="cpu", dtype=dtype, **how)


if __name__ == "__main__":
    with joined(1, []) as ranks:
        run(Path(sys.argv[1]), Path(sys.argv[2]), ranks=ranks)
