"""Recipes: presets, precedence, refusals."""

from pathlib import Path
from typing import Any

import pytest

from rotq.recipe import Recipe, Weights, from_dict, load_recipe

PRESETS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_preset_is_named_as_its_file(file: Path) -> None:
    recipe = load_recipe(file, {})
    assert recipe.name == file.stem
    # a format of floats has one group size, and none to fall back to
    if recipe.weights.group_size != -1 and recipe.weights.format == "int":
        assert recipe.weights.group_fallback == "auto"


def test_the_promised_presets_exist() -> None:
    names = {file.stem for file in PRESETS}
    assert names >= {"rtn", "gptq", "quarot", "rsq", "w3", "w4", "w3-channel"}


def test_promised_grids() -> None:
    outer = {"embedding": 6, "head": 6, "outer_fallback": "dense"}
    grids = {file.stem: load_recipe(file, {}).weights for file in PRESETS}
    assert grids["w3"] == Weights(bits=3, group_size=64, group_fallback="auto", **outer)
    assert grids["w4"] == Weights(bits=4, group_size=128, group_fallback="auto", symmetric=True)
    assert grids["w3-channel"] == Weights(bits=3, group_size=-1, group_fallback="auto", **outer)


def test_override_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nweights: {bits: 3, symmetric: true}\n")
    recipe = load_recipe(file, {"weights.bits": "2", "solver.damping": "0.05"})
    assert (recipe.weights.bits, recipe.weights.symmetric) == (2, True)
    assert recipe.weights.group_size == Recipe().weights.group_size
    assert recipe.solver.damping == 0.05


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_dictionary_round_trip(file: Path) -> None:
    recipe = load_recipe(file, {})
    assert from_dict(recipe.to_dict()) == recipe


def test_layer_overrides() -> None:
    values = {"weights": {"overrides": [{"match": "down_proj$", "bits": 8}, {"match": "lm_head"}]}}
    recipe = from_dict(values)
    assert [rule.bits for rule in recipe.weights.overrides] == [8, 0]
    assert from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weigths": {}}, "unknown key weigths; did you mean weights?"),
        ({"solver": {"dampin": 1}}, "unknown key solver.dampin; did you mean solver.damping?"),
        ({"solver": {"zzz": 1}}, "unknown key solver.zzz; known: "),
        ({"weights": {"bits": 9}}, "weights.bits: 9 is not 1 to 8"),
        ({"weights": {"bits": True}}, "weights.bits: expected int, got True"),
        ({"weights": {"bits": "three"}}, "weights.bits: expected int, got 'three'"),
        ({"weights": {"group_size": 0}}, "weights.group_size: 0 is not positive or -1"),
        ({"weights": 3}, "weights.: expected a mapping, got 3"),
        ({"weights": {"overrides": {}}}, "weights.overrides: expected a list"),
        ({"weights": {"overrides": [{}]}}, "match"),
        ({"weights": {"overrides": [{"match": "("}]}}, "not a regular expression"),
        ({"rotation": {"residual": "haar"}}, "'haar' is not one of none, hadamard"),
        ({"importance": {"power": 3}}, "importance.power: 3 is not one of 1, 2"),
        ({"solver": {"damping": 0}}, "solver.damping: 0.0 is not above 0"),
        ({"solver": {"target_correction": 2}}, "solver.target_correction: 2.0 is not 0 to 1"),
        ({"calibration": {"num_samples": 0}}, "calibration.num_samples: 0 is not at least 1"),
        ({"rotation": {"down": "hadamard"}}, "rotation.down is applied at run time, which only"),
        ({"rotation": {"down_block_size": 1}}, "rotation.down_block_size: 1 is not at least 2, or"),
        (
            {"rotation": {"down_block_size": 64}},
            "rotation.down_block_size is of R4; set rotation.d",
        ),
        ({"rotation": {"attention": "hadamard"}}, "rotation.attention is applied at run time"),
        ({"rotation": {"attention": "dct"}}, "rotation.attention: 'dct' is not one of none, had"),
        ({"kv_cache": {"bits": 4}}, "kv_cache.bits is applied at run time, which only output.f"),
        ({"kv_cache": {"bits": 9}}, "kv_cache.bits: 9 is not 2 to 8, or 16"),
        ({"activations": {"bits": 4}}, "set weights.symmetric=true or output.format=rotq"),
        ({"rotation": {"block_size": 16}}, "block_size is of block_hadamard and of inputs; set"),
        ({"activations": {"bits": 1}}, "activations.bits: 1 is not 2 to 8, or 16"),
        ({"activations": {"bits": 15}}, "activations.bits: 15 is not 2 to 8, or 16"),
        ({"activations": {"symmetric": 1}}, "activations.symmetric: expected bool, got 1"),
    ],
)
def test_refusals_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        from_dict(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not YAML"), ("- a\n", "a recipe is a mapping, got list"), ("x: 1\n", "unknown key")],
)
def test_errors_in_a_file_name_the_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"bad\.yaml: .*{message}"):
        load_recipe(file, {})
