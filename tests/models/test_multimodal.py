"""The text decoder of models of several parts: what R1 turns beside it, what no text reaches."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from random_rotations import random_orthogonal
from tiny_multimodal import image_inputs, tiny_multimodal
from torch import nn

from rotq.errors import RotqError
from rotq.fusion.draw import build_basis
from rotq.fusion.fuse import fuse_block, fuse_outer, fuse_writer
from rotq.fusion.layernorm import leave_ones_alone
from rotq.models.exact import InDouble
from rotq.models.experts import unfuse_experts
from rotq.models.limits import limits_of
from rotq.models.multimodal import IMAGE_WRITERS, text_model, text_path
from rotq.models.registry import adapter_for
from rotq.models.sizes import head_dim, num_value_heads
from rotq.models.task import is_multimodal, text_config
from rotq.recipe import Rotation
from rotq.rotations.basis import Basis

ROTATED = (
    "aya_vision",
    "cohere2_vision",
    "glm4v_moe",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "smolvlm",
)
INSIDE = ("gemma3", "glm4v")
"""Families whose stream cannot be turned."""


def basis_of(adapter, config):
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


def put(model, name, tensor):
    """In the place of one parameter, which no other shares from then on."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


def turned(model, adapter, basis, *, with_images=True):
    """A model in the basis; experts must be unfused."""
    model = copy.deepcopy(model)
    outer = {n: p for n, p in model.named_parameters() if not n.startswith(f"{adapter.blocks}.")}
    own = {n: p for n, p in outer.items() if not adapter.is_beside(n)}
    for name, tensor in fuse_outer(own, adapter, basis).items():
        put(model, name, tensor)
    for index, block in enumerate(model.get_submodule(adapter.blocks)):
        fuse_block(block, adapter, basis, index)
    if with_images:
        for name in written(adapter, outer):
            put(model, name, fuse_writer(outer[name], basis))
    return model


def written(adapter, outer):
    return [name for name in outer if re.fullmatch(adapter.image_writers, name)]


def logits_of(model, inputs):
    exact = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    with InDouble(), torch.no_grad():
        return model(**exact).logits


@pytest.mark.parametrize("name", [*ROTATED, *INSIDE])
def test_logits_with_an_image_stay(name):
    model = tiny_multimodal(name)
    inputs = image_inputs(model)
    unfuse_experts(model)
    model = model.double()
    adapter = adapter_for(model)
    basis = basis_of(adapter, text_config(model.config))
    assert (basis.residual_DD is None) == (name in INSIDE)
    before = logits_of(model, inputs)
    after = logits_of(turned(model, adapter, basis), inputs)
    assert before.std() > 0.05
    assert (after - before).abs().max() < 1e-9 * before.abs().max()
    if name in INSIDE:
        return
    # the image is seen, and each of the writers matters
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    assert (logits_of(model, other) - before).abs().max() > 1e-4 * before.abs().max()
    outer = dict(model.named_parameters())
    for writer in written(adapter, outer):
        kept = turned(model, adapter, basis)
        put(kept, writer, outer[writer])
        assert (logits_of(kept, inputs) - before).abs().max() > 1e-4 * before.abs().max(), writer


def test_every_class_with_known_writers_was_tried():
    classes = {type(tiny_multimodal(name)).__name__ for name in ROTATED}
    assert classes == set(IMAGE_WRITERS)


def test_unknown_writers_are_refused():
    model = tiny_multimodal("llava")
    adapter = adapter_for(model)
    unknown = replace(adapter, image_writers="")
    with pytest.raises(RotqError, match="what writes image features into the residual stream"):
        build_basis(Rotation(residual="hadamard"), unknown, text_config(model.config))


@pytest.mark.parametrize("name", ["qwen3_vl", "llama4", "idefics3"])
def test_where_the_parts_are(name):
    model = tiny_multimodal(name)
    adapter = adapter_for(model)
    assert is_multimodal(model.config)
    assert adapter.part == text_path(model)
    assert model.get_submodule(adapter.part) is text_model(model)
    assert not adapter.is_beside(f"{adapter.blocks}.0.x")
    assert not adapter.is_beside(f"{adapter.head}.weight")
    beside = [n for n, _ in model.named_parameters() if adapter.is_beside(n)]
    assert beside
    assert not any("lm_head" in n or "embed_tokens" in n for n in beside)


def test_positions_of_images_bound_no_text():
    model = tiny_multimodal("llava")
    assert any("position_embedding" in name for name, _ in model.named_parameters())
    assert limits_of(model).positions is None
