"""Grids by layer, and what is refused or noted with them."""

import pytest
import torch
from tiny_models import MemorySource, tiny_model

from rotq.formats.activations import ActivationGrid
from rotq.job.layer_grids import layer_grid
from rotq.job.overrides import choose_overrides
from rotq.job.plan import make_plan
from rotq.layers.online_linear import OnlineLinear
from rotq.models.skeleton import Skeleton
from rotq.recipe import Weights, load_recipe


def skeleton(name: str) -> Skeleton:
    return Skeleton.open(MemorySource(tiny_model(name, dtype=torch.float32)))


def recipe(**values: object):
    return load_recipe(None, {key.replace("__", "."): value for key, value in values.items()})


@pytest.mark.parametrize(
    ("in_features", "fallback", "expected"), [(96, "auto", 48), (128, "auto", 64), (40, "auto", 40)]
)
def test_group_size_falls_to_the_largest_legal_one(in_features, fallback, expected):
    weights = Weights(bits=4, group_size=64, group_fallback=fallback)
    grid = layer_grid("layer", in_features, weights)
    assert grid is not None
    assert grid.group_size == expected


def test_group_size_that_does_not_divide_names_layer_and_sizes():
    with pytest.raises(
        ValueError, match=r"blocks\.3\.up: group size 64 .* legal sizes: 16, 24, 32"
    ):
        layer_grid("blocks.3.up", 96, Weights(group_size=64))


def test_first_override_wins_and_keep_keeps():
    overrides = ({"match": "up$", "bits": 8}, {"match": "block", "bits": 2, "group_size": -1})
    weights = recipe(weights__overrides=list(overrides), weights__group_size=16).weights
    chosen = choose_overrides(weights.overrides, ["block.up", "block.down"])
    up, down = (layer_grid(name, 64, weights, override) for name, override in chosen.items())
    assert (up.bits, up.group_size, down.bits, down.group_size) == (8, 16, 2, -1)
    kept = recipe(weights__overrides=[{"match": "up", "keep": True}]).weights
    assert layer_grid("block.up", 128, kept, kept.overrides[0]) is None


def test_several_grids_on_one_input_are_noted():
    rules = [{"match": "v_proj", "bits": 8}]
    plan = make_plan(
        skeleton("llama"),
        recipe(weights__overrides=rules, weights__group_size=16),
        torch.float32,
    )
    assert len(plan.grids) == 14
    assert sum("q_proj" in note for note in plan.notes) == 2


def test_nothing_to_quantize_is_refused():
    rules = [{"match": ".", "keep": True}]
    with pytest.raises(ValueError, match="keeps every linear layer"):
        make_plan(skeleton("llama"), recipe(weights__overrides=rules), torch.float32)


SYMMETRIC = {"weights__symmetric": True, "weights__group_size": 16, "activations__bits": 8}


def test_rounded_inputs_of_experts_need_the_rotq_format():
    with pytest.raises(ValueError, match=r"experts read; set output\.format=rotq"):
        make_plan(skeleton("mixtral"), recipe(**SYMMETRIC), torch.float32)
    plan = make_plan(skeleton("mixtral"), recipe(**SYMMETRIC, output__format="rotq"), torch.float32)
    assert plan.inputs == ActivationGrid(bits=8, symmetric=False)
    assert plan.kv is None


def test_scales_found_in_another_dtype_are_noted():
    for dtype, noted in ((torch.bfloat16, True), (torch.float32, False)):
        plan = make_plan(skeleton("llama"), recipe(**SYMMETRIC), dtype)
        assert any("activations in bfloat16" in note for note in plan.notes) == noted


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("method", "slow"), [("gptq", True), ("rtn", False)])
def test_gptq_without_native_code_is_noted(
    method: str, slow: bool, native: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rotq.job.plan.is_native", lambda: native)
    plan = make_plan(
        skeleton("llama"), recipe(weights__group_size=16, solver__method=method), torch.float32
    )
    assert any("numba is not installed" in note for note in plan.notes) == (slow and not native)


def test_only_planned_layers_round_their_inputs():
    rules = [{"match": "o_proj", "keep": True}]
    found = skeleton("llama")
    plan = make_plan(found, recipe(**SYMMETRIC, weights__overrides=rules), torch.float32)
    block = found.blocks[1]
    plan.round_online(block, found.block_name(1), found.adapter)
    assert block.mlp.down_proj.input_grid == ActivationGrid(bits=8, symmetric=False)
    assert not isinstance(block.self_attn.o_proj, OnlineLinear)
