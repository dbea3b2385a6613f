"""A basis by the names of its tensors, and its checksum."""

from dataclasses import replace

import torch

from rotq.rotations.basis import SCALINGS, Basis, Scales


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5


def layer_scales(seed=0):
    shapes = {"qkv": (48,), "gate_up": (48,), "value": (2, 16), "query_key": (2, 16), "up": (4, 80)}
    return Scales.of({name: numbers(*shapes[name], seed=seed) for name in SCALINGS})


def full_basis():
    return Basis(
        residual_DD=numbers(48, 48),
        value=(numbers(2, 16, 16), numbers(2, 16, 16, seed=1)),
        down="hadamard",
        down_block_size=16,
        down_seed=7,
        scales=(layer_scales(), layer_scales(1)),
    )


def test_tensors_come_back_by_name():
    basis = full_basis()
    named = basis.tensors()
    assert len(named) == 3 + 2 * len(SCALINGS)
    again = Basis(down="hadamard", down_block_size=16, down_seed=7).with_tensors(named)
    assert again.tensors().keys() == named.keys()
    assert all(again.tensors()[name] is tensor for name, tensor in named.items())
    assert (again.down, again.down_seed) == (basis.down, basis.down_seed)
    assert again.checksum() == basis.checksum()


def test_without_its_tensors_a_basis_keeps_what_is_online():
    bare = full_basis().with_tensors({})
    assert (bare.residual_DD, bare.value, bare.scales) == (None, None, None)
    assert not bare.is_identity
    assert replace(bare, down=None).is_identity


def test_the_checksum_knows_scales():
    first, second = (Basis(scales=(layer_scales(seed),)) for seed in (0, 1))
    assert len({Basis().checksum(), first.checksum(), second.checksum()}) == 3
