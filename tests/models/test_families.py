"""Every family whose stream can be rotated: fp64 logits stay under any orthogonal matrix."""

import pytest
import torch
from random_rotations import random_orthogonal
from tiny_families import FAMILIES, tiny_family, tiny_family_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rotq.calibration.capture import run_block
from rotq.checkpoint.opening import open_source
from rotq.fusion.fuse import fuse_block, fuse_outer
from rotq.fusion.layernorm import leave_ones_alone
from rotq.models.exact import InDouble
from rotq.models.registry import ADAPTERS
from rotq.models.sizes import head_dim, num_value_heads
from rotq.models.skeleton import Skeleton
from rotq.rotations.basis import Basis

KNOWN = [name for name in FAMILIES if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] in ADAPTERS]


def logits_of(skeleton, source, ids_BT, basis):
    outer = fuse_outer(skeleton.load_outer(source, dtype=torch.float64), skeleton.adapter, basis)
    hidden_BTD = skeleton.embed(outer, ids_BT)
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index, source, device="cpu", dtype=torch.float64)
        fuse_block(block, skeleton.adapter, basis, index)
        with InDouble(), torch.no_grad():
            kwargs = skeleton.block_kwargs(index, hidden_BTD)
            hidden_BTD = run_block(block, hidden_BTD, kwargs)
    with InDouble():
        return skeleton.logits(outer, hidden_BTD)


def basis_of(skeleton):
    adapter, config = skeleton.adapter, skeleton.config
    residual_DD = value = None
    if adapter.residual_obstacle(config) is None:
        residual_DD = random_orthogonal(config.hidden_size, 9)
        if adapter.layer_norm:
            residual_DD = leave_ones_alone(residual_DD)
    if adapter.value_rotation:
        size, heads = head_dim(config), range(num_value_heads(config))
        layers = range(config.num_hidden_layers)
        drawn = [torch.stack([random_orthogonal(size, 8 * i + h) for h in heads]) for i in layers]
        value = tuple(drawn)
    down = "hadamard" if adapter.down_rotation else None
    return Basis(residual_DD=residual_DD, value=value, down=down, down_seed=3)


@pytest.mark.parametrize("name", [n for n in KNOWN if not n.startswith("gemma4")])
def test_logits_stay(name, tmp_path):
    tiny_family(name).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    skeleton = Skeleton.open(source)
    source = source.read_for(skeleton)
    ids_BT = torch.arange(3, 22)[None] * 7 % 200 + 3
    basis = basis_of(skeleton)
    assert not basis.is_identity
    before = logits_of(skeleton, source, ids_BT, Basis())
    after = logits_of(skeleton, source, ids_BT, basis)
    assert before.std() > 0.05
    assert (after - before).abs().max() < 1e-9 * before.abs().max()


def test_families_whose_stream_can_be_rotated():
    rotated = [name for name in KNOWN if obstacle_of(name) is None]
    assert len(rotated) >= 25
    post_norms = ["exaone4", "gemma2", "gemma3_text", "gemma4_text", "glm4"]
    post_norms += ["olmo2", "olmo3"]
    assert sorted(set(KNOWN) - set(rotated)) == post_norms


def obstacle_of(name):
    config = tiny_family_config(name)
    return ADAPTERS[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]].residual_obstacle(config)
