"""Unfused experts: the fused module's function, with a Linear per weight."""

import pytest
import torch
from tiny_families import tiny_family
from tiny_models import MemorySource, random_ids, tiny_model
from torch import nn

from rotq.checkpoint.opening import open_source
from rotq.models.experts import (
    UnfusedExperts,
    calibrating,
    routed_tokens,
    unfuse,
    unfuse_experts,
)
from rotq.models.fused import fused_form
from rotq.models.skeleton import Skeleton

MIXTURES = ["mixtral", "qwen3-moe", "qwen3-moe-mixed"]


def routed(num_experts, tokens=13, top_k=2):
    generator = torch.Generator().manual_seed(0)
    x_MD = torch.randn(tokens, 48, dtype=torch.float64, generator=generator)
    # the last expert is never chosen, and the routing weights do not sum to one
    scores = torch.rand(tokens, num_experts - 1, dtype=torch.float64, generator=generator)
    weight_MS, index_MS = scores.topk(top_k)
    return x_MD, index_MS, weight_MS


@pytest.mark.parametrize("name", MIXTURES)
def test_unfused_is_fused(name):
    fused = tiny_model(name).model.layers[1].mlp.experts
    arguments = routed(4)
    assert fused_form(fused)
    unfused = unfuse(fused)
    torch.testing.assert_close(unfused(*arguments), fused(*arguments), rtol=0, atol=1e-12)
    with calibrating(unfused):
        torch.testing.assert_close(unfused(*arguments), fused(*arguments), rtol=0, atol=1e-12)
    assert fused_form(unfused) is None


@pytest.mark.parametrize("name", MIXTURES)
def test_model_with_unfused_experts_gives_the_same_logits(name):
    model = tiny_model(name)
    ids_BT = random_ids(2, 9)
    before = model(ids_BT).logits
    found = {name for name, module in model.named_modules() if fused_form(module)}
    assert unfuse_experts(model).keys() == found != set()
    assert not unfuse_experts(model)
    torch.testing.assert_close(model(ids_BT).logits, before, rtol=0, atol=1e-12)


def test_hooks_see_every_token_only_while_calibrating():
    experts = unfuse(tiny_model("qwen3-moe").model.layers[0].mlp.experts)
    seen = []
    for expert in experts:
        for linear in (expert.gate_proj, expert.down_proj):
            linear.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    x_MD, index_MS, weight_MS = routed(4)
    with calibrating(nn.ModuleList([experts])):
        experts(x_MD, index_MS, weight_MS)
    assert [len(x) for x in seen] == [13] * 8
    assert all(torch.equal(x, x_MD) for x in seen[::2])
    seen.clear()
    experts(x_MD, index_MS, weight_MS)
    assert [len(x) for x in seen[::2]] == [int((index_MS == e).sum()) for e in range(3)]
    assert not experts.see_all_tokens


def test_routed_tokens_are_counted_while_calibrating():
    block = nn.ModuleDict({"mlp": unfuse(tiny_model("qwen3-moe").model.layers[0].mlp.experts)})
    x_MD, index_MS, weight_MS = routed(4)
    block.mlp(x_MD, index_MS, weight_MS)
    assert routed_tokens(block) == {}
    for _ in range(2):
        with calibrating(block):
            block.mlp(x_MD, index_MS, weight_MS)
            block.mlp(x_MD[:4], index_MS[:4], weight_MS[:4])
        both = torch.cat((index_MS, index_MS[:4]))
        # the last expert is never chosen
        expected = [int((both == expert).sum()) for expert in range(3)] + [0]
        assert routed_tokens(block) == {"mlp": expected}


def test_experts_with_rows_of_their_own():
    fused = tiny_family("llama4_text").model.layers[0].feed_forward.experts.double()
    x_EMD = torch.randn(4, 5, 64, dtype=torch.float64)
    x_EMD[1, 2:] = 0  # not routed there
    unfused, rows = unfuse(fused), x_EMD.flatten(0, 1)
    torch.testing.assert_close(unfused(rows), fused(rows), rtol=0, atol=1e-12)
    x_EMD[:, 4] = 0
    x_EMD[3, 4] = 1.0  # of all experts the last alone
    seen = []
    for expert in unfused:
        expert.up_proj.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    block = nn.ModuleDict({"moe": unfused})
    with calibrating(block):
        found = block.moe(rows)
    torch.testing.assert_close(found, fused(rows), rtol=0, atol=1e-12)
    assert routed_tokens(block) == {"moe": [4, 2, 4, 5]}
    assert all(torch.equal(x_MD[4], x_EMD[3, 4]) for x_MD in seen)
    assert torch.equal(seen[2][:4], x_EMD[2, :4])


def test_calibrating_ends_with_an_error():
    experts = UnfusedExperts([])
    with pytest.raises(KeyError), calibrating(experts):
        raise KeyError
    assert not experts.see_all_tokens


def test_half_precision_output_keeps_its_dtype():
    fused = tiny_model("mixtral", dtype=torch.bfloat16).model.layers[0].mlp.experts
    x_MD, index_MS, weight_MS = routed(4)
    # Mixtral's router gives fp32 weights whatever the model's dtype
    arguments = (x_MD.bfloat16(), index_MS, weight_MS.float())
    assert torch.equal(unfuse(fused)(*arguments), fused(*arguments))


def test_only_fused_modules_are_taken():
    with pytest.raises(ValueError, match="Linear does not hold fused"):
        unfuse(nn.Linear(2, 2))


@pytest.mark.parametrize("name", MIXTURES)
def test_checkpoints_as_transformers_saves_them(name, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    skeleton = Skeleton.open(source)
    source = source.read_for(skeleton)
    inside = {name for name in source.names() if name.startswith("model.layers.1.")}
    block = skeleton.load_block(1, source, device="cpu", dtype=torch.float32)
    assert {f"model.layers.1.{name}" for name in block.state_dict()} == inside
    in_memory = MemorySource(model)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, in_memory.load(f"model.layers.1.{name}"))
