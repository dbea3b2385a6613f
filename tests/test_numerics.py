"""Inverses, also where torch's own are wrong."""

import pytest
import torch

from rotq.numerics import inverse


@pytest.mark.parametrize("K", [1, 7, 64, 256, 400])
def test_inverse(K: int) -> None:
    generator = torch.Generator().manual_seed(K)
    matrix = torch.randn(2, K, K, generator=generator, dtype=torch.float64)
    matrix += 2 * K**0.5 * torch.eye(K)
    eye = torch.eye(K, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(matrix @ inverse(matrix), eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse(matrix[0]), inverse(matrix)[0])
