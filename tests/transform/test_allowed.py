"""What a family does not allow is refused before any work, with the reason."""

from types import SimpleNamespace
from typing import Any

import pytest
from tiny_families import tiny_family_config

from rotq.errors import RotqError
from rotq.models.skeleton import Skeleton
from rotq.quantize.setup import starting_basis
from rotq.recipe import load_recipe

REFUSED = {
    ("qwen2_moe", "learned"): "nothing of their blocks is known but the residual stream",
    ("olmo2", "learned"): "no norm lies before their branches",
    ("phi3", "value"): "value is not possible .* rows of one layer",
    ("phi3", "up"): "up is not possible .* no linear layer gives a factor",
    ("arcee", "up"): "no linear layer gives a factor",
    ("mamba2", "cache"): "kv_cache.bits=4 is not possible for Mamba models",
    ("gemma2", "residual"): "a norm lies between",
    ("qwen3_next", "value"): "value is not possible|nothing of their blocks",
    ("gpt_neox", "R2"): "rotation.value=hadamard is not possible for GPT-NeoX",
}
CHANGES: dict[str, dict[str, Any]] = {
    "learned": {"transform.method": "learned"},
    "optrot": {"transform.method": "optrot"},
    "value": {"transform.scalings": ["value"]},
    "up": {"transform.scalings": ["up"]},
    "cache": {"kv_cache.bits": 4},
    "residual": {"rotation.residual": "hadamard"},
    "R2": {"rotation.value": "hadamard"},
}


@pytest.mark.parametrize(("family", "what"), REFUSED)
def test_refused(family: str, what: str) -> None:
    source: Any = SimpleNamespace(config=tiny_family_config(family))
    changes = {"output.format": "rotq", "rotation.residual": "none", **CHANGES[what]}
    with pytest.raises(RotqError, match=REFUSED[family, what]) as refusal:
        starting_basis(load_recipe(None, changes), Skeleton.open(source))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "what"),
    [("smollm3", "up"), ("smollm3", "value"), ("smollm3", "learned"), ("cohere", "optrot")],
)
def test_allowed(family: str, what: str) -> None:
    source: Any = SimpleNamespace(config=tiny_family_config(family))
    starting_basis(load_recipe(None, CHANGES[what]), Skeleton.open(source))
