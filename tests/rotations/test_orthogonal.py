"""Matrices start where they are told, stay orthogonal, and turn by the angle they say."""

import pytest
import torch

from rotq.rotations.hadamard import orthogonal
from rotq.rotations.orthogonal import Cayley, polish, turned


def moved(n, size, seed=0):
    """The start, and a matrix of order n after one step of random signs."""
    start = orthogonal("hadamard", n, 1)
    one = Cayley(start)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, one.free.shape, generator=generator) * 2.0 - 1
    with torch.no_grad():
        one.free.add_(size * signs)
    return start, one.matrix().detach()


@pytest.mark.parametrize("kind", ["hadamard", "dct"])
def test_starts_at_the_basis(kind):
    start = torch.stack([orthogonal(kind, 12, seed) for seed in (0, 1)])
    matrix = Cayley(start).matrix()
    torch.testing.assert_close(matrix, start.float(), rtol=0, atol=2e-6)


def test_stays_orthogonal():
    _, R_nn = moved(48, 1.0)
    assert (R_nn.T @ R_nn - torch.eye(48)).abs().max() < 1e-5
    exact_nn = polish(R_nn)
    one_nn = torch.eye(48, dtype=torch.float64)
    assert (exact_nn.T @ exact_nn - one_nn).abs().max() < 1e-12
    assert (exact_nn - R_nn).abs().max() < 1e-5


@pytest.mark.parametrize("n", [16, 144])
def test_a_step_turns_by_its_size_whatever_the_order(n):
    start, R_nn = moved(n, 0.02)
    assert turned(start, R_nn) == pytest.approx(0.02, rel=0.4)


def test_gradient_descends():
    """It can turn its start towards a basis that makes a vector sparse."""
    start = orthogonal("hadamard", 16, 0)
    one = Cayley(start)
    generator = torch.Generator().manual_seed(3)
    x_Mn = torch.randn(8, 16, generator=generator) * torch.linspace(0.1, 3, 16)
    optimizer = torch.optim.Adam([one.free], lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (x_Mn @ one.matrix()).pow(4).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_cayley_is_its_formula():
    start, R_nn = moved(6 * 2, 0.7, seed=5)
    generator = torch.Generator().manual_seed(5)
    P_nn = 0.7 * (torch.randint(0, 2, (12, 12), generator=generator) * 2.0 - 1).double()
    half = (P_nn - P_nn.T) / (4 * 12**0.5)
    one = torch.eye(12, dtype=torch.float64)
    # R (I - A/2) = R0 (I + A/2), without an inverse
    torch.testing.assert_close(
        R_nn.double() @ (one - half), start @ (one + half), rtol=0, atol=1e-5
    )


def test_polish_refuses_what_is_not_orthogonal():
    for matrix in (3 * torch.eye(4), torch.full((4, 4), float("nan"))):
        with pytest.raises(ValueError, match="not close enough to an orthogonal one"):
            polish(matrix)


def test_turned_is_the_angle():
    angle = torch.tensor(0.3, dtype=torch.float64)
    R = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    assert turned(torch.eye(2), R) == pytest.approx(0.3, rel=1e-6)
