"""Blocks are copied from their structure, whatever a run has left in it."""

import copy

import pytest
import torch
from torch import nn

from rotq.job import parts


def test_states_noted_in_a_run_with_gradients_are_copied_without_its_graph() -> None:
    block = nn.Sequential(nn.Linear(2, 2))
    block[0].states = block[0](torch.ones(1, 2))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(block)
    copied = copy.deepcopy(block, parts._noted(block))
    assert torch.equal(copied[0].states, block[0].states)  # type: ignore[arg-type]
    assert copied[0].states.grad_fn is None
    assert copied[0].weight is not block[0].weight
