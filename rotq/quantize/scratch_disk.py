"""Bytes that a job's folder takes beside what it will publish: activations that are kept there.

Shape suffixes: K in features.
"""

from __future__ import annotations

import torch

from rotq.job.plan import Plan
from rotq.models.skeleton import Skeleton
from rotq.quantize.collected import waits_on_disk
from rotq.recipe import Recipe


def stream_bytes(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> int:
    """Hidden states and ends of attention of all calibration windows, wherever they are."""
    attention = skeleton.adapter.attention_ending()
    attended_K = 0 if attention is None else attention.features(skeleton.blocks[0])
    features = int(skeleton.config.hidden_size) + attended_K
    return _activations(recipe, dtype, features) * _streams(recipe)


def scratch_bytes(skeleton: Skeleton, recipe: Recipe, plan: Plan, dtype: torch.dtype) -> int:
    """Activations on the disk: of a block at a time, and of all where gradients are taken."""
    streams = 0
    if recipe.calibration.offload and recipe.needs_data:
        streams = stream_bytes(skeleton, recipe, dtype) + _mlp_bytes(skeleton, recipe, dtype)
    return streams + _waiting_bytes(recipe, plan, dtype) + _gradient_bytes(skeleton, recipe, dtype)


def _mlp_bytes(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> int:
    """Ends of the MLP, which the quantized stream keeps on the disk."""
    block = skeleton.blocks[0]
    mlp = skeleton.adapter.mlp_ending(block)
    return 0 if mlp is None else _activations(recipe, dtype, mlp.features(block))


def _waiting_bytes(recipe: Recipe, plan: Plan, dtype: torch.dtype) -> int:
    """Inputs of the widest layer, if its Hessian is too large to be made while the block is run."""
    if not recipe.needs_data:
        return 0
    widest_K = max((plan.shapes[name][1] for name in plan.grids), default=0)
    waiting_K = widest_K if waits_on_disk(recipe, widest_K) else 0
    return _activations(recipe, dtype, waiting_K) * _streams(recipe)


def _gradient_bytes(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> int:
    """Hidden states between all blocks, where gradients weigh tokens or layers."""
    if not recipe.needs_gradients:
        return 0
    states = _activations(recipe, dtype, int(skeleton.config.hidden_size))
    return (skeleton.num_blocks + 1) * states


def _activations(recipe: Recipe, dtype: torch.dtype, features: int) -> int:
    """Of all calibration tokens, so many numbers each."""
    calibration = recipe.calibration
    return calibration.num_samples * calibration.seq_len * features * dtype.itemsize


def _streams(recipe: Recipe) -> int:
    return 2 if recipe.needs_original else 1
