"""YAML of recipes: numbers as people write them, and bounds before anything is built."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotq.recipe import read_mapping, write_yaml
from rotq.recipe.notation import LIMIT_BYTES, LIMIT_DEPTH, LIMIT_NODES, read_yaml


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("1e-2", 0.01), ("1E-2", 0.01), ("1e+2", 100.0), ("2e3", 2000.0), ("1.5e3", 1500.0)],
        *[(".5", 0.5), ("-.5", -0.5), ("+.5", 0.5), ("5.", 5.0), ("1_000.5", 1000.5)],
        *[("1_000", 1000), ("0100", 100), ("08", 8), ("+7", 7), ("-3", -3), ("0x1F", 31)],
        *[(".inf", float("inf")), ("-.Inf", float("-inf"))],
    ],
)
def test_numbers_are_what_they_look_like(text: str, number: float) -> None:
    found = read_yaml(text)
    assert (found, type(found)) == (number, type(number))


@pytest.mark.parametrize("text", ["1:30", "0x", "1e", "e5", ".", "-", "1.2.3", "_1", "0b1", "inf"])
def test_what_only_resembles_a_number_is_a_word(text: str) -> None:
    assert isinstance(read_yaml(f"[{text}, x]")[0], str)


@pytest.mark.parametrize("word", ["1e-2", "0100", ".5", "no", "", "a: b", "#x", "é", "0x1F"])
def test_words_survive_writing(word: str) -> None:
    assert read_yaml(write_yaml({"name": word})) == {"name": word}


WORDS = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | WORDS | st.floats(width=32)


@settings(deadline=None)
@given(
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
        max_leaves=8,
    )
)
def test_plain_values_survive_writing(value: Any) -> None:
    assert repr(read_yaml(write_yaml({"x": value}))["x"]) == repr(value)


def test_encodings_with_a_mark_are_read(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "r.yaml").write_text("name: ü\n", encoding=encoding)
        assert read_mapping(tmp_path / "r.yaml") == {"name": "ü"}


def bomb(levels: int) -> str:
    """Ten to the power of ``levels`` items behind some hundred characters."""
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), f"holds more than {LIMIT_NODES} values"),
        (bomb(5), f"holds more than {LIMIT_NODES} values"),
        (merges(9), f"holds more than {LIMIT_NODES} values"),
        ("a: &a {b: *a}", "the alias *a stands before or in what it repeats"),
        ("a: &a [*a]", "the alias *a stands before or in what it repeats"),
        ("a: *b", "the alias *b stands before or in what it repeats"),
        ("[" * 50_000, f"nested more than {LIMIT_DEPTH} deep"),
        ("".join(f"{' ' * i}a:\n" for i in range(99)), f"nested more than {LIMIT_DEPTH} deep"),
        ("x" * (LIMIT_BYTES + 1), f"larger than {LIMIT_BYTES} bytes"),
        ("a: [", "not YAML: expected the node content, but found '<stream end>', line 1"),
        ("a: 1\nb: 2\na: 3", "not YAML: the key a stands twice in one mapping, line 3"),
        ("a: {b: 1, b: 1}", "not YAML: the key b stands twice"),
        ("a: 1\n---\nb: 2", "not YAML: but found another document"),
        ("2001-99-99", "not YAML: month must be in 1..12"),
        ("!!python/name:os.system", "not YAML: could not determine a constructor for the tag"),
        ("!!bool 3", "not YAML: a value does not fit its tag"),
        ("!!timestamp x", "not YAML: a value does not fit its tag"),
        ("!!int x", "not YAML: invalid literal for int()"),
        ("? [a]\n: b", "not YAML: found unhashable key"),
        ("a: \0", "not YAML: unacceptable character"),
    ],
)
def test_refusals_are_short_and_come_soon(text: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        read_yaml(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20


def test_aliases_and_merges_of_a_sensible_size_are_read() -> None:
    text = "a: &a {bits: 4}\nb: *a\nc: {<<: *a, group_size: 3}\nd: {<<: *a, bits: 8}"
    four = {"bits": 4}
    found = read_yaml(text)
    assert found == {"a": four, "b": four, "c": four | {"group_size": 3}, "d": {"bits": 8}}


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\xfd", "not YAML"), (b"- a", "this is not a recipe; a rec")]
)
def test_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"r\.yaml: {message}"):
        read_mapping(tmp_path / "r.yaml")


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: No such file or directory"):
        read_mapping(tmp_path / "none")
    with pytest.raises(ValueError, match="Is a directory"):
        read_mapping(tmp_path)


def test_an_empty_file_is_an_empty_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing\n")
    assert read_mapping(tmp_path / "r.yaml") == {}
