"""Fusing a basis must leave every family's logits as they were, in fp64."""

import copy

import pytest
import torch
from random_rotations import random_orthogonal
from tiny_models import (
    CONFIGS,
    LAYER_NORM,
    MASKED,
    POST_NORMS,
    MemorySource,
    random_ids,
    tiny_model,
)

from rotq.fusion.draw import build_basis
from rotq.fusion.fuse import fuse_block, fuse_outer
from rotq.fusion.layernorm import leave_ones_alone
from rotq.layers.online_linear import OnlineLinear
from rotq.models.attention.online import use_online_attention
from rotq.models.exact import InDouble
from rotq.models.sizes import head_dim, num_value_heads
from rotq.models.skeleton import Skeleton
from rotq.recipe import Rotation
from rotq.rotations.basis import Basis
from rotq.rotations.hadamard import hadamard

ROTATIONS = {
    "R1": Rotation(residual="hadamard"),
    "R1-dct": Rotation(residual="dct"),
    "R1-ends": Rotation(residual="hadamard", residual_ends="online", seed=5),
    "R2": Rotation(value="hadamard"),
    "R2-dct": Rotation(value="dct"),
    "R4": Rotation(down="hadamard"),
    "R4-blocks": Rotation(down="hadamard", down_block_size=8),
    "R3": Rotation(attention="hadamard"),
    "R2-R3-R4": Rotation(value="hadamard", attention="hadamard", down="hadamard"),
    "R1-R2-R4": Rotation(residual="hadamard", value="dct", down="hadamard", seed=7),
}


def forward(skeleton, source, ids_BT, basis):
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


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name in CONFIGS
        for key, rotation in ROTATIONS.items()
        if rotation.residual == "none" or name not in POST_NORMS
        if rotation.residual_ends == "fused" or name not in (*LAYER_NORM, *MASKED)
    ],
)
def test_logits_stay(name, key):
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    basis = build_basis(ROTATIONS[key], skeleton.adapter, skeleton.config)
    if basis.attention:
        use_online_attention(skeleton.model)
    ids_BT = random_ids(2, 11)
    before = forward(skeleton, source, ids_BT, Basis())
    after = forward(skeleton, source, ids_BT, basis)
    assert 0.5 < before.std() < 15
    assert (after - before).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mixtral", *LAYER_NORM])
def test_logits_stay_under_any_orthogonal_basis(name):
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    size, heads = head_dim(skeleton.config), range(num_value_heads(skeleton.config))
    value = [torch.stack([random_orthogonal(size, 8 * i + h) for h in heads]) for i in (0, 1)]
    residual_DD = random_orthogonal(48, 9)
    if skeleton.adapter.layer_norm:
        residual_DD = leave_ones_alone(residual_DD)
    basis = Basis(residual_DD=residual_DD, value=tuple(value))
    ids_BT = random_ids(2, 11)
    before = forward(skeleton, source, ids_BT, Basis())
    assert (forward(skeleton, source, ids_BT, basis) - before).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_gains_fold_into_their_readers(name):
    # R1 = I is allowed even with post-norms, and shows gains of 1 + w folded whole
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    ids_BT = random_ids(2, 11)
    folded = Basis(residual_DD=torch.eye(48, dtype=torch.float64))
    before = forward(skeleton, source, ids_BT, Basis())
    assert (forward(skeleton, source, ids_BT, folded) - before).abs().max() < 1e-10


def test_identity_changes_nothing():
    source = MemorySource(tiny_model("llama-tied"))
    skeleton = Skeleton.open(source)
    block = skeleton.load_block(0, source, device="cpu", dtype=torch.float32)
    before = copy.deepcopy(block.state_dict())
    fuse_block(block, skeleton.adapter, Basis(), 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    outer = skeleton.load_outer(source, dtype=torch.float32)
    fused = fuse_outer(outer, skeleton.adapter, Basis())
    assert fused == outer
    assert fused is not outer


def test_value_rotation_alone_leaves_norms_and_mlp():
    source = MemorySource(tiny_model("llama-biases"))
    skeleton = Skeleton.open(source)
    block = skeleton.load_block(0, source, device="cpu", dtype=torch.float64)
    before = copy.deepcopy(block.state_dict())
    basis = build_basis(Rotation(value="hadamard"), skeleton.adapter, skeleton.config)
    fuse_block(block, skeleton.adapter, basis, 0)
    changed = {n for n, tensor in block.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {
        "self_attn.v_proj.weight",
        "self_attn.v_proj.bias",
        "self_attn.o_proj.weight",
    }


def test_value_heads_take_the_matrices_of_their_layer():
    source = MemorySource(tiny_model("llama"))
    skeleton = Skeleton.open(source)
    block = skeleton.load_block(1, source, device="cpu", dtype=torch.float64)
    before = block.self_attn.v_proj.weight.clone()
    basis = build_basis(Rotation(value="dct"), skeleton.adapter, skeleton.config)
    fuse_block(block, skeleton.adapter, basis, 1)
    by_head = [basis.value[1][h].T @ before[16 * h : 16 * (h + 1)] for h in (0, 1)]
    expected = torch.cat(by_head)
    torch.testing.assert_close(block.self_attn.v_proj.weight, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_residual_rotation_spreads_weights_and_leaves_unit_gains(name):
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    basis = build_basis(Rotation(residual="hadamard"), skeleton.adapter, skeleton.config)
    outer = skeleton.load_outer(source, dtype=torch.float64)
    kept = {key: tensor.clone() for key, tensor in outer.items()}
    fused = fuse_outer(outer, skeleton.adapter, basis)
    block = skeleton.load_block(0, source, device="cpu", dtype=torch.float64)
    fuse_block(block, skeleton.adapter, basis, 0)
    for gain in (
        fused["model.norm.weight"],
        block.input_layernorm.weight,
        block.post_attention_layernorm.weight,
    ):
        assert torch.equal(gain, torch.ones_like(gain))
    assert all(torch.equal(outer[key], kept[key]) for key in kept)


def test_tied_head_becomes_its_own():
    source = MemorySource(tiny_model("llama-tied"))
    skeleton = Skeleton.open(source)
    basis = build_basis(Rotation(residual="hadamard"), skeleton.adapter, skeleton.config)
    outer = skeleton.load_outer(source, dtype=torch.float32)
    fused = fuse_outer(outer, skeleton.adapter, basis)
    assert set(fused) - set(outer) == {"lm_head.weight"}
    assert fused["lm_head.weight"].dtype == torch.float32
    assert not torch.equal(fused["lm_head.weight"], fused["model.embed_tokens.weight"])


def test_down_rotation_replaces_every_down_projection():
    source = MemorySource(tiny_model("qwen3-moe-mixed"))
    skeleton = Skeleton.open(source)
    basis = build_basis(Rotation(down="hadamard"), skeleton.adapter, skeleton.config)
    plain, mixture = (
        skeleton.load_block(i, source, device="cpu", dtype=torch.float64) for i in (0, 1)
    )
    for index, block in enumerate((plain, mixture)):
        fuse_block(block, skeleton.adapter, basis, index)
    downs = [plain.mlp.down_proj, *(expert.down_proj for expert in mixture.mlp.experts)]
    assert all(type(down) is OnlineLinear for down in downs)
    assert [down.in_features for down in downs] == [80, 24, 24, 24, 24]
    assert torch.equal(downs[1].input_signs, downs[2].input_signs)
    assert [len(down.input_signs) for down in downs] == [80, 24, 24, 24, 24]
    # the same paths, so that everything downstream finds them
    names = {site.name for site in skeleton.adapter.sites(mixture)}
    assert {"down.0", "down.3"} <= names


def test_blocks_of_the_down_rotation_are_turned_alike_and_apart():
    source = MemorySource(tiny_model("llama"))
    skeleton = Skeleton.open(source)
    rotation = Rotation(down="hadamard", down_block_size=16)
    basis = build_basis(rotation, skeleton.adapter, skeleton.config)
    block = skeleton.load_block(0, source, device="cpu", dtype=torch.float64)
    original = block.mlp.down_proj.weight.clone()
    fuse_block(block, skeleton.adapter, basis, 0)
    down = block.mlp.down_proj
    turned_KK = down.prepare_input(torch.eye(80, dtype=torch.float64))
    block_RR = down.input_signs.double()[:, None] * hadamard(16).double() / 4
    expected_KK = torch.block_diag(*[block_RR] * 5)
    torch.testing.assert_close(turned_KK, expected_KK, rtol=0, atol=1e-14)
    torch.testing.assert_close(down.weight, original @ expected_KK, rtol=0, atol=1e-14)


def test_fp32_weights_are_rotated_in_fp64():
    source = MemorySource(tiny_model("llama-biases"))
    skeleton = Skeleton.open(source)
    basis = build_basis(Rotation(residual="dct"), skeleton.adapter, skeleton.config)
    wide, narrow = (
        skeleton.load_block(0, source, device="cpu", dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    for block in (wide, narrow):
        fuse_block(block, skeleton.adapter, basis, 0)
    error = narrow.mlp.down_proj.weight.double() - wide.mlp.down_proj.weight
    assert narrow.mlp.down_proj.weight.dtype == torch.float32
    # two roundings to fp32 of entries below 2; a product in fp32 would add dozens
    assert error.abs().max() < 2 * 2**-23
