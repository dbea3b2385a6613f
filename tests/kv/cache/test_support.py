"""Models and calibrations that packed keys and values cannot serve are refused with a reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from kv_oracle import calibration_of
from tiny_models import CONFIGS, random_ids, tiny_model

from rotq.errors import RotqError
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.cache.support import windows
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.calibration.model_hash import hash_config
from rotq.kv.presets import preset

IDS = random_ids(2, 8)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


def other_family(class_name: str, **changes: Any) -> Any:
    sizes = {**CONFIGS["llama"][1], "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, class_name)(**sizes, **heads, head_dim=16, **changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def oblivious(model: Any) -> KVCalibration:
    return data_oblivious(model.config, preset("k3v3"))


def test_softcap() -> None:
    model = other_family("Gemma2Config", query_pre_attn_scalar=16)
    with pytest.raises(RotqError, match="attn_logit_softcapping"):
        PackedCache(model, oblivious(model))
    assert model.config._attn_implementation != "rotq_packed"


@torch.no_grad()
def test_learned_sinks() -> None:
    model = other_family("GptOssConfig", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(RotqError, match="gpt_oss: packed attention has no s_aux"):
        PackedCache(model, oblivious(model))


@torch.no_grad()
def test_interleaved_rope_has_no_turning_mean() -> None:
    model = other_family("CohereConfig")
    calibration = oblivious(model)
    # without a mean that turns it does not matter how the model turns
    cache = PackedCache(model, calibration)
    model(input_ids=IDS, past_key_values=cache)
    model(input_ids=IDS[:, :1], past_key_values=cache)
    for layer in calibration.layers.values():
        layer.mean, layer.inv_freq_R = "rope", torch.ones(8)
    with pytest.raises(RotqError, match="not known to turn"):
        PackedCache(model, calibration)


def test_other_frequencies(model: Any) -> None:
    calibration = calibration_of(model)
    calibration.layers[1].inv_freq_R = calibration.layers[1].inv_freq_R * 1.01
    with pytest.raises(RotqError, match="layer 1 of the model is not known to turn"):
        PackedCache(model, calibration)


def test_missing_layer(model: Any) -> None:
    calibration = calibration_of(model)
    del calibration.layers[1]
    with pytest.raises(RotqError, match="every layer"):
        PackedCache(model, calibration)


def test_other_layers_than_attention() -> None:
    config = transformers.Lfm2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        full_attn_idxs=[1],
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    calibration = calibration_of(tiny_model("llama"), mean="static")
    calibration = replace(calibration, model_hash=hash_config(config))
    with pytest.raises(RotqError, match=r"no cache of rotq's for"):
        PackedCache(model, calibration)


def test_layers_of_a_kind_that_transformers_has_no_cache_for() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1)
    config.layer_types = ["heavily_compressed_attention"]
    with pytest.raises(RotqError, match="no cache of rotq's for layers of 'heavily_compressed"):
        windows(config)
