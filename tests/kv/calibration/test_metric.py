"""The geometric mean, and that it makes errors cost least."""

import torch
from torch import Tensor

from rotq.kv.calibration.metric import balanced_metric, symmetric_power
from rotq.numerics import inverse


def positive(seed: int, heads: int = 2, width: int = 8, spread: float = 3.0) -> Tensor:
    """Random positive definite matrices with a wide spectrum, fp64."""
    generator = torch.Generator().manual_seed(seed)
    value_HD = torch.exp(spread * torch.rand(heads, width, generator=generator).double())
    basis = torch.linalg.qr(torch.randn(heads, width, width, generator=generator).double()).Q
    return (basis * value_HD[:, None]) @ basis.mT


def cost(P_HDD: Tensor, C_HDD: Tensor, M_HDD: Tensor) -> Tensor:
    """tr(P C) tr(M P^-1)."""

    def trace(X_HDD: Tensor) -> Tensor:
        return X_HDD.diagonal(dim1=-2, dim2=-1).sum(-1)

    return trace(P_HDD @ C_HDD) * trace(M_HDD @ inverse(P_HDD))


def test_symmetric_power() -> None:
    M_HDD = positive(0)
    root_HDD = symmetric_power(M_HDD, 0.5)
    torch.testing.assert_close(root_HDD @ root_HDD, M_HDD)
    torch.testing.assert_close(symmetric_power(M_HDD, -1.0), inverse(M_HDD))


def test_power_of_a_singular_matrix_is_finite() -> None:
    M_HDD = torch.diag_embed(torch.tensor([[4.0, 0.0]]))
    assert torch.isfinite(symmetric_power(M_HDD, -0.5)).all()


def test_costs_least() -> None:
    C_HDD, M_HDD = positive(0), positive(1)
    best_H = cost(balanced_metric(C_HDD, M_HDD, alpha=0.5, beta=1.0), C_HDD, M_HDD)
    rivals = [
        torch.eye(8).double().expand(2, -1, -1),
        symmetric_power(M_HDD, 0.5),
        inverse(C_HDD),
        M_HDD,
        balanced_metric(C_HDD, M_HDD, alpha=0.2, beta=1.0),
        balanced_metric(C_HDD, M_HDD, alpha=0.8, beta=1.0),
        *(balanced_metric(positive(seed), M_HDD, alpha=0.5, beta=1.0) for seed in range(2, 6)),
    ]
    for rival_HDD in rivals:
        assert (cost(rival_HDD, C_HDD, M_HDD) > 1.02 * best_H).all()


def test_without_the_source_it_is_the_metric_s_power() -> None:
    M_HDD = positive(3)
    found = balanced_metric(positive(4), M_HDD, alpha=0.5, beta=0.0)
    expected = symmetric_power(M_HDD, 0.5)
    expected = expected / expected.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    # a share of the identity is mixed into M
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_alpha_zero_whitens() -> None:
    C_HDD = positive(5)
    P_HDD = balanced_metric(C_HDD, positive(6), alpha=0.0, beta=1.0)
    spectrum_HD = torch.linalg.eigvals(P_HDD @ C_HDD).real
    flat = spectrum_HD.amax(-1) / spectrum_HD.amin(-1)
    raw_HD = torch.linalg.eigvalsh(C_HDD)
    assert (flat < 0.3 * raw_HD[:, -1] / raw_HD[:, 0]).all()


def test_scale_does_not_matter() -> None:
    C_HDD, M_HDD = positive(7), positive(8)
    found = balanced_metric(100 * C_HDD, 0.01 * M_HDD, alpha=0.5, beta=1.0)
    torch.testing.assert_close(found, balanced_metric(C_HDD, M_HDD, alpha=0.5, beta=1.0))
    mean_H = found.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(mean_H, torch.ones(2).double())
