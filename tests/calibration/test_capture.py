"""Captured inputs are what the layers read, and nothing runs after the last of them."""

import pytest
import torch
from torch import nn

from rotq.calibration.capture import Ending, capture_inputs, replayed, run_block
from rotq.calibration.streams import BatchStore
from rotq.formats.activations import ActivationGrid
from rotq.layers.online_linear import OnlineLinear
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
    seen, output_BTD = capture_inputs(block, ["first"], hidden_BTD, {"scale": 2.0})
    torch.testing.assert_close(seen["first"], hidden_BTD.view(6, 4) * 2)
    assert output_BTD is None
    seen, _ = capture_inputs(block, ["first", "second"], hidden_BTD, {"scale": 2.0})
    torch.testing.assert_close(seen["second"], block.first(hidden_BTD.view(6, 4) * 2).relu())
    assert not block.ended
    _, output_BTD = capture_inputs(block, ["first"], hidden_BTD, {"scale": 2.0}, to_the_end=True)
    assert block.ended
    assert torch.equal(output_BTD, run_block(block, hidden_BTD, {"scale": 2.0}))


def test_a_layer_that_is_never_called_is_an_error():
    block = Block()
    block.unused = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="unused"):
        capture_inputs(block, ["unused"], torch.randn(1, 2, 4), {"scale": 1.0})


class Attended(nn.Module):
    """A block around one module that returns a pair, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Block()
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x + self.attention(x, 1.0)[0])


def test_remembered_attention_gives_the_same_block_output():
    block, hidden_BTD = Attended(), torch.randn(2, 3, 4)
    seen, _ = capture_inputs(block, ["attention.second"], hidden_BTD, {})
    expected = run_block(block, hidden_BTD, {})
    block.attention.ended = False
    remembered = seen["attention.second"].unflatten(0, (2, 3))
    ending = Ending(path="attention", projection="attention.second", in_tuple=True)
    with replayed(block, ending, remembered):
        assert torch.equal(run_block(block, hidden_BTD, {}), expected)
        # the projection is run on what was remembered, so its own input is seen again
        again, _ = capture_inputs(block, ["attention.second"], hidden_BTD, {})
        assert torch.equal(again["attention.second"], seen["attention.second"])
    assert not block.attention.ended
    run_block(block, hidden_BTD, {})
    assert block.attention.ended


def test_no_hook_stays_behind():
    block = Block()
    capture_inputs(block, ["first", "second"], torch.randn(1, 2, 4), {"scale": 1.0})
    assert not block.first._forward_pre_hooks
    assert not block.second._forward_pre_hooks


def test_online_layers_are_seen_before_they_rotate_and_round():
    block, hidden_BTD = Block(), torch.randn(1, 5, 4)
    grid = ActivationGrid(bits=2, symmetric=False)
    block.second = OnlineLinear.wrap(block.second, signs_R=random_signs(8, 3), input_grid=grid)
    seen, _ = capture_inputs(block, ["second"], hidden_BTD, {"scale": 1.0})
    torch.testing.assert_close(seen["second"], block.first(hidden_BTD.view(5, 4)).relu())


def test_batches_in_memory_and_in_a_file_hold_the_same(tmp_path):
    shapes = [torch.Size((2, 3, 4)), torch.Size((1, 3, 4))]
    for dtype in (torch.float32, torch.bfloat16):
        memory = BatchStore.empty(shapes, dtype, None)
        file = BatchStore.empty(shapes, dtype, tmp_path / "batches")
        for batch, shape in enumerate(shapes):
            hidden = torch.randn(shape).to(dtype)
            memory[batch] = hidden
            file[batch] = hidden
        assert len(file) == 2
        for kept, stored in zip(memory, file, strict=True):
            assert stored.dtype == dtype
            assert torch.equal(kept, stored)
