"""LayerNorm: the basis that keeps it, and each folding rule on its own."""

import pytest
import torch
from random_rotations import random_orthogonal
from tiny_models import LAYER_NORM, MemorySource, tiny_model
from torch import nn

from rotq.errors import RotqError
from rotq.fusion.draw import build_basis
from rotq.fusion.fuse import fuse_block
from rotq.fusion.layernorm import fold_final_bias, fold_layer_norm, leave_ones_alone
from rotq.models.skeleton import Skeleton
from rotq.recipe import Rotation
from rotq.rotations.hadamard import orthogonal

D = 48


def random_norm(*, bias: bool = True) -> nn.LayerNorm:
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(D, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(D, generator=generator, dtype=torch.float64) + 0.5)
        norm.bias.copy_(torch.randn(D, generator=generator, dtype=torch.float64))
    return norm.requires_grad_(False)


def random_x() -> torch.Tensor:
    return torch.randn(5, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def basis() -> torch.Tensor:
    return leave_ones_alone(random_orthogonal(D, 3))


@pytest.mark.parametrize("kind", ["hadamard", "block_hadamard", "dct", "random"])
@pytest.mark.parametrize("n", [48, 320, 480])
def test_ones_are_left_alone_by_an_orthogonal_matrix(kind, n):
    drawn_DD = random_orthogonal(n, 5) if kind == "random" else orthogonal(kind, n, 5)
    R_DD = leave_ones_alone(drawn_DD)
    ones_D = torch.ones(n, dtype=torch.float64)
    assert (R_DD @ R_DD.T - torch.eye(n)).abs().max() < 1e-12
    assert (ones_D @ R_DD - 1).abs().max() < 1e-12
    assert (R_DD @ ones_D - 1).abs().max() < 1e-12


def test_it_spreads_as_a_hadamard_matrix_does():
    # but for the row of ones that a Sylvester matrix has, which the reflection changes most
    R_DD = leave_ones_alone(orthogonal("hadamard", 640, 0))
    assert R_DD[1:].abs().max() < 2 * 640**-0.5
    assert R_DD.abs().max() < 4 * 640**-0.5


def test_a_matrix_that_keeps_ones_stays_as_it_is():
    R_DD = basis()
    torch.testing.assert_close(leave_ones_alone(R_DD), R_DD, rtol=0, atol=1e-12)
    eye_DD = torch.eye(D, dtype=torch.float64)
    assert torch.equal(leave_ones_alone(eye_DD), eye_DD)


def test_layer_norm_commutes_with_it_and_with_no_other():
    norm, x_ND = nn.LayerNorm(D, dtype=torch.float64), random_x()
    kept, other = basis(), random_orthogonal(D, 3)
    assert (norm(x_ND @ kept) - norm(x_ND) @ kept).abs().max() < 1e-12
    assert (norm(x_ND @ other) - norm(x_ND) @ other).abs().max() > 1e-2


@pytest.mark.parametrize("reader_bias", [True, False])
def test_folding_keeps_what_readers_compute(reader_bias):
    norm, x_ND, R_DD = random_norm(), random_x(), basis()
    readers = [nn.Linear(D, 7, bias=reader_bias, dtype=torch.float64) for _ in range(2)]
    before = [reader(norm(x_ND)) for reader in readers]
    with torch.no_grad():
        fold_layer_norm(norm, readers)
        norm.bias.copy_(norm.bias @ R_DD)
        for reader in readers:
            reader.weight.copy_(reader.weight @ R_DD)
    after = [reader(norm(x_ND @ R_DD)) for reader in readers]
    for one, two in zip(before, after, strict=True):
        assert (one - two).abs().max() < 1e-12
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert bool(norm.bias.any()) is not reader_bias


def test_a_zero_gain_cannot_keep_what_the_norm_adds():
    norm = random_norm()
    norm.weight[3] = 0
    with pytest.raises(RotqError, match=r"gain of zero.*rotation\.residual=none"):
        fold_layer_norm(norm, [nn.Linear(D, 7, bias=False, dtype=torch.float64)])
    # with a bias to take it, a zero gain is as good as any
    fold_layer_norm(norm, [nn.Linear(D, 7, dtype=torch.float64).requires_grad_(False)])


def test_final_norm_moves_into_a_bias_or_stays():
    norm, R_DD = random_norm(), basis()
    weight_VD = torch.randn(9, D, dtype=torch.float64)
    outer = {"n.weight": norm.weight, "n.bias": norm.bias, "r.weight": weight_VD}
    assert (fold_final_bias(outer, "n", "r", R_DD)["n.bias"]).abs().max() > 0
    folded = fold_final_bias(outer | {"r.bias": torch.ones(9).double()}, "n", "r", R_DD)
    assert not folded["n.bias"].any()
    torch.testing.assert_close(folded["r.bias"], 1 + weight_VD @ norm.bias)
    assert fold_final_bias({"n.weight": norm.weight}, "n", "r", R_DD) == {}


@pytest.mark.parametrize("name", LAYER_NORM)
def test_families_get_a_basis_that_keeps_ones_and_norms_without_gain(name):
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    found = build_basis(Rotation(residual="hadamard"), skeleton.adapter, skeleton.config)
    assert (found.residual_DD.sum(0) - 1).abs().max() < 1e-12
    block = skeleton.load_block(0, source, device="cpu", dtype=torch.float64)
    fuse_block(block, skeleton.adapter, found, 0)
    for path in (skeleton.adapter.attention_norm, skeleton.adapter.mlp_norm):
        norm = block.get_submodule(path)
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert bool(norm.bias.any()) is (name == "esmc")


def test_what_cannot_be_rotated_says_why():
    config = tiny_model("bert").config
    adapter = Skeleton.open(MemorySource(tiny_model("bert"))).adapter
    with pytest.raises(RotqError, match=r"BERT models .*: a norm lies between"):
        build_basis(Rotation(residual="hadamard"), adapter, config)
    esm = Skeleton.open(MemorySource(tiny_model("esm")))
    esm.config.emb_layer_norm_before = True
    with pytest.raises(RotqError, match=r"needs emb_layer_norm_before=False, the model has True"):
        build_basis(Rotation(residual="hadamard"), esm.adapter, esm.config)
