"""RoPE as configurations describe it, against the models' own modules."""

from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_model

from rotq.errors import RotqError
from rotq.models.rotary import Rotary, kv_shapes, rotaries

FAMILIES = ["llama", "mistral", "qwen3", "gemma3", "mixtral", "qwen3-moe"]


def config_of(**changes: Any) -> Any:
    values = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return transformers.LlamaConfig(**{**values, "head_dim": 16, **changes})


def model_angles(model: Any, layer: int, position_T: torch.Tensor) -> tuple[Any, Any]:
    """cos and sin that the model's module gives a layer."""
    module = model.model.rotary_emb
    x = torch.zeros(1, 1, 1, dtype=torch.float32)
    kinds = getattr(model.config, "layer_types", None)
    per_type = kinds and "rope_type" not in model.config.rope_parameters
    extra = (kinds[layer],) if per_type else ()
    return module(x, position_T[None], *extra)


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_as_the_model_does(family: str) -> None:
    model = tiny_model(family, dtype=torch.float32)
    position_T = torch.tensor([0, 1, 7, 50])
    for layer, rotary in enumerate(rotaries(model.config)):
        assert rotary is not None
        cos, sin = (x[0] for x in model_angles(model, layer, position_T))
        x_TD = torch.randn(4, cos.shape[-1], generator=torch.Generator().manual_seed(layer))
        half = x_TD.shape[-1] // 2
        rotated = torch.cat((-x_TD[:, half:], x_TD[:, :half]), dim=-1)
        expected = x_TD * cos + rotated * sin
        torch.testing.assert_close(rotary.turn(x_TD, position_T), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaled_kinds(kind: str) -> None:
    parameters = {
        "rope_theta": 10000.0,
        "rope_type": kind,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    if kind != "llama3":
        del parameters["low_freq_factor"], parameters["high_freq_factor"]
    config = config_of(rope_parameters=parameters, max_position_embeddings=128)
    rotary = rotaries(config)[0]
    assert rotary is not None
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    torch.testing.assert_close(rotary.inv_freq_R, module.inv_freq)
    assert rotary.scale == pytest.approx(module.attention_scaling)
    assert (rotary.scale != 1) == (kind == "yarn")


def test_partial_rotary_leaves_the_rest() -> None:
    config = transformers.StableLmConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        partial_rotary_factor=0.5,
    )
    rotary = rotaries(config)[0]
    assert rotary is not None
    assert rotary.inv_freq_R.numel() == 4
    x_TD = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    turned = rotary.turn(x_TD, torch.tensor([1, 2, 3]))
    assert torch.equal(turned[:, 8:], x_TD[:, 8:])
    assert not torch.equal(turned[:, :8], x_TD[:, :8])


def test_turn_back_is_the_inverse() -> None:
    rotary = Rotary(inv_freq_R=torch.tensor([1.0, 0.3, 0.01]), scale=1.3)
    x_TD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    position_T = torch.tensor([0, 3, 1000, 5, 99999])
    there = rotary.turn(x_TD, position_T)
    torch.testing.assert_close(rotary.turn_back(there, position_T), x_TD, rtol=0, atol=1e-12)
    # what is not turned is not scaled either
    assert torch.equal(there[:, 6:], x_TD[:, 6:])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_not_known(kind: str) -> None:
    config = config_of()
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": kind, "factor": 2.0}
    assert rotaries(config) == [None, None]


def test_interleaved_families_are_not_known() -> None:
    config = transformers.CohereConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2
    )
    assert rotaries(config) == [None, None]


def test_shapes() -> None:
    shape = kv_shapes(tiny_model("qwen3").config)[1]
    assert (shape.num_heads, shape.head_dim, shape.group) == (2, 24, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MambaConfig(num_hidden_layers=2), "mamba: not a decoder with a KV cache"),
        (config_of(head_dim=12), "width that is a multiple of 8"),
        (config_of(num_key_value_heads=3), "4 query heads on 3 KV heads"),
    ],
    ids=["no-attention", "width", "groups"],
)
def test_what_cannot_be_packed_is_refused(config: Any, message: str) -> None:
    with pytest.raises(RotqError, match=message):
        kv_shapes(config)
