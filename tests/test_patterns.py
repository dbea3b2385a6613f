"""Patterns searched within a time: the same as ``re`` finds, or an error that names the pattern."""

import re

import pytest

from rotq.patterns import PatternTooSlow, search

NAMES = [f"model.layers.{n}.mlp.{kind}_proj" for n in range(3) for kind in ("up", "down")]


def test_what_is_found_is_what_re_finds() -> None:
    patterns = ["up", r"\.2\..*down_proj$", "^x", "(?i)MLP", "", "[[a]", r"(\w)\1", "ü|layers"]
    re.purge()  # a pattern that is remembered warns no more
    with pytest.warns(FutureWarning):
        expected = [[i for i, name in enumerate(NAMES) if re.search(p, name)] for p in patterns]
    assert search(patterns, NAMES) == expected


def test_the_slow_pattern_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotq.patterns.LIMIT_SECONDS", 1.0)
    with pytest.raises(PatternTooSlow, match=r"a-z.*!\$' takes more than 1 s on the") as caught:
        search(["up", "(.|[a-z])*!$", "down"], NAMES)
    assert caught.value.index == 1
