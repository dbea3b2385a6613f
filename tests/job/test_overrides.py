"""Overrides: which layers they serve, and patterns that match nothing or never end."""

import time

import pytest
import torch
from tiny_models import MemorySource, tiny_model

from rotq.job.overrides import choose_overrides, idle_overrides
from rotq.job.plan import make_plan
from rotq.models.skeleton import Skeleton
from rotq.recipe import Override, Recipe, load_recipe

LAYERS = [f"model.layers.{n}.mlp.{kind}_proj" for n in range(3) for kind in ("up", "down")]
SLOW = ("(.|[a-z])*!$", ".*" * 12 + "!", r"(\w+\.?)+!")


def rules(*patterns: str, **values: object) -> tuple[Override, ...]:
    return tuple(Override(match=match, **{"bits": 8, **values}) for match in patterns)


def test_the_first_match_serves_a_layer() -> None:
    wanted = rules(r"layers\.0", "down")
    chosen = choose_overrides(wanted, LAYERS)
    assert chosen == {
        "model.layers.0.mlp.up_proj": wanted[0],
        "model.layers.0.mlp.down_proj": wanted[0],
        "model.layers.1.mlp.down_proj": wanted[1],
        "model.layers.2.mlp.down_proj": wanted[1],
    }


def test_no_overrides_are_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("rotq.job.overrides.search")
    assert choose_overrides((), LAYERS) == {}


@pytest.mark.parametrize("match", [r"mlp\.downproj", "lm_head", "layers.7"])
def test_a_pattern_that_matches_nothing_is_named(match: str) -> None:
    with pytest.raises(ValueError, match=r"overrides\[1\]: .* matches no layer that is") as caught:
        choose_overrides(rules("up", match), LAYERS, ["lm_head"])
    assert "they are named as model.layers.0.mlp.up_proj" in str(caught.value)


def test_what_is_never_quantized_may_be_kept() -> None:
    kept = rules("lm_head", keep=True)
    assert choose_overrides(kept, LAYERS, ["lm_head"]) == {"lm_head": kept[0]}
    with pytest.raises(ValueError, match="matches no layer"):
        choose_overrides(rules("lm_haed", keep=True), LAYERS, ["lm_head"])


def test_an_override_behind_others_that_serve_its_layers_is_noted() -> None:
    wanted = rules("layers", "down", "up")
    notes = list(idle_overrides(wanted, choose_overrides(wanted, LAYERS)))
    assert len(notes) == 2
    assert "overrides[1]: match 'down' changes nothing: earlier" in notes[0]


@pytest.mark.parametrize("slow", SLOW)
def test_a_pattern_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    monkeypatch.setattr("rotq.patterns.LIMIT_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"overrides\[1\]: match .* takes more than 1 s on the n"):
        choose_overrides(rules("up", slow), LAYERS * 10)
    assert time.monotonic() - started < 10


def recipe(*patterns: str, **values: object) -> Recipe:
    wanted = [{"match": match, **values} for match in patterns]
    return load_recipe(None, {"weights.overrides": wanted, "weights.group_size": 16})


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_plans_refuse_what_matches_nothing(family: str) -> None:
    opened = Skeleton.open(MemorySource(tiny_model(family, dtype=torch.float32)))
    with pytest.raises(ValueError, match="matches no layer that is quantized"):
        make_plan(opened, recipe("o_prj", bits=8), torch.float32)
    with pytest.raises(ValueError, match="matches no layer that is quantized"):
        make_plan(opened, recipe("embed_tokens", bits=8), torch.float32)
    plan = make_plan(opened, recipe("embed_tokens|lm_head", "norm", keep=True), torch.float32)
    assert not any("changes nothing" in note for note in plan.notes)
    plan = make_plan(opened, recipe("proj", "o_proj", bits=8), torch.float32)
    assert any("overrides[1]" in note and "changes nothing" in note for note in plan.notes)
