"""Whole windows give what decoding token by token gives."""

from dataclasses import replace

import pytest
import torch
from kv_oracle import calibration_of, oracle_cache
from tiny_models import random_ids, tiny_model

from rotq.errors import RotqError
from rotq.evaluation.quantized_history import QuantizedHistory, mixed_attention, scheme_of
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset
from rotq.models.attention.replaced import attend, replaced_attention, visible


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
@pytest.mark.parametrize("recent", [0, 3])
def test_equals_decoding_step_by_step(family: str, recent: int) -> None:
    model = tiny_model(family, dtype=torch.float32)
    calibration = calibration_of(model, sinks=2, recent=recent)
    ids_BT = random_ids(1, 14)
    # chunks shorter than the window, and one that does not divide it
    history = QuantizedHistory(scheme_of(calibration), chunk=4)
    with torch.inference_mode(), replaced_attention(model, history):
        found = model(ids_BT, use_cache=False).logits[0]
    cache = oracle_cache(calibration)
    with torch.inference_mode():
        steps = [model(ids_BT[:, t : t + 1], past_key_values=cache) for t in range(14)]
    expected = torch.cat([step.logits[0] for step in steps])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    with torch.inference_mode():
        exact = model(ids_BT, use_cache=False).logits[0]
    assert (exact - expected).abs().max() > 0.05
    assert len(history.attention_error) == 2
    assert all(0 < error < 1 for error in history.attention_error)


def test_passes_of_several_tokens_equal_a_cache_that_is_run_in_chunks() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    ids_BT = random_ids(1, 22)
    found, expected = [], []
    for recent in (0, 5):
        calibration = calibration_of(model, sinks=2, recent=recent)
        history = QuantizedHistory(scheme_of(calibration), step=6, chunk=5)
        with torch.inference_mode(), replaced_attention(model, history):
            found.append(model(ids_BT, use_cache=False).logits[0])
        cache = oracle_cache(calibration)
        with torch.inference_mode():
            parts = [model(part, past_key_values=cache).logits[0] for part in ids_BT.split(6, 1)]
        expected.append(torch.cat(parts))
        torch.testing.assert_close(found[-1], expected[-1], rtol=0, atol=2e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.05


def test_chunks_do_not_matter() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    scheme = scheme_of(calibration_of(model, sinks=1))
    ids_BT = random_ids(2, 11)
    logits, errors = [], []
    for chunk in (3, 64):
        history = QuantizedHistory(scheme, chunk=chunk)
        with torch.inference_mode(), replaced_attention(model, history):
            logits.append(model(ids_BT, use_cache=False).logits)
        errors.append(history.attention_error)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_all_recent_is_exact() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    calibration = calibration_of(model, recent=50)
    history = QuantizedHistory(scheme_of(calibration), chunk=4)
    ids_BT = random_ids(1, 12)
    with torch.inference_mode():
        expected = model(ids_BT, use_cache=False).logits
        with replaced_attention(model, history):
            found = model(ids_BT, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_mixed_attention_of_equal_sides_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 3, 4, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 9, 8, generator=generator)
    visible_QS = visible(5, 4, 6)
    expected = attend(q, k, v, visible_QS)
    for recent in (0, 2, 20):
        found = mixed_attention(q, (k, v), (k, v), visible_QS, recent=recent)
        torch.testing.assert_close(found, expected)


def test_error_before_anything_ran() -> None:
    config = tiny_model("llama").config
    history = QuantizedHistory(scheme_of(data_oblivious(config, preset("turboquant"))))
    with pytest.raises(RotqError, match="attention of layer 0 did not run"):
        _ = history.attention_error


def test_scheme_counts_bits() -> None:
    config = tiny_model("llama").config
    config.head_dim = 64
    ours = scheme_of(data_oblivious(config, preset("k3v3")))
    # 2 layers, 2 heads, keys and values of width 64
    assert (ours.stored_bits, ours.elements) == (3.125, 2 * 2 * 2 * 64)
    assert scheme_of(data_oblivious(config, preset("turboquant"))).stored_bits == 3.25
    edged = data_oblivious(config, replace(preset("k3v3"), boundary=1, boundary_bits=8))
    assert scheme_of(edged).stored_bits == 8.125
