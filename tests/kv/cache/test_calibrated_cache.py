"""A fitted calibration in the packed cache gives what the evaluation measures."""

from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model

from rotq.evaluation.quantized_history import QuantizedHistory, scheme_of
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.calibration.file import load_calibration
from rotq.kv.presets import preset
from rotq.models.attention.replaced import replaced_attention


@pytest.mark.parametrize("name", ["k3v3", "k4v2", "k8v3"])
def test_decoding_is_what_was_measured(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    calibrate(model, random_ids(3, 48), preset("k3v3")).save(tmp_path / "kv")
    held = load_calibration(tmp_path / "kv", model.config).under(preset(name))
    assert held.layers[0].key.search == 4
    ids_BT = random_ids(1, 24, seed=5)
    with torch.inference_mode(), replaced_attention(model, QuantizedHistory(scheme_of(held))):
        expected = model(ids_BT, use_cache=False).logits[0]
    cache = PackedCache(model, held)
    with torch.inference_mode():
        steps = [model(ids_BT[:, t : t + 1], past_key_values=cache) for t in range(24)]
    found = torch.cat([step.logits[0] for step in steps])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    with torch.inference_mode():
        exact = model(ids_BT, use_cache=False).logits[0]
    if name != "k8v3":
        assert (exact - expected).abs().max() > 0.1
