"""Attention over a pool's pages is the model's own, with all that it does to heads and scores."""

from typing import Any

import pytest
import torch
import transformers
from tiny_models import _LLAMA, _randomize, random_ids
from torch import Tensor

from rotq.formats.activations import ActivationGrid
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.pool.dense import DensePool
from rotq.kv.pool.packed import PackedPool
from rotq.kv.pool.pool import Row
from rotq.kv.presets import preset
from rotq.layers.online_heads import OnlineHeads
from rotq.models.attention.online import rounds_heads, set_heads, use_online_attention

TOKENS = 7


def model_of(
    config_class: str,
    *,
    attention: str = "eager",
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Any:
    config = getattr(transformers, config_class)(**{**_LLAMA, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        _randomize(model)
    return model.to(dtype).eval()


@torch.no_grad()
def whole(model: Any, ids_BT: Tensor) -> Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits


@torch.no_grad()
def step_by_step(model: Any, pool: Any, ids_BT: Tensor, first: int) -> Tensor:
    """``first`` tokens in one pass, the others one by one."""
    found = []
    for start, end in [(0, first), *((t, t + 1) for t in range(first, ids_BT.shape[1]))]:
        pool.plan([Row(pages=[0], sink=0, count=start, fresh=end - start)], end - start)
        position = torch.arange(start, end)[None]
        output = model(
            input_ids=ids_BT[:, start:end],
            position_ids=position,
            past_key_values=pool,
            use_cache=True,
        )
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        ("Gemma2Config", {"attn_logit_softcapping": 2.0, "sliding_window": 3}),
        (
            "GptOssConfig",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3},
        ),
        ("LlamaConfig", {"head_dim": 100}),
        ("LlamaConfig", {"head_dim": 12}),
        ("LlamaConfig", {"head_dim": 14}),
    ],
    ids=["softcap", "sink", "100", "12", "14"],
)
def test_dense_pages_are_as_no_cache(config_class: str, changes: dict[str, Any]) -> None:
    # products of experts know no fp64
    moe = "num_local_experts" in changes
    model = model_of(config_class, dtype=torch.float32 if moe else torch.float64, **changes)
    ids = random_ids(1, TOKENS)
    expected = whole(model, ids)
    pool = DensePool(model, num_pages=1, table_width=1)
    found = step_by_step(model, pool, ids, 4)
    # the softmax with a cap or a sink is taken in fp32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def rounding_model() -> Any:
    model = model_of("LlamaConfig", attention="sdpa")
    use_online_attention(model)
    grid = ActivationGrid(bits=4, symmetric=False)
    for block in model.model.layers:
        set_heads(block.self_attn, OnlineHeads(rotated=True, grid=grid))
    return model


def test_dense_pages_round_as_the_model_says() -> None:
    model, ids = rounding_model(), random_ids(1, TOKENS)
    expected = whole(model, ids)
    plain = whole(model_of("LlamaConfig"), ids)
    found = step_by_step(model, DensePool(model, num_pages=1, table_width=1), ids, 4)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(whole(model, ids), expected)


def test_packed_pages_take_the_place_of_the_models_rounding() -> None:
    """What is in one pass is whole, so that nothing is left of the model's own four bits."""
    model, ids = rounding_model().float(), random_ids(1, TOKENS)
    calibration = data_oblivious(model.config, preset("k8v3"))
    pool = PackedPool(model, calibration, num_pages=1, num_sinks=1, table_width=1)
    found = step_by_step(model, pool, ids, TOKENS)
    plain = whole(model_of("LlamaConfig").float(), ids)
    assert (found - plain).abs().max() < 1e-4 * plain.abs().max()
    assert rounds_heads(model)
    assert not rounds_heads(model_of("LlamaConfig"))
