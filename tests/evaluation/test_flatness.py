"""Flatness figures against their definitions, and what the meter makes of two models."""

from __future__ import annotations

import copy
import math

import pytest
import scipy.stats
import torch
from tiny_models import MemorySource, random_ids, tiny_model

from rotq.evaluation.flatness import FlatnessMeter, chi_square_99, flatness
from rotq.fusion.draw import build_basis
from rotq.fusion.fuse import fuse_block, fuse_outer
from rotq.models.attention.online import use_online_attention
from rotq.models.skeleton import Skeleton
from rotq.recipe import Rotation
from rotq.rotations.basis import Basis
from rotq.rotations.hadamard import orthogonal


def normal(M: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed))


def test_per_token_figures_written_by_hand() -> None:
    # rms 1 and 2.5; fourth moments 1 and (81 + 256) / 2 over 12.5^2
    found = flatness(torch.tensor([[1.0, -1.0], [3.0, 4.0]]))
    assert found.max_over_rms == pytest.approx((1 + 4 / 12.5**0.5) / 2)
    assert found.kurtosis == pytest.approx((1 + (81 + 256) / 2 / 12.5**2) / 2)
    assert found.spread == pytest.approx(6.25 / ((1 + 6.25) / 2))
    assert found.log_qsur is None


def test_gaussian_tokens_have_kurtosis_three() -> None:
    assert flatness(normal(2000, 400)).kurtosis == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("d", [1, 2, 8, 64, 1536, 11008])
def test_quantile(d: int) -> None:
    assert chi_square_99(d) == pytest.approx(scipy.stats.chi2.ppf(0.99, d), rel=0.01)


def test_qsur_of_a_sphere_is_the_ball_in_its_cube() -> None:
    d = 3
    x = normal(20_000, d, seed=1)
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(x.T.cov(correction=0))
    x = torch.linalg.solve_triangular(factor, x.T, upper=False).T
    ball = math.log(math.pi * 4 / 3 / 2**d) / d
    assert flatness(x).log_qsur == pytest.approx(ball, abs=1e-3)


def test_qsur_of_an_ellipsoid_off_the_origin() -> None:
    """Volume of the ellipsoid over that of the cube around its widest axis, term by term."""
    x = normal(5000, 4, seed=2) @ torch.diag(torch.tensor([1.0, 2.0, 3.0, 8.0])) + 5
    chi2 = chi_square_99(4)
    sigma = x.double().T.cov(correction=0)
    axes = (chi2 * torch.linalg.eigvalsh(sigma)).sqrt()
    volume = math.pi**2 / 2 * axes.prod().item()
    extent = (x.double().mean(0).abs() + (chi2 * sigma.diagonal()).sqrt()).max().item()
    expected = math.log(volume / (2 * extent) ** 4) / 4
    assert flatness(x).log_qsur == pytest.approx(expected, abs=1e-4)


def regularized_log_det(x: torch.Tensor) -> float:
    sigma = x.double().T.cov(correction=0)
    eigenvalues = torch.linalg.eigvalsh(sigma) + 1e-6 * sigma.diagonal().mean()
    return eigenvalues.log().sum().item()


@pytest.mark.parametrize("kind", ["a common part", "dependent features", "dead feature"])
def test_log_det_of_hard_samples(kind: str) -> None:
    """The formula with eigenvalues in fp64; fp32 sums have no Cholesky factor on the first."""
    x = normal(900, 512, seed=4)
    if kind == "a common part":
        x = x * 1e-4 + x[:, :1] * torch.linspace(1, 30, 512)
    elif kind == "dependent features":
        x[:, 256:] = x[:, :256]
    else:
        x[:, 7] = 0
    found = flatness(x).log_qsur
    assert found is not None
    mean = x.double().mean(0)
    chi2, d = chi_square_99(512), 512
    extent = (mean.abs() + (chi2 * x.double().var(0, correction=0)).sqrt()).max().item()
    ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    expected = 0.5 * (math.log(chi2) + regularized_log_det(x) / d) + ball / d
    assert found == pytest.approx(expected - math.log(2 * extent), abs=5e-3)


def test_qsur_of_values_that_are_not_finite_is_unknown() -> None:
    x = normal(9, 4)
    x[0, 0] = math.inf
    assert flatness(x).log_qsur is None


def test_a_rotation_changes_qsur_by_the_spread_alone() -> None:
    x = normal(4000, 16, seed=3) * torch.linspace(0.2, 5, 16)
    before, after = flatness(x), flatness(x @ orthogonal("hadamard", 16, 0).float())
    assert after.spread < 1.2 < 2 < before.spread
    assert before.log_qsur is not None
    assert after.log_qsur is not None
    gained = after.log_qsur - before.log_qsur
    assert gained == pytest.approx(0.5 * math.log(before.spread / after.spread), abs=0.03)


@pytest.mark.parametrize("family", ["llama-biases", "gemma3", "qwen3-moe-mixed"])
def test_the_meter_follows_both_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees in every block what a hook in the whole model sees."""
    monkeypatch.setattr("rotq.evaluation.flatness.SAMPLED_TOKENS", 40)
    model = tiny_model(family)
    skeleton, source = Skeleton.open(MemorySource(model)), MemorySource(model)
    rotation = Rotation(
        residual="none" if family == "gemma3" else "hadamard", value="hadamard", down="hadamard"
    )
    basis = build_basis(rotation, skeleton.adapter, skeleton.config)
    ids_BT = random_ids(6, 16)
    meter = FlatnessMeter(
        skeleton, ids_BT.split(1), device=torch.device("cpu"), precision="highest"
    )
    assert torch.equal(torch.cat(meter.sample), ids_BT[:3])
    outer = skeleton.load_outer(source, dtype=torch.float64)
    meter.start(outer)
    meter.start_transformed(fuse_outer(outer, skeleton.adapter, basis))
    inputs = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, index=index: inputs.update({index: args[0].flatten(0, 1)})
        )
    model(ids_BT[:3], use_cache=False)
    for index in range(skeleton.num_blocks):
        plain = skeleton.load_block(index, source, device="cpu", dtype=torch.float64)
        turned = copy.deepcopy(plain)
        fuse_block(turned, skeleton.adapter, basis, index)
        found = meter.measure(index, plain, turned)
        assert list(found) == ["qkv", "o", "gate_up", "down"]
        expected = flatness(inputs[index])
        assert found["o"].before.max_over_rms == pytest.approx(expected.max_over_rms, rel=1e-5)
        assert found["o"].before.kurtosis == pytest.approx(expected.kurtosis, rel=1e-5)
        # R4 is seen: the online rotation is part of what the weight multiplies
        assert found["down"].after.spread < found["down"].before.spread


def test_the_identity_changes_nothing() -> None:
    model = tiny_model("qwen2")
    skeleton, source = Skeleton.open(MemorySource(model)), MemorySource(model)
    use_online_attention(skeleton.model)
    meter = FlatnessMeter(
        skeleton,
        random_ids(2, 16).split(1),
        device=torch.device("cpu"),
        precision="highest",
    )
    outer = skeleton.load_outer(source, dtype=torch.float64)
    meter.start(outer)
    meter.start_transformed(fuse_outer(outer, skeleton.adapter, Basis()))
    block = skeleton.load_block(0, source, device="cpu", dtype=torch.float64)
    found = meter.measure(0, block, block)
    assert all(change.before == change.after for change in found.values())
