"""ESM-2 token by token: the loop is the causal model, the packed cache its stepwise protocol."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from rotq.errors import RotqError
from rotq.evaluation.quantized_history import QuantizedHistory, scheme_of
from rotq.kv.cache.esm import EsmPackedCache, decode, int8_cache
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.presets import preset
from rotq.models.attention.replaced import AttentionCall, attend, replaced_attention, visible
from rotq.models.families.esm import as_decoder
from rotq.models.rotary import rotaries


def residues(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 24, (batch, length), generator=generator)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("esm-wide", dtype=torch.float32)


@pytest.fixture(scope="module")
def calibration(model: Any) -> KVCalibration:
    with as_decoder(model):
        return calibrate(model, residues(8, 48, seed=1), preset("k3v3"))


def causal(call: AttentionCall) -> Tensor:
    """Attention to the left, exact."""
    q, k, v = call.q_BHTD[:, :, None] * call.scale, call.k_BKTD, call.v_BKTD
    seen = visible(0, q.shape[3], 0)
    return attend(q, k, v, seen).flatten(1, 2).transpose(1, 2)


def in_one_pass(model: Any, ids_BT: Tensor, attention: Any) -> Tensor:
    with as_decoder(model), torch.no_grad(), replaced_attention(model, attention):
        logits: Tensor = model(ids_BT).logits
    return logits


@pytest.mark.parametrize("prefix", [1, 7])
def test_the_loop_is_the_causal_model(model: Any, prefix: int) -> None:
    ids_BT = residues(2, 20)
    with as_decoder(model):
        looped = decode(model, ids_BT, None, prefix=prefix)
    torch.testing.assert_close(looped, in_one_pass(model, ids_BT, causal), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(looped, model(ids_BT).logits, atol=0.1)


def test_the_packed_loop_is_the_stepwise_protocol(model: Any, calibration: KVCalibration) -> None:
    ids_BT = residues(2, 30)
    cache = EsmPackedCache(model, calibration)
    with as_decoder(model):
        looped = decode(model, ids_BT, cache)
        dense = decode(model, ids_BT, None)
    expected = in_one_pass(model, ids_BT, QuantizedHistory(scheme_of(calibration)))
    torch.testing.assert_close(looped, expected, rtol=1e-3, atol=1e-3)
    assert (looped - dense).abs().max() > 0.05
    report = cache.report()
    assert report.tokens == 60
    assert report.elements == 60 * 2 * 3 * 64


def test_int8_is_close_and_takes_nine_bits(model: Any) -> None:
    ids_BT = residues(1, 30)
    cache = int8_cache(3)
    with as_decoder(model):
        looped, dense = decode(model, ids_BT, cache), decode(model, ids_BT, None)
    assert 1e-5 < (looped - dense).abs().max() < 0.2
    # 16 elements and a scale of two bytes, for each head
    assert sum(layer.nbytes for layer in cache.layers) == 30 * 2 * 3 * 4 * (16 + 2)


def test_statistics_turn_keys_as_esm_does(model: Any) -> None:
    rotary = rotaries(model.config)[0]
    assert rotary is not None
    frequencies = model.esm.rotary_embeddings.inv_freq
    torch.testing.assert_close(rotary.inv_freq_R, frequencies)
    config = tiny_model("esm-wide").config
    config.position_embedding_type = "absolute"
    assert rotaries(config) == [None] * 3


def test_outside_of_the_context_nothing_has_changed(model: Any) -> None:
    attention = model.esm.encoder.layer[1].attention.self
    with as_decoder(model):
        assert (attention.layer_idx, attention.is_causal) == (1, True)
    assert (attention.layer_idx, attention.is_causal) == (None, False)


def test_what_is_refused(model: Any, calibration: KVCalibration) -> None:
    with (
        pytest.raises(RotqError, match="BertForMaskedLM is no ESM-2"),
        as_decoder(tiny_model("bert")),
    ):
        pass
    cache = EsmPackedCache(model, calibration)
    ids_BT = residues(1, 4)
    with as_decoder(model), pytest.raises(RotqError, match="without padding"), torch.no_grad():
        model(ids_BT, attention_mask=torch.ones_like(ids_BT), past_key_values=cache)
