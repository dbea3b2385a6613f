"""Where a value came from, and that every number of a recipe has a range."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from rotq.recipe import Given, Override, Recipe, from_dict, load_recipe, resolve


def given(key: str, value: Any) -> Given:
    return Given(key=key, value=value, origin=f"--set {key}={value}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsolver: {damping: 0.02}\n")
    return path


@pytest.mark.parametrize(
    ("values", "origin", "message"),
    [
        ([("weights.bit", 3)], "--set weights.bit=3", "unknown key weights.bit; did you mean"),
        ([("bits", 3)], "--set bits=3", "unknown key bits; did you mean weights.bits or activ"),
        ([("solver.damping", 7)], "--set solver.damping=7", "solver.damping: 7.0 is not above 0"),
        ([("weights.bits", 4), ("seed", 1)], "--set seed=1", "unknown key seed; did you mean rot"),
        ([("kv_cache.bits", 4)], "--set kv_cache.bits=4", "kv_cache.bits is applied at run time"),
        ([("name.x", 1)], "--set name.x=1", "name.: expected a mapping, got 'mine'"),
        ([("weights.overrides.0.bits", 3)], "--set weights.overrides.0.bits=3", "unknown key weig"),
    ],
)
def test_a_given_value_is_blamed_for_its_error(
    file: Path, values: list[tuple[str, Any]], origin: str, message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        resolve(file, [given(*pair) for pair in values])
    assert str(caught.value).startswith(f"{origin}: {message}")


def test_the_file_is_blamed_for_its_own_error(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    for content, message in (
        ("solver: {dampin: 1}", "unknown key solver.dampin"),
        ("weights: 3", "weights.: expected a mapping, got 3"),
        ("kv_cache: {bits: 4}", "kv_cache.bits is applied at run time"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"^{file}: {message}"):
            resolve(file, [given("weights.bits", 3)])


def test_a_given_value_may_mend_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("kv_cache: {bits: 4}\nsolver: {damping: 9}\n")
    mended = resolve(file, [given("output.format", "rotq"), given("solver.damping", 0.1)])
    assert (mended.kv_cache.bits, mended.solver.damping) == (4, 0.1)


def test_a_value_of_one_section_leaves_its_alias_alone(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("activations: &four {bits: 4}\nkv_cache: *four\noutput: {format: rotq}\n")
    recipe = resolve(file, [given("kv_cache.bits", 8)])
    assert (recipe.activations.bits, recipe.kv_cache.bits) == (4, 8)


def test_numbers_as_people_write_them() -> None:
    written = {"solver.damping": "1e-2", "tuning.learning_rate": "3E-3", "transform.top_k": "1e3"}
    recipe = load_recipe(None, {**written, "calibration.seq_len": "0100"})
    assert recipe.solver.damping == 0.01
    assert recipe.tuning.learning_rate == 0.003
    assert (recipe.transform.top_k, type(recipe.transform.top_k)) == (1000, int)
    assert recipe.calibration.seq_len == 100


@pytest.mark.parametrize("value", ["1,5", "0.5x", "1e", "half", "[0.1]", "true"])
def test_what_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"solver\.damping: expected float, got"):
        load_recipe(None, {"solver.damping": value})


def numbers(kind: type) -> list[str]:
    """Dotted names of all fields of a type, in all sections."""
    sections = {name: type(v) for name, v in vars(Recipe()).items() if dataclasses.is_dataclass(v)}
    return [
        f"{section}.{name}"
        for section, cls in sections.items()
        for name, hint in typing.get_type_hints(cls).items()
        if hint is kind
    ]


@pytest.mark.parametrize("key", numbers(float))
def test_every_float_is_finite(key: str) -> None:
    section, name = key.split(".")
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match=rf"^{key}: .*(finite|nan|inf)"):
            from_dict({section: {name: value}})
        with pytest.raises(ValueError, match=f"^{name}: "):  # built without YAML
            type(getattr(Recipe(), section))(**{name: value})


@pytest.mark.parametrize("key", numbers(float) + numbers(int))
def test_every_number_has_a_range(key: str) -> None:
    section, name = key.split(".")
    for value in (10**30, -(10**30)):
        with pytest.raises(ValueError, match=rf"^{section}\."):
            from_dict({section: {name: value}})


def test_ranges_of_what_a_job_would_find_too_late() -> None:
    for key, value in (
        ("output.max_shard_gb", 1e-12),
        ("calibration.num_samples", 10**11),
        ("weights.overrides", [{"match": "a"}] * 1001),
        ("transform.scalings", ["up", "up"]),
        ("name", "x" * 101),
    ):
        with pytest.raises(ValueError, match="is not"):
            load_recipe(None, {key: value})
    assert load_recipe(None, {"output.max_shard_gb": 1e-4}).output.max_shard_gb == 1e-4


@pytest.mark.parametrize("match", ["(", "a{99999999999}", "(" * 499 + ")" * 499, "x" * 1001])
def test_patterns_that_cannot_be_searched_are_refused(match: str) -> None:
    with pytest.raises(ValueError, match=r"weights\.overrides\[0\]\.match"):
        from_dict({"weights": {"overrides": [{"match": match}]}})


def test_a_pattern_warns_of_nothing() -> None:
    assert Override(match="[[a]").match == "[[a]"


def test_text_that_no_file_can_hold_is_refused() -> None:
    """YAML can spell halves of a pair of surrogates; a job would fail when it writes its recipe."""
    for key in ("name", "calibration.source"):
        with pytest.raises(ValueError, match=f"{key}: .*udce9' is no text that UTF-8 can hold"):
            resolve(None, [Given.parse(key, '"\\udce9"')])
    assert load_recipe(None, {"name": "größer 😀"}).name == "größer 😀"


def test_messages_are_short() -> None:
    far = "x" * 90_000
    for values in ({far: 1}, {"name": [[far] * 9] * 9}, {"weights": {"bits": far}}):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
            from_dict(values)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights.group_size": 32}, "weights.format=nvfp4 needs weights.group_size=16, got 32"),
        ({"weights.symmetric": False}, "needs weights.symmetric=true, got False"),
        ({"weights.bits": 3}, "needs weights.bits=4, got 3"),
        ({"weights.average_bits": 4.5}, "needs weights.average_bits=0"),
        ({"weights.embedding": 6}, "needs weights.embedding=16"),
        ({"tuning.code_steps": 4}, "needs tuning.code_steps=0"),
        ({"activations.bits": 8}, "set activations.bits=4, or 16"),
        ({"activations.bits": 4}, "needs activations.symmetric=true"),
        ({"transform.method": "learned"}, "expects the error of integers"),
        ({"weights.overrides": [{"match": "x", "bits": 8}]}, "overrides can keep layers"),
        ({"rotation.inputs": "hadamard"}, "inputs are rotated in blocks: set rotation.block_size"),
        (
            {"rotation.inputs": "hadamard", "rotation.block_size": 16},
            "rotation.inputs is applied at run time, which only output.format=rotq can express",
        ),
        (
            {"weights.format": "fp8_block", "weights.bits": 8, "weights.group_size": 128},
            "weights.format=fp8_block needs solver.method=rtn, got gptq",
        ),
    ],
    ids=str,
)
def test_what_a_format_of_floats_settles_is_not_asked_for_otherwise(
    changes: dict[str, Any], message: str
) -> None:
    floats = {"weights.format": "nvfp4", "weights.group_size": 16, "weights.symmetric": True}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(None, {**floats, **changes})
