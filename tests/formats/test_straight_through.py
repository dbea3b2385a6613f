"""Rounding values and gradients: the range's part against finite differences of fixed codes."""

import pytest
import torch

from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.formats.straight_through import round_through
from rotq.rotations.orthogonal import Cayley

GRIDS = [ActivationGrid(bits=bits, symmetric=s) for bits in (3, 4) for s in (False, True)]


def case(seed=0, shape=(5, 24)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_are_those_of_the_grid(grid):
    x, _ = case()
    assert torch.equal(round_through(x, grid), fake_quantize(x, grid))
    assert torch.equal(round_through(x, grid, group_size=8), fake_quantize(x, grid, group_size=8))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradient_is_that_of_a_scale_with_its_rounding_errors_kept(grid):
    """y = x + s c with c = (rint(x/s) - x/s) constant, s the range over the number of steps."""
    x, slope = case()
    given = x.clone().requires_grad_()
    round_through(given, grid).backward(slope)

    def scale(x):
        high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
        reach = 2 * x.abs().amax(-1, keepdim=True) if grid.symmetric else high - low
        return reach / (grid.q_max - grid.q_min)

    kept = ((fake_quantize(x, grid) - x) / scale(x)).detach()
    other = x.clone().requires_grad_()
    (other + scale(other) * kept).backward(slope)
    torch.testing.assert_close(given.grad, other.grad, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(given.grad, slope)


def test_tokens_of_one_sign_reach_to_zero():
    grid = ActivationGrid(bits=4, symmetric=False)
    x = torch.tensor([[1.0, 2.0, 3.3]], requires_grad=True)
    round_through(x, grid).backward(torch.ones(1, 3))
    # the low end is zero, not the smallest feature
    assert x.grad is not None
    assert x.grad[0, :2].tolist() == [1.0, 1.0]


def test_zeros_have_plain_gradients():
    x = torch.zeros(2, 4, requires_grad=True)
    for symmetric in (False, True):
        round_through(x, ActivationGrid(bits=4, symmetric=symmetric)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 4), 2.0))


def test_group_size_must_divide():
    with pytest.raises(ValueError, match="group size 7 does not divide 24"):
        round_through(case()[0], GRIDS[0], group_size=7)


def test_a_rotation_that_shrinks_the_range_is_found():
    """Plain straight-through gradients of a rotation are zero; these lead to a smaller error."""
    generator = torch.Generator().manual_seed(1)
    x_MK = torch.randn(512, 16, generator=generator) * torch.tensor([6.0] + [0.5] * 15)
    grid = ActivationGrid(bits=4, symmetric=False)
    errors = {}
    for rounding in (fake_quantize, round_through):
        rotation = Cayley(torch.eye(16))
        optimizer = torch.optim.Adam([rotation.free], lr=0.05, eps=1e-15)
        for step in range(30):
            optimizer.zero_grad()
            R = rotation.matrix()
            error = (rounding(x_MK @ R, grid) @ R.T - x_MK).square().mean()
            error.backward()
            if rounding is fake_quantize:
                assert rotation.free.grad.abs().max() < 1e-5
                break
            errors.setdefault(step, error.item())
            optimizer.step()
    assert errors[29] < 0.7 * errors[0]
