"""Inputs rotated and rounded at run time, against matrices and plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rotq.formats.activations import ActivationGrid
from rotq.layers.online_linear import OnlineLinear, rotate_input
from rotq.rotations.hadamard import hadamard, random_signs


def random_input(K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_fewer_signs_than_features_rotate_runs_of_them() -> None:
    signs_R = random_signs(12, 3)
    x = random_input(48, torch.float64)
    runs = [rotate_input(run, signs_R) for run in x.split(12, dim=-1)]
    # products of other shapes sum in another order on some processors
    torch.testing.assert_close(
        rotate_input(x, signs_R), torch.cat(runs, dim=-1), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("K", [16, 40, 48])
def test_rotation_is_orthogonal_and_matches_the_matrix(K: int) -> None:
    signs_R = random_signs(K, 3)
    x = random_input(K, torch.float64)
    expected = (x * signs_R) @ hadamard(K).double() * K**-0.5
    torch.testing.assert_close(rotate_input(x, signs_R), expected, rtol=0, atol=1e-12)
    assert rotate_input(x.bfloat16(), signs_R).dtype == torch.bfloat16


def test_rotated_weight_and_input_cancel() -> None:
    linear = nn.Linear(48, 20).double()
    signs_R = random_signs(48, 0)
    x = random_input(48, torch.float64)
    expected = linear(x)
    linear.weight.data = rotate_input(linear.weight.data, signs_R)
    rotated = OnlineLinear.wrap(linear, signs_R=signs_R)
    assert rotated.weight is linear.weight
    assert rotated.bias is linear.bias
    torch.testing.assert_close(rotated(x), expected, rtol=0, atol=1e-12)
    assert isinstance(rotated, nn.Linear)
    assert rotated.input_signs.dtype == torch.int8
    # a cast of the model leaves the stored signs alone
    narrow = copy.deepcopy(rotated).bfloat16().double()
    torch.testing.assert_close(narrow(x), expected, rtol=0.05, atol=0.05)
    assert torch.equal(narrow.prepare_input(x), rotated.prepare_input(x))
    assert not torch.equal(linear(x), expected)


@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
def test_online_layers_compile_without_a_break() -> None:
    linear = nn.Linear(48, 8).requires_grad_(False)
    grid = ActivationGrid(bits=4, symmetric=False)
    layer = OnlineLinear.wrap(linear, signs_R=random_signs(48, 0), input_grid=grid)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(random_input(48)), layer(random_input(48)))
