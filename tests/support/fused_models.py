"""A model with a basis fused, run block by block in fp64."""

import torch

from rotq.fusion.fuse import fuse_block, fuse_outer
from rotq.models.exact import InDouble


def fused_logits(skeleton, source, ids_BT, basis):
    """Logits with ``basis`` fused, norms exact, fp64."""
    outer = skeleton.load_outer(source, dtype=torch.float64)
    outer = fuse_outer(outer, skeleton.adapter, basis)
    hidden_BTD = skeleton.embed(outer, ids_BT)
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index, source, device="cpu", dtype=torch.float64)
        fuse_block(block, skeleton.adapter, basis, index)
        with InDouble():
            hidden_BTD = block(hidden_BTD, **skeleton.block_kwargs(index, hidden_BTD))
    with InDouble():
        return skeleton.logits(outer, hidden_BTD)
