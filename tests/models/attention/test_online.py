"""Heads rotated and rounded at run time: exact where it must be, refused where it would be lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.kv.cache.attention import NAME as PACKED_CACHE
from rotq.layers.online_heads import UNTOUCHED, OnlineHeads
from rotq.models.attention import dispatch
from rotq.models.attention.observed import observed_attention
from rotq.models.attention.online import heads_of, set_heads, use_online_attention
from rotq.models.attention.replaced import AttentionCall, attend, replaced_attention, visible
from rotq.rotations.hadamard import hadamard

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral"]
INT4 = ActivationGrid(bits=4, symmetric=False)


def online(family: str, heads: OnlineHeads) -> Any:
    model = tiny_model(family)
    use_online_attention(model)
    for layer in model.model.layers:
        set_heads(layer.self_attn, heads)
    return model


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    found: Tensor = model(ids_BT, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_leaves_logits_and_is_applied(family: str) -> None:
    ids_BT = random_ids(2, 12)
    expected = logits(tiny_model(family), ids_BT)
    model = online(family, OnlineHeads(rotated=True))
    seen = []
    sdpa = F.scaled_dot_product_attention

    def watch(query: Tensor, *rest: Any, **kw: Any) -> Tensor:
        seen.append(query)
        return sdpa(query, *rest, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watch)
        found = logits(model, ids_BT)
        logits(tiny_model(family), ids_BT)
    assert (found - expected).abs().max() < 1e-9
    rotated, plain = seen[0], seen[len(seen) // 2]
    d = plain.shape[-1]
    torch.testing.assert_close(rotated, plain @ hadamard(d).double() / d**0.5)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_equals_a_reference(family: str, rotated: bool) -> None:
    """The same model with keys and values replaced by hand, and attention written out."""
    ids_BT = random_ids(2, 12)

    def reference(call: AttentionCall) -> Tensor:
        q, k, v = call.q_BHTD, call.k_BKTD, call.v_BKTD
        H = hadamard(q.shape[-1]).double() / q.shape[-1] ** 0.5
        if rotated:
            q, k = q @ H, k @ H
        k, v = fake_quantize(k, INT4), fake_quantize(v, INT4)
        grouped = q.unflatten(1, (k.shape[1], -1)) * call.scale
        seen = visible(0, q.shape[2], call.window)
        return attend(grouped, k, v, seen).flatten(1, 2).transpose(1, 2)

    plain = tiny_model(family)
    with replaced_attention(plain, reference):
        expected = logits(plain, ids_BT)
    found = logits(online(family, OnlineHeads(rotated=rotated, grid=INT4)), ids_BT)
    assert (logits(plain, ids_BT) - expected).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_window() -> None:
    model = online("llama", OnlineHeads(rotated=True, grid=INT4))
    ids_BT = random_ids(2, 10)
    whole = logits(model, ids_BT)
    cache, steps = None, []
    for t in range(10):
        output = model(ids_BT[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-9)


def test_without_heads_it_is_sdpa_bit_by_bit() -> None:
    ids_BT = random_ids(2, 12)
    expected = logits(tiny_model("gemma3"), ids_BT)
    model = tiny_model("gemma3")
    use_online_attention(model)
    assert torch.equal(logits(model, ids_BT), expected)
    assert heads_of(model.model.layers[0].self_attn) == UNTOUCHED


def test_copies_of_a_block_keep_their_heads() -> None:
    model = online("llama", OnlineHeads(grid=INT4))
    ids_BT = random_ids(1, 8)
    assert torch.equal(logits(copy.deepcopy(model), ids_BT), logits(model, ids_BT))


def test_an_observer_sees_rotated_and_rounded_heads() -> None:
    model = online("llama", OnlineHeads(rotated=True, grid=INT4))
    ids_BT = random_ids(1, 8)
    expected = logits(model, ids_BT)
    keys: list[Tensor] = []
    with observed_attention(model, lambda query, key, **_: keys.append(key)):
        assert torch.equal(logits(model, ids_BT), expected)
    per_head_and_token = keys[0].flatten(0, 2)
    assert all(len(row.unique()) <= 16 for row in per_head_and_token)


@pytest.mark.parametrize("other", ["eager", "rotq_replaced", "rotq_packed"])
def test_another_attention_would_lose_the_rounding(other: str) -> None:
    model = online("llama", OnlineHeads(grid=INT4))
    model.config._attn_implementation = other
    with pytest.raises(RotqError, match=rf"rounds its keys and values .*which {other} attention"):
        logits(model, random_ids(1, 4))


def test_no_two_attentions_have_one_name() -> None:
    """The later registration would run in the place of the earlier."""
    names = [name for name in vars(dispatch).values() if isinstance(name, str)]
    names = [name for name in names if name.startswith("rotq_")]
    assert len({*names, PACKED_CACHE}) == len(names) + 1


def test_another_attention_may_leave_out_the_rotation() -> None:
    model = online("llama", OnlineHeads(rotated=True))
    model.set_attn_implementation("eager")
    ids_BT = random_ids(1, 8)
    # eager takes its softmax in fp32
    assert (logits(model, ids_BT) - logits(tiny_model("llama"), ids_BT)).abs().max() < 1e-4


def test_only_sdpa_is_taken_over() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(RotqError, match="LlamaForCausalLM uses eager attention; rotating or round"):
        use_online_attention(model)
