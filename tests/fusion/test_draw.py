"""What a recipe's rotation section becomes for a model's sizes."""

from types import SimpleNamespace

import pytest
import torch

from rotq.errors import RotqError
from rotq.fusion.draw import build_basis, derive_seed
from rotq.models.families import gemma3, llama
from rotq.recipe import Rotation

CONFIG = SimpleNamespace(
    hidden_size=48,
    intermediate_size=80,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    head_dim=16,
)


def changed(**sizes):
    return SimpleNamespace(**{**vars(CONFIG), **sizes})


def test_none_is_the_identity():
    basis = build_basis(Rotation(), llama.ADAPTER, CONFIG)
    assert basis.is_identity
    assert basis.description == {}


def test_every_kv_head_and_layer_gets_its_own_basis():
    basis = build_basis(Rotation(value="hadamard"), llama.ADAPTER, CONFIG)
    assert not basis.is_identity
    assert basis.residual_DD is None
    assert [tuple(R.shape) for R in basis.value] == [(2, 16, 16)] * 3
    flat = torch.cat(basis.value).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == 6


def test_description_names_the_construction():
    rotation = Rotation(residual="hadamard", value="dct", down="hadamard")
    basis = build_basis(rotation, llama.ADAPTER, CONFIG)
    assert basis.description == {
        "residual": "hadamard 12x4",
        "value": "dct 16",
        "down": "hadamard 20x4",
    }


def test_both_intermediate_sizes_of_a_mixture_are_described():
    config = changed(moe_intermediate_size=24)
    basis = build_basis(Rotation(down="hadamard"), llama.ADAPTER, config)
    assert basis.description == {"down": "hadamard 12x2, hadamard 20x4"}


def test_blocks_are_described_and_have_signs_of_their_size():
    rotation = Rotation(down="hadamard", down_block_size=8)
    basis = build_basis(rotation, llama.ADAPTER, changed(moe_intermediate_size=24))
    assert basis.description == {"down": "hadamard 8 in blocks"}
    assert len(basis.down_signs(80)) == len(basis.down_signs(24)) == 8
    whole = build_basis(Rotation(down="hadamard"), llama.ADAPTER, CONFIG)
    assert (len(whole.down_signs(80)), len(whole.down_signs(24))) == (80, 24)


def test_checksum_repeats_and_sees_seed_and_kind():
    def checksum(**kinds):
        return build_basis(Rotation(**kinds), llama.ADAPTER, CONFIG).checksum()

    cases = [
        {},
        {"residual": "hadamard"},
        {"residual": "hadamard", "seed": 1},
        {"residual": "dct"},
        {"value": "hadamard"},
        {"value": "hadamard", "seed": 1},
        {"down": "hadamard"},
        {"down": "hadamard", "seed": 1},
        {"down": "hadamard", "down_block_size": 8},
        {"down": "hadamard", "down_block_size": 16},
    ]
    assert len({checksum(**case) for case in cases}) == len(cases)
    assert checksum(residual="hadamard") == checksum(residual="hadamard")


@pytest.mark.parametrize(
    ("rotation", "sizes", "message"),
    [
        (Rotation(residual="hadamard"), {"hidden_size": 18}, "rotation.residual=hadamard: .*dct"),
        (Rotation(value="hadamard"), {"head_dim": 9}, "rotation.value=hadamard: .*order 9.*dct"),
        (Rotation(down="hadamard"), {"intermediate_size": 92}, "down=hadamard: .*down=none"),
        (
            Rotation(value="block_hadamard", block_size=32),
            {},
            "rotation.value=block_hadamard: blocks of 32 do not divide 16",
        ),
        (
            Rotation(down="hadamard", down_block_size=12),
            {},
            "rotation.down_block_size=12 does not divide the 80 features",
        ),
        (
            Rotation(down="hadamard", down_block_size=10),
            {},
            "rotation.down_block_size=10: no Hadamard matrix of order 10",
        ),
    ],
)
def test_missing_order_names_the_key_and_the_way_out(rotation, sizes, message):
    with pytest.raises(RotqError, match=message):
        build_basis(rotation, llama.ADAPTER, changed(**sizes))


def test_post_norm_family_refuses_the_residual_rotation_only():
    with pytest.raises(RotqError, match=r"rotation\.residual=dct is not possible for Gemma 3"):
        build_basis(Rotation(residual="dct"), gemma3.ADAPTER, CONFIG)
    build_basis(Rotation(value="dct", down="hadamard"), gemma3.ADAPTER, CONFIG)


def test_seeds_differ_by_use_and_fit_a_generator():
    seeds = {derive_seed(0, "down"), derive_seed(0, 0, 1), derive_seed(0, 1, 0), derive_seed(1, 0)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
