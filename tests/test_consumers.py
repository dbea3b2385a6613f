"""The comparison of texts with those of other programs."""

import sys

import pytest
from tiny_jobs import ROOT, load_script

sys.path.append(str(ROOT / "scripts" / "consumers"))
check = load_script("consumers/check")


class Letters:
    """Ids are places in the alphabet; 0 is special."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(96 + i) for i in ids if i)


@pytest.mark.parametrize(
    ("theirs", "equal"),
    [([1, 2, 3], 3), ([1, 2, 4], 2), ([1, 2], 2), ([2, 2, 3], 0), ("abc", 3), ("abd", 2), ("", 0)],
    ids=str,
)
def test_equal_tokens_are_those_before_the_first_that_differs(
    theirs: list[int] | str, equal: int
) -> None:
    assert check.equal_tokens([1, 2, 3], theirs, Letters()) == equal


def test_a_special_token_at_the_end_is_no_text() -> None:
    assert check.equal_tokens([1, 2, 0], "ab", Letters()) == 3


def test_every_reader_has_its_script() -> None:
    for reader in check.FORMATS:
        assert (check.HERE / f"read_{reader}.py").is_file()
