"""Heads whose keys, values or queries are zero, as pruning leaves them, in every scheme."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_model

from rotq.evaluation.kv import evaluate_kv
from rotq.evaluation.perplexity import Protocol
from rotq.evaluation.quantized_history import scheme_of
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import calibrate, data_oblivious
from rotq.kv.calibration.codebook import integer_codebook
from rotq.kv.calibration.file import KVCalibration, load_calibration
from rotq.kv.codec import KVCodec
from rotq.kv.presets import PRESETS, preset

MODEL = tiny_model("llama", dtype=torch.float32)
IDS_BT = random_ids(2, 40)


def pruned(**rows: slice) -> Any:
    """The model with rows of projections of all layers set to zero."""
    model = copy.deepcopy(MODEL)
    for layer in model.model.layers:
        for name, part in rows.items():
            layer.self_attn.get_submodule(name).weight[part] = 0
    return model


FIRST, ALL = slice(0, 16), slice(None)
PRUNED = {
    "keys": {"k_proj": FIRST},
    "values": {"v_proj": FIRST},
    "queries": {"q_proj": slice(0, 32)},
    "all": {"q_proj": ALL, "k_proj": ALL, "v_proj": ALL},
}


def calibrations(model: Any, name: str, folder: Path) -> list[KVCalibration]:
    """Fitted, through a file; and without data, where that exists."""
    path = folder / "kv.safetensors"
    calibrate(model, IDS_BT, preset(name)).save(path)
    found = [load_calibration(path, model.config)]
    return found if name == "turboesm" else [*found, data_oblivious(model.config, preset(name))]


PARTS = itertools.cycle(["keys", "values", "queries"])


@pytest.mark.parametrize(
    ("name", "what"), [(name, what) for name in PRESETS for what in (next(PARTS), "all")]
)
@torch.no_grad()
def test_every_scheme_serves_them(tmp_path: Path, name: str, what: str) -> None:
    model = pruned(**PRUNED[what])
    ids = IDS_BT[:1]
    whole = model(input_ids=ids).logits[:, -1]
    for calibration in calibrations(model, name, tmp_path):
        cache = PackedCache(model, calibration)
        for t in range(ids.shape[1]):
            found = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits[:, -1]
        assert (found - whole).norm() < whole.norm()
        protocol = Protocol(windows=1, seq_len=40)
        figures = evaluate_kv(model, ids[0], [scheme_of(calibration)], protocol=protocol)[0]
        assert figures.kl < 1.5
        if what == "all":
            torch.testing.assert_close(found, whole)
            assert figures.attention_error == [0, 0]


@pytest.mark.parametrize("name", PRESETS)
def test_what_was_zero_comes_back_as_zero(tmp_path: Path, name: str) -> None:
    model = pruned(k_proj=FIRST, v_proj=FIRST)
    live_BHTD = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    live_BHTD[:, 0] = 0
    for calibration in calibrations(model, name, tmp_path):
        codec = KVCodec(calibration.layers[0])
        for side_BHTD in codec.fake_quantize(live_BHTD, live_BHTD, torch.arange(9)[None]):
            assert not side_BHTD[:, 0].any()
            assert side_BHTD[:, 1].any()


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_a_token_of_zeros(tmp_path: Path, name: str) -> None:
    """Its keys and values are zero in all heads, those of its neighbours are not."""
    model, ids = copy.deepcopy(MODEL), IDS_BT[:1]
    model.model.embed_tokens.weight[ids[0, 9]] = 0
    whole = model(input_ids=ids).logits[:, -1]
    for calibration in calibrations(model, name, tmp_path):
        cache = PackedCache(model, calibration)
        for t in range(ids.shape[1]):
            found = model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits[:, -1]
        assert (found - whole).norm() < 1.5 * whole.norm()


def test_levels_of_zeros_are_zeros() -> None:
    book = integer_codebook(torch.zeros(8))
    assert not book.levels_L.any()
    assert 0 < book.unit < 1e-30
