"""Packed experts of mixtures in vLLM against transformers on the same file."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm_engines import ask, assert_equal_to_transformers, engine, prompts_of

from rotq.errors import RotqError
from rotq.vllm.experts import RotqExpertsMethod

PROMPTS = prompts_of(3, 70)


@pytest.mark.parametrize(
    ("family", "bits", "group_size", "symmetric"),
    [
        ("mixtral-wide", 4, 64, False),
        ("mixtral-wide", 3, 64, True),
        ("qwen3-moe-wide", 8, -1, False),
        ("qwen3-moe-wide", 2, 32, True),
        ("olmoe-wide", 5, 32, False),
    ],
)
def test_families_and_widths(
    family: str, bits: int, group_size: int, symmetric: bool, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint(bits, group_size, symmetric=symmetric, family=family)
    with engine(path) as llm:
        assert_equal_to_transformers(path, PROMPTS, ask(llm, PROMPTS))


def test_unpacked_once(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(3, family="qwen3-moe-wide")
    with engine(path, additional_config={"rotq_linear": "once"}) as llm:
        assert_equal_to_transformers(path, PROMPTS, ask(llm, PROMPTS))


def test_the_rotq_format_without_online_steps(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(4, family="mixtral-wide", format="rotq")
    with engine(path) as llm:
        assert_equal_to_transformers(path, PROMPTS, ask(llm, PROMPTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"family": "qwen3-moe-wide", "format": "rotq", "rotated": True},
            "rotated or rounded are not run",
        ),
        ({"family": "qwen3-moe-narrow", "group_size": -1}, "40 zero points of 3 bits"),
    ],
    ids=["rotated", "shards"],
)
def test_what_is_refused(
    options: dict[str, Any], message: str, checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(RotqError, match=message), engine(checkpoint(3, **options)):
        pass


@pytest.mark.parametrize(
    ("activation", "limit", "message"),
    [("swigluoai", None, "with swigluoai are not run"), ("silu", 7.0, "silu with a limit are not")],
)
def test_other_activations_are_refused(activation: str, limit: float | None, message: str) -> None:
    method: Any = RotqExpertsMethod.__new__(RotqExpertsMethod)
    method.moe = SimpleNamespace(is_act_and_mul=True, is_lora_enabled=False)
    method.num_bits, method.group_size, method.symmetric = 4, 32, True
    layer = SimpleNamespace(
        layer_name="experts", activation=MoEActivation(activation), swiglu_limit=limit
    )
    sizes = {"num_experts": 4, "hidden_size": 64, "intermediate_size_per_partition": 64}
    with pytest.raises(RotqError, match=message):
        method.create_weights(layer, **sizes)


def test_adapters_on_experts_are_refused(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(4, family="qwen3-moe-wide")
    with (
        pytest.raises(RotqError, match="experts: packed experts take no LoRA"),
        engine(path, enable_lora=True),
    ):
        pass
