"""The gradient of rounding: the range's part, against rounding errors that are kept."""

import pytest
import torch

from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.rotations.orthogonal import Cayley

GRIDS = [ActivationGrid(bits=bits, symmetric=s) for bits in (3, 4) for s in (False, True)]


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradient_is_that_of_a_scale_with_its_rounding_errors_kept(grid, group_size):
    """y = x + s c with c = rint(x/s) - x/s constant, s the range over the number of steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    slope = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    given = x.clone().requires_grad_()
    fake_quantize(given, grid, group_size=group_size).backward(slope)

    def scale(x):
        groups = x.unflatten(-1, (-1, 24 if group_size == -1 else group_size))
        high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
        reach = 2 * groups.abs().amax(-1, keepdim=True) if grid.symmetric else high - low
        return (reach / (grid.q_max - grid.q_min)).expand_as(groups).flatten(-2)

    kept = ((fake_quantize(x, grid, group_size=group_size) - x) / scale(x)).detach()
    other = x.clone().requires_grad_()
    (other + scale(other) * kept).backward(slope)
    torch.testing.assert_close(given.grad, other.grad, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(given.grad, slope)


def test_tokens_of_one_sign_reach_to_zero():
    x = torch.tensor([[1.0, 2.0, 3.3]], requires_grad=True)
    fake_quantize(x, ActivationGrid(bits=4, symmetric=False)).backward(torch.ones(1, 3))
    # the low end is zero, not the smallest feature
    assert x.grad is not None
    assert x.grad[0, :2].tolist() == [1.0, 1.0]


def test_zeros_have_plain_gradients():
    x = torch.zeros(2, 4, requires_grad=True)
    for symmetric in (False, True):
        fake_quantize(x, ActivationGrid(bits=4, symmetric=symmetric)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 4), 2.0))


def test_a_rotation_that_shrinks_the_range_is_found():
    generator = torch.Generator().manual_seed(1)
    x_MK = torch.randn(512, 16, generator=generator) * torch.tensor([6.0] + [0.5] * 15)
    grid = ActivationGrid(bits=4, symmetric=False)
    rotation, errors = Cayley(torch.eye(16)), []
    optimizer = torch.optim.Adam([rotation.free], lr=0.05, eps=1e-15)
    for _ in range(30):
        optimizer.zero_grad()
        R = rotation.matrix()
        error = (fake_quantize(x_MK @ R, grid) @ R.T - x_MK).square().mean()
        error.backward()
        errors.append(error.item())
        optimizer.step()
    assert errors[29] < 0.7 * errors[0]
