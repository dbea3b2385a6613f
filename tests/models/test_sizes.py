"""Sizes as the configurations of different families spell them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rotq.errors import RotqError
from rotq.models.sizes import check_counts, head_dim, mlp_widths, num_value_heads


def config(**more):
    return SimpleNamespace(hidden_size=48, num_attention_heads=4, **more)


def test_head_dim_is_the_configs_own():
    assert head_dim(config(head_dim=16)) == 16
    assert head_dim(config(head_dim=None)) == 12
    assert head_dim(config()) == 12


def test_without_kv_heads_there_are_as_many_as_query_heads():
    assert num_value_heads(config(num_key_value_heads=2)) == 2
    assert num_value_heads(config(num_key_value_heads=None)) == 4
    assert num_value_heads(config()) == 4


def test_widths_are_those_of_all_mlps():
    assert mlp_widths(config(intermediate_size=80, moe_intermediate_size=24)) == {24, 80}
    # GPT-2
    assert mlp_widths(config(n_inner=None)) == {192}
    assert mlp_widths(config(n_inner=100)) == {100}


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"n_layer": 20_000},
        {"text_config": {"num_local_experts": 10**6}},
        {"num_hidden_layers": float("inf")},
    ],
)
def test_more_modules_than_any_model_has_are_refused(values):
    with pytest.raises(RotqError, match=r"^config\.json: \w+ \S+ is more than the 10000"):
        check_counts(values, Path("config.json"))


def test_what_is_no_count_is_left_alone():
    values = {"vocab_size": 10**6, "layer_types": ["full"] * 20_000, "num_hidden_layers": 126}
    values["text_config"] = {"vocab_size_per_layer_input": 262144, "moe_expert_size": 20_000}
    check_counts({**values, "layer_norm_eps": 1e-5, "experts": None}, Path("config.json"))
