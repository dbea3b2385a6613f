"""The script that gives keys large biases: the same model without them, and only keys have them."""

from typing import Any

import pytest
import torch
from tiny_jobs import load_script
from tiny_models import random_ids
from transformers import LlamaForCausalLM

from rotq.errors import RotqError


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("biased_keys")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """Of the sizes that the script is for."""
    model: LlamaForCausalLM = load_script("train_tiny").make_model(64, num_layers=2)
    return model.eval()


def test_without_biases_it_is_the_same_model(script: Any, llama: LlamaForCausalLM) -> None:
    qwen = script.with_biases(llama, size=0, pairs=1)
    ids = random_ids(2, 20) % 64
    with torch.inference_mode():
        torch.testing.assert_close(qwen(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-5)


def test_only_the_slowest_pairs_of_keys_have_biases(script: Any, llama: LlamaForCausalLM) -> None:
    attention = script.with_biases(llama, size=100, pairs=1).model.layers[1].self_attn
    halves = attention.k_proj.bias.detach().view(
        llama.config.num_key_value_heads, 2, -1, llama.config.head_dim // 2
    )
    assert bool((halves[..., :-1] == 0).all())
    assert float(halves[..., -1].abs().min()) > 1
    assert not attention.q_proj.bias.any()
    assert not attention.v_proj.bias.any()


def test_more_pairs_than_a_head_has_are_refused(script: Any, llama: LlamaForCausalLM) -> None:
    with pytest.raises(RotqError, match="--pairs 99: a head has"):
        script.with_biases(llama, size=1, pairs=99)
