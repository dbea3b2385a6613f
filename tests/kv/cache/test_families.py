"""Decoders of other families: served as a dense cache of decoded codes, or refused by name."""

from typing import Any

import pytest
import torch
import transformers
from kv_oracle import oracle_cache
from tiny_models import random_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from rotq.errors import RotqError
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import calibrate, data_oblivious
from rotq.kv.calibration.file import KVCalibration, load_calibration
from rotq.kv.calibration.model_hash import hash_config
from rotq.kv.pool.dense import DensePool
from rotq.kv.pool.packed import PackedPool
from rotq.kv.presets import preset

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MIXED = ["sliding_attention", "full_attention"]
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "one KV head": ("GPTBigCodeConfig", {"multi_query": True, "num_key_value_heads": 2}),
    "all heads": ("GPTBigCodeConfig", {"multi_query": False}),
    "decoder of another name": ("ModernBertDecoderConfig", {"local_attention": 8}),
    "width by layer": (
        "Gemma4TextConfig",
        {
            "global_head_dim": 32,
            "layer_types": MIXED,
            "sliding_window": 6,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 97,
        },
    ),
    "narrow, one KV head": ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 8}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sees the future": ("BertConfig", {}, "bert: .*is (not )?causal"),
    "splits keys": ("DiffLlamaConfig", {}, "diffllama: .* changes keys after the cache"),
    "biases keys": ("DogeConfig", {}, "doge: .* changes keys after the cache"),
    "wide": ("LlamaConfig", {"head_dim": 264}, "llama: .* width 264 .* at most .* width 256"),
    "many heads": (
        "LlamaConfig",
        {"hidden_size": 160, "num_attention_heads": 40, "num_key_value_heads": 1},
        "llama: .* 40 heads .* at most 16 per KV head",
    ),
}


def made(config: str, changes: dict[str, Any]) -> Any:
    sizes = dict(SIZES)
    if config in ("OPTConfig", "BertConfig", "ModernBertDecoderConfig"):
        del sizes["num_key_value_heads"]
    found = getattr(transformers, config)(**{**sizes, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(found, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def oblivious(model: Any) -> KVCalibration:
    return data_oblivious(model.config, preset("k8v3"))


@torch.no_grad()
def stepwise(model: Any, cache: Any, ids: Tensor) -> Tensor:
    chunks = ids.split([10, *[1] * (ids.shape[1] - 10)], dim=1)
    logits = [model(input_ids=chunk, past_key_values=cache, use_cache=True) for chunk in chunks]
    return torch.cat([one.logits for one in logits], dim=1)


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    model = made(*SERVED[name])
    # with seed 0 one key of one family lies between two codes, and rounding decides
    calibration, ids = oblivious(model), random_ids(2, 30, seed=1)
    expected = stepwise(model, oracle_cache(calibration), ids)
    found = stepwise(model, PackedCache(model, calibration), ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - model(input_ids=ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("name", SERVED)
def test_calibrated_through_a_file(name: str, tmp_path: Any) -> None:
    model, ids = made(*SERVED[name]), random_ids(3, 40)
    calibrate(model, ids, preset("k8v3")).save(tmp_path / "kv")
    calibration = load_calibration(tmp_path / "kv", model.config)
    expected = stepwise(model, oracle_cache(calibration), ids[:1])
    found = stepwise(model, PackedCache(model, calibration), ids[:1])
    # a value at the middle of two levels may get the other code on another processor
    assert torch.isclose(found, expected, rtol=1e-3, atol=1e-3).double().mean() > 0.98
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-2)


def test_widths_by_layer_are_part_of_the_hash() -> None:
    name, changes = SERVED["width by layer"]
    hashes = {
        hash_config(getattr(transformers, name)(**{**SIZES, **changes, "global_head_dim": width}))
        for width in (16, 24, 32)
    }
    assert len(hashes) == 3


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_the_cache_is_made(name: str) -> None:
    config, changes, message = REFUSED[name]
    model = made(config, changes)
    before, ids = model.config._attn_implementation, random_ids(1, 8)
    expected = model(input_ids=ids).logits
    calibration = oblivious(model)
    makers = (
        lambda: PackedCache(model, calibration),
        lambda: PackedPool(model, calibration, num_pages=2, num_sinks=1, table_width=2),
        lambda: DensePool(model, num_pages=2, table_width=2),
    )
    for make in makers[: 2 if name in ("wide", "many heads") else 3]:
        with pytest.raises(RotqError, match=message):
            make()
        # and the model is as it was
        assert model.config._attn_implementation == before
        assert not model.get_decoder()._forward_hooks
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_opt_counts_tokens_in_the_mask() -> None:
    """With padding on the left and no positions, as OPT itself does."""
    model = made(*SERVED["opt"])
    calibration, ids = oblivious(model), random_ids(1, 20)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), dim=1)
    mask = (torch.arange(23) >= 3).long()[None]
    cache, found = PackedCache(model, calibration), []
    for start, end in ((0, 13), (13, 14), (14, 23)):
        output = model(
            input_ids=padded[:, start:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
        )
        found.append(output.logits)
    alone = PackedCache(model, calibration)
    expected = [
        model(input_ids=part, past_key_values=alone).logits for part in ids.split([10, 1, 9], 1)
    ]
    torch.testing.assert_close(torch.cat(found, 1)[:, 3:], torch.cat(expected, 1))
    assert cache.sequences.firsts == [0]


def test_training_modes_are_left_alone() -> None:
    model = made("LlamaConfig", {"attention_dropout": 0.5}).train()
    model.model.layers[0].eval()
    PackedCache(model, oblivious(model))
    assert model.model.layers[1].training
    assert not model.model.layers[0].self_attn.training


def test_what_fails_otherwise_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("LlamaConfig", {})

    def fail(*args: Any) -> None:
        raise IndexError("no such\nthing")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
    with pytest.raises(
        RotqError, match=r"llama: no cache of rotq.s .* \(IndexError: no such thing\)"
    ):
        PackedCache(model, oblivious(model))
    monkeypatch.undo()
    stepwise(model, PackedCache(model, oblivious(model)), random_ids(1, 12))
