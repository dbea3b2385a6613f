"""Windows within what a model has tables for."""

import pytest
import torch

from rotq.calibration.limits import Limits
from rotq.errors import RotqError

NARROW = Limits(embeddings=10, positions=8)


def test_windows_are_as_long_as_positions_allow() -> None:
    assert Limits().cut(10**11) == 10**11
    assert NARROW.cut(5) == 5
    assert NARROW.cut(9) == 8
    assert NARROW.cut(6, special=2) == 6
    assert NARROW.cut(7, special=2) == 6


def test_positions_that_do_not_suffice() -> None:
    with pytest.raises(RotqError, match="the model's 8 positions leave room for 0 tokens"):
        NARROW.cut(5, special=8)
    with pytest.raises(RotqError, match="the model's 8 positions leave room for 8 tokens"):
        NARROW.cut(20, least=9)


def test_a_cut_is_said() -> None:
    assert NARROW.note(8, 8) == ""
    assert NARROW.note(9, 8) == "windows are cut from 9 to 8 tokens: the model has 8 positions"
    assert NARROW.note(9, 6, "residues", special=2) == (
        "windows are cut from 9 to 6 residues: "
        "the model has 8 positions, 2 of them for special tokens"
    )


def test_ids_are_those_of_the_embedding() -> None:
    NARROW.check(torch.tensor([[0, 9]]))
    Limits().check(torch.tensor([[10**9]]))
    NARROW.check(torch.tensor([], dtype=torch.int64))
    with pytest.raises(RotqError, match=r"^token id 10 is outside the model's 10 embeddings"):
        NARROW.check(torch.tensor([[3, 10], [4, 5]]))
    with pytest.raises(RotqError, match=r"^text t: token id 12 is outside the model's 10"):
        NARROW.check(torch.tensor([12]), "t")


def test_two_models_read_what_both_can() -> None:
    other = Limits(embeddings=12, positions=4)
    assert NARROW.within(other) == other.within(NARROW) == Limits(embeddings=10, positions=4)
    assert NARROW.within(Limits()) == Limits().within(NARROW) == NARROW
