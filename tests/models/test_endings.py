"""Attention and MLP of every family, ended with what their last layer was given before."""

import pytest
import torch
from numbered_words import write_model
from tiny_models import CONFIGS

from rotq.calibration.capture import capture_inputs, replayed, run_block
from rotq.checkpoint.opening import open_source
from rotq.models.skeleton import Skeleton


@pytest.mark.parametrize("name", CONFIGS)
def test_the_block_comes_to_the_same(name, tmp_path):
    source = open_source(write_model(name, tmp_path / "model"))
    skeleton = Skeleton.open(source)
    source, found = source.read_for(skeleton), 0
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index, source, device="cpu", dtype=torch.float32)
        hidden_BTD = torch.randn(2, 6, skeleton.config.hidden_size)
        kwargs = skeleton.block_kwargs(index, hidden_BTD)
        expected = run_block(block, hidden_BTD, kwargs)
        for ending in (skeleton.adapter.attention_ending(), skeleton.adapter.mlp_ending(block)):
            if ending is None:
                continue
            seen, _ = capture_inputs(block, [ending.projection], hidden_BTD, kwargs)
            given_BTK = seen[ending.projection].unflatten(0, (2, 6))
            with replayed(block, ending, given_BTK):
                assert torch.equal(run_block(block, hidden_BTD, kwargs), expected), ending.path
            found += 1
    assert found
