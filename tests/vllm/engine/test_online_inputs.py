"""Which inputs are gathered from all ranks before they are rotated and rounded."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import RowParallelLinear

from rotq.formats.activations import ActivationGrid
from rotq.layers.online_linear import prepare_input
from rotq.rotations.hadamard import random_signs
from rotq.vllm import quantization
from rotq.vllm.quantization import OnlineMethod

K, RANKS = 96, 2
GRID = ActivationGrid(bits=4, symmetric=False)


class Inner:
    """In place of a packed weight: gives back what it is to multiply."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return x


class Ranks:
    """Two ranks in one process; counts what they ask of each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, whole: Tensor) -> None:
        self.whole, self.rank, self.gathered = whole, 0, 0
        for name, function in (
            ("get_tensor_model_parallel_world_size", lambda: RANKS),
            ("get_tensor_model_parallel_rank", lambda: self.rank),
            ("tensor_model_parallel_all_gather", self._gather),
        ):
            monkeypatch.setattr(quantization, name, function)

    def _gather(self, x: Tensor) -> Tensor:
        assert torch.equal(x, self.whole.chunk(RANKS, dim=-1)[self.rank])
        self.gathered += 1
        return self.whole


@pytest.mark.parametrize(
    ("size", "grid", "gathered"),
    [(16, None, 0), (48, None, 0), (32, None, 2), (K, None, 2), (16, GRID, 2), (None, GRID, 2)],
    ids=str,
)
def test_ranks_compute_what_one_does(
    size: int | None, grid: ActivationGrid | None, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer: Any = nn.Module.__new__(RowParallelLinear)
    nn.Module.__init__(layer)
    layer.input_size = K
    layer.input_signs = None if size is None else random_signs(size, 1)
    method, ranks = OnlineMethod(Inner(), size, grid), Ranks(monkeypatch, x)
    found = []
    for ranks.rank, share in enumerate(x.chunk(RANKS, dim=-1)):
        found.append(method.apply(layer, share))
    expected = prepare_input(x, layer.input_signs, grid)
    torch.testing.assert_close(torch.cat(found, dim=-1), expected, rtol=0, atol=1e-12)
    assert ranks.gathered == gathered
    # a layer that is whole on each rank asks nobody
    torch.testing.assert_close(method.apply(layer, x), expected, rtol=0, atol=1e-12)
    assert ranks.gathered == gathered
