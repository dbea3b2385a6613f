"""The heads of a rank."""

import pytest
import torch
from kv_cases import tokens_of, transform_of

from rotq.errors import RotqError
from rotq.kv.codec import KVCodec
from rotq.ops import KVFormat
from rotq.vllm.heads import heads_of_rank

FORM = KVFormat(head_dim=32, k_bits=3, v_bits=2, residual="qjl")


@pytest.mark.parametrize(
    ("ranks", "number", "held"),
    [(1, 4, [[0, 1, 2, 3]]), (2, 2, [[0, 1], [2, 3]]), (8, 1, [[n // 2] for n in range(8)])],
)
def test_a_rank_codes_as_all_do(ranks: int, number: int, held: list[list[int]]) -> None:
    constants = transform_of(FORM, 4)
    k_BHTD, v_BHTD = tokens_of(constants, 2, 5)
    position_BT = torch.arange(5).expand(2, -1)
    codes = KVCodec(constants).encode(k_BHTD, v_BHTD, position_BT)
    for rank, heads in enumerate(held):
        cut = heads_of_rank(constants, number, rank, ranks)
        found = KVCodec(cut).encode(k_BHTD[:, heads], v_BHTD[:, heads], position_BT)
        for name, expected in vars(codes).items():
            assert torch.equal(getattr(found, name), expected[:, heads]), name


def test_heads_that_cannot_be_split() -> None:
    constants = transform_of(FORM, 4)
    for number, ranks in ((2, 3), (1, 3), (2, 4), (1, 6)):
        with pytest.raises(RotqError, match="constants of 4 KV heads"):
            heads_of_rank(constants, number, 0, ranks)
