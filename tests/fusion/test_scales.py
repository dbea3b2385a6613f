"""Scalings, fused with rotations, must leave every family's logits as they were, in fp64.

Factors are random: with ones, an order or a side that is wrong cannot be seen (hazards (a), (b)
and (c) of OSTQuant's released code).
"""

import pytest
import torch
from fused_models import fused_logits
from random_rotations import random_orthogonal
from tiny_models import CONFIGS, MemorySource, random_ids, tiny_model

from rotq.errors import RotqError
from rotq.fusion.draw import build_basis
from rotq.fusion.fuse import fuse_block
from rotq.fusion.layernorm import leave_ones_alone
from rotq.models.scalings import scalings
from rotq.models.sizes import head_dim, num_value_heads
from rotq.models.skeleton import Skeleton
from rotq.recipe import Rotation
from rotq.rotations.basis import SCALINGS, Basis, Scales

FAMILIES = ["llama-biases", "llama-tied", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3-moe-mixed"]


LAYER_NORM = {
    "esm": ("qkv", "gate_up", "value", "query_key"),
    "esmc": ("qkv", "gate_up", "value", "up"),
}
"""Families with LayerNorm, and the scalings that they allow."""


def random_scales(skeleton, names, seed=0):
    """Log-normal factors between about 1/4 and 4."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in scalings(skeleton, names):
        free = {
            name: (0.5 * torch.randn(s.shape, generator=generator, dtype=torch.float64)).exp()
            for name, s in layer.items()
        }
        layers.append(Scales.of({name: s.expand(free[name]) for name, s in layer.items()}))
    return tuple(layers)


def random_rotations(skeleton):
    """R1 and R2 uniform over the orthogonal group; R4 a Hadamard."""
    config, size = skeleton.config, head_dim(skeleton.config)
    basis = build_basis(Rotation(down="hadamard", seed=3), skeleton.adapter, config)
    heads = range(num_value_heads(config))
    named = {
        f"value.{layer}": torch.stack([random_orthogonal(size, 2 * layer + h) for h in heads])
        for layer in range(config.num_hidden_layers)
    }
    if skeleton.adapter.residual_rotation:
        named["residual"] = random_orthogonal(config.hidden_size, 9)
    if skeleton.adapter.layer_norm:
        named["residual"] = leave_ones_alone(named["residual"])
    return basis.with_tensors(named)


def difference(name, basis_of):
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    ids_BT = random_ids(2, 11)
    before = fused_logits(skeleton, source, ids_BT, Basis())
    assert 0.5 < before.std() < 5
    return (fused_logits(skeleton, source, ids_BT, basis_of(skeleton)) - before).abs().max()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_scaling_alone_preserves_the_function(name, scaling):
    assert difference(name, lambda s: Basis(scales=random_scales(s, [scaling]))) < 1e-9


@pytest.mark.parametrize(
    ("name", "scaling"),
    [(name, scaling) for name, allowed in LAYER_NORM.items() for scaling in allowed],
)
def test_each_scaling_alone_preserves_the_function_of_layer_norms(name, scaling):
    assert difference(name, lambda s: Basis(scales=random_scales(s, [scaling]))) < 1e-9


@pytest.mark.parametrize(
    ("name", "scaling", "why"),
    [
        ("esm", "up", "no linear layer gives a factor"),
        ("esmc", "query_key", "a norm over all heads stands behind queries and keys"),
        ("gpt2", "value", "queries, keys and values are rows of one layer"),
        ("bert", "qkv", "do not have a norm each before them"),
    ],
)
def test_what_a_family_does_not_allow_says_why(name, scaling, why):
    skeleton = Skeleton.open(MemorySource(tiny_model(name)))
    with pytest.raises(RotqError, match=why):
        scalings(skeleton, [scaling])


@pytest.mark.parametrize("name", [*FAMILIES, *LAYER_NORM])
def test_random_rotations_and_scales_preserve_the_function(name):
    def both(skeleton):
        scales = random_scales(skeleton, LAYER_NORM.get(name, SCALINGS))
        named = Basis(scales=scales).tensors() | random_rotations(skeleton).tensors()
        return random_rotations(skeleton).with_tensors(named)

    assert difference(name, both) < 1e-9


def test_every_scaling_changes_the_weights():
    # or the tests above could pass on factors that are never applied
    source = MemorySource(tiny_model("llama"))
    skeleton = Skeleton.open(source)
    for scaling, touched in (
        ("qkv", "self_attn.q_proj"),
        ("gate_up", "mlp.up_proj"),
        ("value", "self_attn.o_proj"),
        ("query_key", "self_attn.k_proj"),
        ("up", "mlp.down_proj"),
    ):
        block = skeleton.load_block(1, source, device="cpu", dtype=torch.float64)
        before = block.get_submodule(touched).weight.clone()
        basis = Basis(scales=random_scales(skeleton, [scaling]))
        fuse_block(block, skeleton.adapter, basis, 1)
        assert (block.get_submodule(touched).weight - before).abs().max() > 0.1, scaling


def test_queries_and_keys_that_rope_mixes_must_share_a_factor():
    """Hazard (a): factors of one feature each do not commute with RoPE."""

    def untied(skeleton):
        generator = torch.Generator().manual_seed(0)
        factors = torch.rand(2, 16, generator=generator, dtype=torch.float64) + 0.5
        return Basis(scales=(Scales(query_key_HK=factors),) * 2)

    assert difference("llama", untied) > 1e-3
    assert difference("llama", lambda s: Basis(scales=random_scales(s, ["query_key"]))) < 1e-9


def test_scales_of_up_stand_before_the_hadamard():
    """Hazard (b): W diag(S) D H, not W D H diag(S)."""
    source = MemorySource(tiny_model("llama"))
    skeleton = Skeleton.open(source)
    rotation = build_basis(Rotation(down="hadamard"), skeleton.adapter, skeleton.config)
    scales = random_scales(skeleton, ["up"])
    basis = rotation.with_tensors(Basis(scales=scales).tensors())
    assert basis.down == "hadamard"
    assert difference("llama", lambda _: basis) < 1e-9
    block = skeleton.load_block(0, source, device="cpu", dtype=torch.float64)
    original = block.mlp.down_proj.weight.clone()
    fuse_block(block, skeleton.adapter, basis, 0)
    hadamard_KK = block.mlp.down_proj.prepare_input(torch.eye(80, dtype=torch.float64))
    torch.testing.assert_close(
        block.mlp.down_proj.weight,
        original @ torch.diag(scales[0].up_EI[0]) @ hadamard_KK,
        rtol=0,
        atol=1e-12,
    )


def test_scales_of_values_go_to_the_columns_of_the_output_projection():
    """Hazard (c): columns of o_proj, each query head those of its KV head."""
    source = MemorySource(tiny_model("llama"))
    skeleton = Skeleton.open(source)
    scales = random_scales(skeleton, ["value"])
    block = skeleton.load_block(0, source, device="cpu", dtype=torch.float64)
    original = block.self_attn.o_proj.weight.clone()
    fuse_block(block, skeleton.adapter, Basis(scales=scales), 0)
    # query heads 0 and 1 read KV head 0, heads 2 and 3 read KV head 1
    columns = scales[0].value_HK[[0, 0, 1, 1]].flatten()
    torch.testing.assert_close(block.self_attn.o_proj.weight, original * columns, rtol=0, atol=0)


def test_families_here_are_families_there():
    assert set(FAMILIES) <= set(CONFIGS)
