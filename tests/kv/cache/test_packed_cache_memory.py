"""What a packed cache allocates: shared pages, released pages, bits at a long context."""

import torch
from kv_oracle import calibration_of
from tiny_models import random_ids, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset


@torch.no_grad()
def test_beams_share_their_pages() -> None:
    model = tiny_model("llama")
    cache = PackedCache(model, calibration_of(model))
    model(input_ids=random_ids(1, 2 + 5 * 16), past_key_values=cache)
    before = cache.report().packed
    cache.batch_repeat_interleave(4)
    model(input_ids=random_ids(4, 1), past_key_values=cache)
    # five full pages are shared, and each beam starts its own
    assert cache.report().packed <= before * 9 / 5


@torch.no_grad()
def test_pages_behind_the_window_are_released() -> None:
    model = tiny_model("mistral")
    cache = PackedCache(model, calibration_of(model))
    for part in random_ids(1, 64).split([40, *[1] * 24], dim=1):
        model(input_ids=part, past_key_values=cache)
    (placement,) = cache.placements
    # 5 visible tokens lie in at most two pages of 16
    assert placement.table.num_pages <= 3


@torch.no_grad()
def test_allocated_memory_at_long_context() -> None:
    """k3v3 at head_dim 64 and the store's own page size: 9.8 x below fp32, 4.9 x below fp16."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = PackedCache(model, data_oblivious(config, preset("k3v3")))
    for length in (4096, 2000, 1, 1):
        model.model(input_ids=random_ids(1, length), past_key_values=cache)
    report = cache.report()
    dense = DynamicCache(config=config)
    model.model(input_ids=random_ids(1, 64), past_key_values=dense)
    dense_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    assert dense_bytes / 64 * report.tokens == report.elements * 4
    allocated = [
        tensor
        for layer in cache.layers
        for tensor in (*layer.store.pages.tensors(), *layer.sinks, *layer.recent)
    ]
    tables = [placement.table.tensor() for placement in cache.placements]
    assert report.total >= sum(
        tensor.untyped_storage().nbytes() for tensor in (*allocated, *tables)
    )
    assert report.total == cache.nbytes
    assert report.below(torch.float32) >= 9.8
    assert report.below(torch.float16) >= 4.9
    assert report.bits_per_element <= 32 / 9.8
