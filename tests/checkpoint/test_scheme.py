"""Grids by layer name as a config gives them, and what rotq cannot run."""

from __future__ import annotations

import pytest
from tiny_checkpoints import W3_CHANNEL, W4, W8

from rotq.checkpoint.scheme import read_scheme
from rotq.checkpoint.scheme_writing import quantization_config
from rotq.errors import RotqError

LAYERS = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("mlp.up_proj", "mlp.down_proj")]


def test_a_kept_layer_is_in_no_pattern() -> None:
    layers = {name: W8 if "down" in name else W4 for name in LAYERS[:-1]}
    scheme = read_scheme(quantization_config(layers, [LAYERS[-1], "lm_head"], "rotq"))
    assert scheme.grid(LAYERS[-1]) is None
    assert scheme.grid("lm_head") is None


def test_full_names_win_over_patterns_over_linear() -> None:
    config = quantization_config(dict(zip(LAYERS, (W4, W8, W3_CHANNEL), strict=False)), [], "rotq")
    targets = (["Linear"], [r"re:.*up_proj"], [LAYERS[0]])
    for group, target in zip(config["config_groups"].values(), targets, strict=True):
        group["targets"] = target
    scheme = read_scheme(config)
    assert [scheme.grid(name) for name in LAYERS[:3]] == [W3_CHANNEL, W4, W8]


def test_version_3_is_read_where_it_holds_no_butterfly() -> None:
    """``save_pretrained`` of an older rotq said 3 of any checkpoint."""
    config = quantization_config(dict.fromkeys(LAYERS, W4), [], "rotq", LAYERS[:1])
    assert read_scheme(config | {"version": 3}) == read_scheme(config)
    with pytest.raises(RotqError, match="commit 687066b is the last that reads it"):
        read_scheme(config | {"version": 3, "online": {"butterfly": LAYERS[:1]}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"type": "float"}}, "float"),
        ({"weights": {"strategy": "block"}}, "per block"),
        ({"weights": {"actorder": "group"}}, "another order"),
        ({"weights": {"num_bits": 1}}, "bits must be 2 to 8"),
        ({"weights": {"group_size": None}}, "not valid"),
        ({"input_activations": {"num_bits": 8}}, "activations"),
    ],
)
def test_groups_that_rotq_cannot_run(change: dict[str, dict[str, object]], message: str) -> None:
    config = quantization_config({"a": W4}, [], "compressed-tensors")
    for key, value in change.items():
        group = config["config_groups"]["group_0"]
        group[key] = {**(group[key] or {}), **value}
    with pytest.raises(RotqError, match=message):
        read_scheme(config)


@pytest.mark.parametrize(
    "path",
    [
        "config_groups",
        "config_groups.group_0",
        "config_groups.group_0.weights",
        "config_groups.group_0.input_activations",
        "online",
        "attention",
        "attention.kv_cache",
        "transform_config",
        "transform_config.config_groups",
        "transform_config.config_groups.a",
    ],
)
def test_parts_of_another_kind_are_named(path: str) -> None:
    *way, last = path.split(".")
    config = quantization_config({"a": W4}, [], "rotq")
    place = config
    for name in way:
        place = place.setdefault(name, {})
    for value in ("int4", [1]):
        place[last] = value
        with pytest.raises(RotqError, match=rf"{last} of quantization_config is not a mapping"):
            read_scheme(config)


def test_a_transform_that_is_applied_to_no_list() -> None:
    config = quantization_config({"a": W4}, [], "rotq")
    for apply, message in (("x", "apply of .* is not a list"), (["x"], "apply of .* a mapping")):
        config["transform_config"] = {"config_groups": {"a": {"apply": apply}}}
        with pytest.raises(RotqError, match=message):
            read_scheme(config)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["re:("], "unterminated"),
        (["re:a{99999999999}"], "too large"),
        ([1], "is not a list of names"),
        ("Linear", "is not a list of names"),
        (None, "is not a list of names"),
    ],
)
@pytest.mark.parametrize("place", ["targets", "ignore", "online"])
def test_targets_that_no_layer_can_be_compared_with(
    place: str, targets: object, message: str
) -> None:
    config = quantization_config({"a": W4}, [], "rotq")
    if place == "targets":
        config["config_groups"]["group_0"]["targets"] = targets
    elif targets is not None:
        config[place] = targets if place == "ignore" else {"hadamard": targets}
    else:
        return
    with pytest.raises(RotqError, match=message) as caught:
        read_scheme(config)
    assert place in str(caught.value)


def test_a_pattern_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotq.patterns.LIMIT_SECONDS", 1.0)
    config = quantization_config({"a": W4}, [], "rotq")
    config["config_groups"]["group_0"]["targets"] = ["re:(.|[a-z])*!$"]
    with pytest.raises(RotqError, match=r"target of quantization_config: .*a-z.* takes more than"):
        read_scheme(config).check_patterns(LAYERS)
    sound = read_scheme(quantization_config({"a": W4}, ["re:.*up_proj"], "rotq"))
    sound.check_patterns(LAYERS)
