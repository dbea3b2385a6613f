"""What calibration learns, against plain sums over what the model computes."""

from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.calibration.statistics import LayerStatistics, collect, output_moments
from rotq.models.attention.replaced import AttentionCall, attend, replaced_attention, visible
from rotq.models.rotary import kv_shapes, rotaries

SINKS = 2


def calls_of(model: Any, ids_BT: Tensor) -> list[list[AttentionCall]]:
    """Every attention call, by layer."""
    seen: list[list[AttentionCall]] = [[] for _ in kv_shapes(model.config)]

    def attention(call: AttentionCall) -> Tensor:
        seen[call.layer].append(call)
        q = call.q_BHTD.unflatten(1, (call.k_BKTD.shape[1], -1)) * call.scale
        out = attend(q, call.k_BKTD, call.v_BKTD, visible(0, q.shape[3], call.window))
        return out.flatten(1, 2).transpose(1, 2)

    with replaced_attention(model, attention):
        for ids_T in ids_BT:
            model(ids_T[None], use_cache=False)
    return seen


def statistics_of(family: str, **options: Any) -> tuple[Any, Tensor, list[LayerStatistics]]:
    model = tiny_model(family, dtype=torch.float32)
    ids_BT = random_ids(3, 12)
    return model, ids_BT, collect(model, ids_BT, sinks=SINKS, **options)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_means(family: str) -> None:
    model, ids_BT, found = statistics_of(family)
    position_T = torch.arange(SINKS, 12)
    for calls, rotary, layer in zip(
        calls_of(model, ids_BT), rotaries(model.config), found, strict=True
    ):
        assert rotary is not None
        k = torch.cat([call.k_BKTD[:, :, SINKS:] for call in calls]).double()
        v = torch.cat([call.v_BKTD[:, :, SINKS:] for call in calls]).double()
        before = rotary.turn_back(k, position_T)
        torch.testing.assert_close(layer.key_mean_HD, before.mean((0, 2)), rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.turned_key_mean_HD, k.mean((0, 2)), rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.value_mean_HD, v.mean((0, 2)), rtol=0, atol=1e-5)


def test_mean_before_rope_is_the_projection_s() -> None:
    """Llama's keys before RoPE are k_proj's outputs."""
    model, ids_BT, found = statistics_of("llama")
    seen: list[Tensor] = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda _, __, output: seen.append(output[0, SINKS:])
    )
    for ids_T in ids_BT:
        model(ids_T[None], use_cache=False)
    hook.remove()
    expected = torch.cat(seen).double().mean(0).view(2, 16)
    torch.testing.assert_close(found[0].key_mean_HD, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_weighted_queries(family: str) -> None:
    """Spelled out, one query at a time."""
    model, ids_BT, found = statistics_of(family)
    call_lists = calls_of(model, ids_BT)
    moment, plain = torch.zeros(2, 2, 16, 16).double()
    weights = torch.zeros(2).double()
    for call in call_lists[1]:
        for head in range(4):
            group, seen_QS = head // 2, visible(0, 12, call.window)
            q, k, v = call.q_BHTD[0, head], call.k_BKTD[0, group], call.v_BKTD[0, group]
            p = ((q @ k.T) * call.scale).masked_fill(~seen_QS, -torch.inf).softmax(-1)
            for t in range(SINKS, 12):
                gap = (v - p[t] @ v).square().sum(-1)
                w = float((p[t] ** 2 * gap)[SINKS:t].sum())
                moment[group] += w * torch.outer(q[t], q[t]).double()
                plain[group] += torch.outer(q[t], q[t]).double()
                weights[group] += w
    expected = moment / weights[:, None, None]
    torch.testing.assert_close(found[1].query_moment_HDD, expected, rtol=1e-3, atol=1e-5)
    # three windows, two query heads
    torch.testing.assert_close(found[1].plain_query_moment_HDD, plain / 60, rtol=1e-3, atol=1e-5)


def test_samples() -> None:
    model, ids_BT, found = statistics_of("llama", num_samples=15)
    position_N = found[0].position_N
    assert position_N.shape == (15,)
    assert int(position_N.min()) >= SINKS
    again = collect(model, ids_BT, sinks=SINKS, num_samples=15)
    other = collect(model, ids_BT, sinks=SINKS, num_samples=15, seed=1)
    assert torch.equal(again[1].k_HND, found[1].k_HND)
    assert not torch.equal(other[0].position_N, position_N)
    call = calls_of(model, ids_BT)[1][2]
    torch.testing.assert_close(
        found[1].v_HND[:, 10:], call.v_BKTD[0, :, position_N[10:]], rtol=0, atol=1e-5
    )


def test_output_projection() -> None:
    model = tiny_model("llama")
    found = output_moments(model, kv_shapes(model.config))
    weight = model.model.layers[1].self_attn.o_proj.weight
    heads = [weight[:, 16 * head : 16 * head + 16] for head in range(4)]
    assert found[1] is not None
    torch.testing.assert_close(found[1][1], heads[2].T @ heads[2] + heads[3].T @ heads[3])


def test_not_finite() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    model.model.layers[1].self_attn.v_proj.weight[3, 3] = torch.inf
    with pytest.raises(RotqError, match="keys, values or queries of layer 1 are not finite"):
        collect(model, random_ids(1, 8), sinks=0)


def test_windows_of_sinks() -> None:
    with pytest.raises(ValueError, match="windows of 4 tokens hold nothing behind 4 sinks"):
        collect(tiny_model("llama"), random_ids(1, 4), sinks=4)
