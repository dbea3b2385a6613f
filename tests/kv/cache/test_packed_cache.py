"""PackedCache in the model and under generate(), against a dense cache of decoded codes."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from kv_oracle import calibration_of, oracle_cache
from tiny_models import random_ids, tiny_model
from torch import Tensor
from transformers import DynamicCache

import rotq.kv
from rotq.errors import RotqError
from rotq.evaluation.quantized_history import QuantizedHistory, scheme_of
from rotq.kv.cache.attention import attention
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset
from rotq.models.attention.replaced import replaced_attention

FAMILIES = ["llama", "mistral", "qwen3", "gemma3", "mixtral"]


def logits_of(
    model: Any,
    cache: Any,
    ids_BT: Tensor,
    chunks: list[int],
    mask_BT: Tensor | None = None,
    position_BT: Tensor | None = None,
) -> Tensor:
    """Logits of all columns, fed in chunks of these lengths."""
    found, at = [], 0
    for length in chunks:
        now = slice(at, at + length)
        at += length
        logits = model(
            input_ids=ids_BT[:, now],
            past_key_values=cache,
            attention_mask=None if mask_BT is None else mask_BT[:, :at],
            position_ids=None if position_BT is None else position_BT[:, now],
        ).logits
        found.append(logits)
    assert at == ids_BT.shape[1]
    return torch.cat(found, dim=1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stepwise_equals_decoded_history(family: str, recent: int) -> None:
    model = tiny_model(family)
    calibration = calibration_of(model, recent=recent)
    ids, chunks = random_ids(2, 40), [7, *[1] * 20, 2, 9, 1, 1]
    expected = logits_of(model, oracle_cache(calibration), ids, chunks)
    found = logits_of(model, PackedCache(model, calibration), ids, chunks)
    assert_close(found, expected)
    plain = model(input_ids=ids).logits
    assert (found - plain).abs().max() > 0.01


@pytest.mark.parametrize("residual", ["none", "sign", "qjl"])
@torch.no_grad()
def test_evaluation_measures_what_stepwise_decoding_does(residual: str) -> None:
    model = tiny_model("qwen3", dtype=torch.float32)
    calibration = calibration_of(model, residual=residual)
    ids = random_ids(1, 40)
    with replaced_attention(model, QuantizedHistory(scheme_of(calibration))):
        expected = model(input_ids=ids).logits
    found = logits_of(model, PackedCache(model, calibration), ids, [1] * 40)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_default_positions_and_left_padding_without_positions() -> None:
    """Without position_ids transformers counts columns: sequences start after their padding."""
    model = tiny_model("llama")
    calibration = calibration_of(model)
    ids = random_ids(1, 24)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids), dim=1)
    mask = (torch.arange(29) >= 5).long()[None]
    chunks = [9, 1, 1, 6, 12]
    found = logits_of(model, PackedCache(model, calibration), padded, chunks, mask)
    cache = PackedCache(model, calibration)
    at = 0
    for length in [4, 1, 1, 6, 12]:
        now = slice(at, at + length)
        at += length
        expected = model(
            input_ids=ids[:, now],
            position_ids=torch.arange(5, 29)[None, now],
            past_key_values=cache,
        ).logits
        assert_close(found[:, now.start + 5 : now.stop + 5], expected)


@pytest.mark.parametrize("recent", [0, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_ragged_batches_equal_single_sequences(family: str, recent: int) -> None:
    """Padding on the left, on the right of a turn, and a sequence that joins in the second turn."""
    model = tiny_model(family)
    calibration = calibration_of(model, recent=recent)
    ids = random_ids(3, 34)
    there = torch.ones(3, 34, dtype=torch.int64)
    there[0, :6] = 0
    there[1, 12:15] = 0
    there[2, :15] = 0
    position = (there.cumsum(1) - 1).clamp(min=0)
    chunks = [15, 1, 1, 8, *[1] * 9]
    found = logits_of(model, PackedCache(model, calibration), ids, chunks, there, position)
    for b in range(3):
        cache, at = PackedCache(model, calibration), 0
        for length in chunks:
            columns = torch.arange(at, at + length)
            at += length
            columns = columns[there[b, columns] == 1]
            if columns.numel():
                expected = model(input_ids=ids[b : b + 1, columns], past_key_values=cache).logits
                assert_close(found[b : b + 1, columns], expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("recent", [0, 5])
@pytest.mark.parametrize("columns", [1, 20])
@torch.no_grad()
def test_crop_leaves_no_trace(family: str, recent: int, columns: int) -> None:
    """Also where whole pages, the recent window and sinks are taken back."""
    model = tiny_model(family)
    calibration = calibration_of(model, recent=recent, sinks=3)
    ids, more = random_ids(2, 30), random_ids(2, columns, seed=9)
    for kept in (1, 21):
        cache = PackedCache(model, calibration)
        logits_of(model, cache, ids[:, :kept], [kept])
        expected = logits_of(model, copy.deepcopy(cache), ids[:, kept:], [2, 1, 1, 26 - kept])
        cache.activate_past_recording()
        logits_of(model, cache, more, [columns])
        cache.crop(-columns)
        assert cache.get_seq_length() == kept
        assert_close(logits_of(model, cache, ids[:, kept:], [2, 1, 1, 26 - kept]), expected)


@torch.no_grad()
def test_crop_without_recording_is_exact_or_refused() -> None:
    model = tiny_model("llama")
    cache = PackedCache(model, calibration_of(model))
    assert cache.is_croppable
    logits_of(model, cache, random_ids(1, 40), [40])
    cache.crop(-30)
    assert cache.get_seq_length() == 10
    model = tiny_model("mistral")
    for recent in (0, 4):
        cache = PackedCache(model, calibration_of(model, recent=recent))
        assert not cache.is_croppable
        logits_of(model, cache, random_ids(1, 40), [40])
        with pytest.raises(RotqError, match="activate_past_recording"):
            cache.crop(-30)
        # refused as a whole
        assert cache.get_seq_length() == 40
        model(input_ids=random_ids(1, 1), past_key_values=cache)


@torch.no_grad()
def test_from_a_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    calibration = data_oblivious(model.config, preset("k4v3"))
    calibration.save(tmp_path / "kv.safetensors")
    ids = random_ids(1, 20)
    found, expected = (
        logits_of(model, rotq.kv.PackedCache(model, given), ids, [10] * 2)
        for given in (tmp_path / "kv.safetensors", calibration)
    )
    assert_close(found, expected)
    with pytest.raises(RotqError, match="no such file"):
        PackedCache(model, str(tmp_path / "other.safetensors"))


@torch.no_grad()
def test_reset_is_a_new_cache() -> None:
    model = tiny_model("gemma3")
    calibration = calibration_of(model, recent=3)
    cache, ids = PackedCache(model, calibration), random_ids(2, 30)
    expected = logits_of(model, cache, ids, [20, 10])
    cache.reset()
    assert cache.report().packed == cache.report().whole == cache.report().tokens == 0
    assert_close(logits_of(model, cache, ids, [20, 10]), expected)


@torch.no_grad()
def test_copied_deeply_or_not_at_all() -> None:
    model = tiny_model("gemma3")
    cache, ids = PackedCache(model, calibration_of(model, recent=3)), random_ids(2, 30)
    logits_of(model, cache, ids[:, :20], [20])
    for attempt in (pickle.dumps, copy.copy, lambda held: torch.save(held, io.BytesIO())):
        with pytest.raises(RotqError, match=r"cannot be pickled; copy\.deepcopy copies it"):
            attempt(cache)
    copied = copy.deepcopy(cache)
    expected = logits_of(model, cache, ids[:, 20:], [1] * 10)
    assert copied.get_seq_length() == 20
    assert torch.equal(logits_of(model, copied, ids[:, 20:], [1] * 10), expected)


@torch.no_grad()
def test_a_model_that_had_a_cache_can_be_pickled_and_saved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    PackedCache(model, calibration_of(model))
    again = pickle.loads(pickle.dumps(model))
    ids = random_ids(1, 20)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    logits_of(again, PackedCache(again, calibration_of(again)), ids, [10, *[1] * 10])
    model.save_pretrained(tmp_path)
    assert "rotq_packed" not in (tmp_path / "config.json").read_text()


@torch.no_grad()
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_keys_and_values_have_a_shape_and_cannot_be_read(family: str) -> None:
    model = tiny_model(family, dtype=torch.float32)
    cache = PackedCache(model, calibration_of(model))
    assert cache.layers[0].keys is None
    model(input_ids=random_ids(2, 9), past_key_values=cache)
    model(input_ids=random_ids(2, 1), past_key_values=cache)
    for layer in cache.layers:
        for handle in (layer.keys, layer.values):
            assert (handle.shape, handle.dtype) == ((2, 2, 10, 16), torch.float32)
            with pytest.raises(RotqError, match="packed keys and values met aten"):
                handle.sum()
    q = torch.zeros(2, 4, 1, 16)
    with pytest.raises(RotqError, match="have a shape only; pass the cache itself"):
        attention(model.model.layers[0].self_attn, q, handle, handle, None)
    cache.reset()
    assert cache.layers[0].values is None


def test_other_caches_still_work() -> None:
    model = tiny_model("gemma3")
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :5] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
    PackedCache(model, calibration_of(model))
    assert model.config._attn_implementation == "rotq_packed"
    found = logits_of(model, DynamicCache(config=model.config), ids, [12, 1, 7], mask, position)
    assert_close(found[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_model_in_low_precision(dtype: torch.dtype) -> None:
    ids, chunks = random_ids(1, 30), [20, *[1] * 10]
    exact = tiny_model("llama")
    calibration = calibration_of(exact, recent=2)
    expected = logits_of(exact, oracle_cache(calibration), ids, chunks)
    model = tiny_model("llama", dtype=dtype)
    found = logits_of(model, PackedCache(model, calibration), ids, chunks)
    assert found.dtype == dtype
    baseline = logits_of(model, oracle_cache(calibration), ids, chunks)
    worst = (baseline.double() - expected).abs().max()
    assert (found.double() - expected).abs().max() <= 2 * worst + 1e-5
