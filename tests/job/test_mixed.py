"""What chooses its grid together, from what, and which averages are refused."""

import pytest
import torch
from tiny_models import MemorySource, tiny_model

from rotq.formats.integer import Grid
from rotq.job.mixed import choices
from rotq.job.plan import make_plan
from rotq.models.skeleton import Skeleton
from rotq.recipe import Override, load_recipe


def plan(name="llama", average_bits=4.0, **more):
    values = {"weights.average_bits": average_bits, "weights.scale_dtype": "float16", **more}
    skeleton = Skeleton.open(MemorySource(tiny_model(name, dtype=torch.float32)))
    return make_plan(
        skeleton, load_recipe(None, {"output.format": "rotq", **values}), torch.float32
    )


def names(unit):
    return {name.removeprefix("model.layers.0.") for name in unit.layers}


def test_what_engines_fuse_is_one_unit():
    units = plan().units
    assert [names(unit) for unit in units[:4]] == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ]
    assert len(units) == 8


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_all_experts_of_a_block_are_one_unit(name):
    found = plan(name)
    units = [unit for unit in found.units if "experts" in unit.name]
    assert len(units) == 2
    experts = {name for name in found.grids if "experts" in name}
    assert set(units[0].layers) | set(units[1].layers) == experts
    assert all("layers.0." in name for name in units[0].layers)


def test_groups_that_divide_the_columns_and_leave_more_than_one():
    smallest = Grid(bits=2, group_size=-1, symmetric=False)
    found = {width: {g.group_size for g in choices(smallest, width, None)} for width in (96, 128)}
    assert found == {96: {-1, 32}, 128: {-1, 32, 64}}
    assert {grid.bits for grid in choices(smallest, 96, None)} == {2, 3, 4}


def test_an_override_leaves_no_other_bits_or_groups():
    eight = Grid(bits=8, group_size=-1, symmetric=True)
    assert {g.bits for g in choices(eight, 96, Override(match="x", bits=8))} == {8}
    sixteen = Grid(bits=2, group_size=16, symmetric=True)
    found = choices(sixteen, 96, Override(match="x", group_size=16))
    assert [(grid.bits, grid.group_size) for grid in found] == [(2, 16), (3, 16), (4, 16)]
    assert all(grid.symmetric for grid in found)


def test_fused_layers_with_other_overrides_choose_apart():
    rules = [{"match": "v_proj", "bits": 8}, {"match": "o_proj", "keep": True}]
    found = plan(average_bits=4.0, **{"weights.overrides": rules})
    units = [names(unit) for unit in found.units if unit.name.startswith("model.layers.0.")]
    assert units == [
        {"self_attn.q_proj", "self_attn.k_proj"},
        {"self_attn.v_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ]


def test_sizes_rise_and_count_scales_and_zero_points():
    [unit] = [unit for unit in plan().units if names(unit) == {"mlp.down_proj"}]
    assert list(unit.bits) == sorted(unit.bits)
    # 48 rows of 80 columns, a scale of 16 bits and a zero point of 2 a row
    assert unit.grids[0] == Grid(bits=2, group_size=-1, symmetric=False)
    assert unit.bits[0] == 48 * (80 * 2 + 16 + 2)


def test_a_choice_is_the_grid_of_every_layer_of_its_unit():
    found = plan()
    chosen = found.choosing([len(unit.grids) - 1 for unit in found.units])
    assert list(chosen.grids) == list(found.grids)
    for unit in found.units:
        assert {chosen.grids[name] for name in unit.layers} == {unit.grids[-1]}
        assert {found.grids[name] for name in unit.layers} == {unit.grids[0]}


@pytest.mark.parametrize(
    ("average", "words"), [(2.0, "below .* the least"), (8, "above .* the most")]
)
def test_an_average_out_of_reach_is_refused_with_the_limit(average, words):
    limit = plan().limits[0 if average == 2 else 1]
    with pytest.raises(ValueError, match=f"average_bits={average:g} is {words}") as raised:
        plan(average_bits=average)
    assert f"{limit:.4g}" in str(raised.value)
    assert "model.layers.0.self_attn.q_proj" in str(raised.value)


def test_the_limits_themselves_are_allowed():
    for limit in plan().limits:
        assert plan(average_bits=limit).units


@pytest.mark.parametrize("symmetric", [False, True])
def test_that_transformers_needs_symmetric_grids_is_said_before_the_work(symmetric):
    changes = {"output.format": "compressed-tensors", "weights.symmetric": symmetric}
    notes = " ".join(plan(**changes).notes)
    assert ("several grids only where weights.symmetric=true" in notes) != symmetric
