"""Captured inputs are what the layers read, and nothing runs after the last of them."""

import torch
from torch import nn

from rotq.calibration.capture import capture_inputs, run_block
from rotq.calibration.streams import Stream
from rotq.layers import RotatedLinear
from rotq.rotations.hadamard import random_signs


class Block(nn.Module):
    """Two linears in a row; remembers whether its end was reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.ended = False

    def forward(self, x: torch.Tensor, scale: float) -> tuple[torch.Tensor]:
        y = self.second(self.first(x * scale).relu())
        self.ended = True
        return (y,)


def test_inputs_are_flattened_and_the_rest_is_skipped():
    block, hidden_BTD = Block(), torch.randn(2, 3, 4)
    seen, output = capture_inputs(block, ["first"], hidden_BTD, {"scale": 2.0})
    torch.testing.assert_close(seen["first"], hidden_BTD.view(6, 4) * 2)
    assert output is None
    assert not block.ended
    seen, output = capture_inputs(
        block, ["first", "second"], hidden_BTD, {"scale": 2.0}, to_the_end=True
    )
    torch.testing.assert_close(seen["second"], block.first(hidden_BTD.view(6, 4) * 2).relu())
    torch.testing.assert_close(output, run_block(block, hidden_BTD, {"scale": 2.0}))
    assert block.ended


def test_no_hook_stays_behind():
    block = Block()
    capture_inputs(block, ["first", "second"], torch.randn(1, 2, 4), {"scale": 1.0})
    assert not block.first._forward_pre_hooks
    assert not block.second._forward_pre_hooks


def test_rotated_layers_are_seen_behind_their_rotation():
    block, hidden_BTD = Block(), torch.randn(1, 5, 4)
    block.second = RotatedLinear.wrap(block.second, random_signs(8, seed=3))
    seen, _ = capture_inputs(block, ["second"], hidden_BTD, {"scale": 1.0})
    inner = block.first(hidden_BTD.view(5, 4)).relu()
    assert not torch.allclose(seen["second"], inner)
    torch.testing.assert_close(seen["second"].norm(dim=-1), inner.norm(dim=-1))
    torch.testing.assert_close(
        seen["second"] @ block.second.weight.T + block.second.bias, block.second(inner)
    )


def test_streams_in_memory_and_in_a_file_hold_the_same(tmp_path):
    shapes = [torch.Size((2, 3, 4)), torch.Size((1, 3, 4))]
    for dtype in (torch.float32, torch.bfloat16):
        memory = Stream.empty(shapes, dtype, None)
        file = Stream.empty(shapes, dtype, tmp_path / "stream")
        for batch, shape in enumerate(shapes):
            hidden = torch.randn(shape).to(dtype)
            memory[batch] = hidden
            file[batch] = hidden
        assert len(file) == 2
        for kept, stored in zip(memory, file, strict=True):
            assert stored.dtype == dtype
            assert torch.equal(kept, stored)
