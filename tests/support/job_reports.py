"""Reports made up for tests."""

from typing import Any

from rotq.recipe import Recipe
from rotq.report import BlockResult, JobReport, LayerResult


def layer_result(name: str, **changes: Any) -> LayerResult:
    values: dict[str, Any] = {
        "shape": (256, 96),
        "bits": 3,
        "group_size": 48,
        "symmetric": False,
        "loss": 12.5,
        "relative_error": 0.01,
        "damping": 0.01,
        "seconds": 1.5,
        "bits_per_weight": 3.4,
    }
    return LayerResult(name=name, **{**values, **changes})


def make_report(**changes: Any) -> JobReport:
    values: dict[str, Any] = {
        "recipe": Recipe(name="made-up").to_dict(),
        "model": "tiny",
        "model_hash": "0123456789abcdef",
        "data": {"source": "pydoc", "sha256": "fedcba9876543210", "tokens": 1000},
        "versions": {"rotq": "0.1.0"},
        "layers": (layer_result("model.layers.0.mlp.up_proj"),),
        "blocks": (BlockResult(index=0, seconds=2.0, peak_rss=10**9),),
        "bits_per_weight": 3.3,
        "bits_per_weight_all_in": 5.48,
        "bytes": 92_100_000,
        "original_bytes": 538_090_408,
        "seconds": 91.0,
        "peak_rss": 1_200_000_000,
        "rotation": {"residual": "hadamard 12x8", "largest_relative_difference": 1e-12},
        "importance": {"model.layers.0": 0.8},
    }
    return JobReport(**{**values, **changes})
