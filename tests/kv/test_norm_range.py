"""Norms reach wherever a model's keys and values are; the first tokens move them there."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_cases import transform_of
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.errors import RotqError
from rotq.evaluation.kv import evaluate_kv
from rotq.evaluation.perplexity import Protocol
from rotq.evaluation.quantized_history import scheme_of
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import calibrate, data_oblivious
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.codec import KVCodec
from rotq.kv.norm_range import NormReach, outgrown
from rotq.kv.presets import PRESETS, preset
from rotq.ops import KVFormat

MODEL = tiny_model("llama", dtype=torch.float32)
IDS = random_ids(1, 48, seed=3)
WITHOUT_DATA = [name for name in PRESETS if name != "turboesm"]


def scaled_model(keys: float, values: float) -> Any:
    """The same function, to the bit for powers of two; other keys and values."""
    model = copy.deepcopy(MODEL)
    for layer in model.model.layers:
        heads = layer.self_attn
        heads.k_proj.weight.mul_(keys)
        heads.q_proj.weight.div_(keys)
        heads.v_proj.weight.mul_(values)
        heads.o_proj.weight.div_(values)
    return model


@torch.no_grad()
def stepwise(model: Any, cache: PackedCache, ids: Tensor = IDS) -> Tensor:
    """Logits of every position."""
    steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache) for t in range(ids.shape[1])]
    return torch.cat([step.logits for step in steps], dim=1)


def without_data(model: Any, name: str) -> KVCalibration:
    return data_oblivious(model.config, preset(name))


FACTORS = [(1, 2**-14), (2**16, 2**30), (2**-14, 1), (2**-40, 2**-20)]


@pytest.mark.parametrize("number", range(len(WITHOUT_DATA)), ids=WITHOUT_DATA.__getitem__)
def test_a_factor_moved_between_weights_changes_no_bit(number: int) -> None:
    """Each scheme with a small move and a large one."""
    name = WITHOUT_DATA[number]
    expected = stepwise(MODEL, PackedCache(MODEL, without_data(MODEL, name)))
    for keys, values in FACTORS[number % 2 * 2 :][:2]:
        model = scaled_model(keys, values)
        assert torch.equal(stepwise(model, PackedCache(model, without_data(model, name))), expected)


@pytest.mark.parametrize("factor", [1e-2, 1e-3, 1e3])
def test_other_factors_cost_the_same(factor: float) -> None:
    kl = []
    for model in (MODEL, scaled_model(1, factor), scaled_model(factor, 1)):
        scheme = scheme_of(without_data(model, "k4v4"))
        found = evaluate_kv(model, IDS[0], [scheme], protocol=Protocol(windows=1, seq_len=48))
        kl.append(found[0].kl)
    assert max(kl) < 1.2 * kl[0]


@pytest.mark.parametrize("name", ["k3v3", "turboquant"])
def test_constants_of_other_weights_reach_as_far(name: str) -> None:
    """A calibration is bound to a configuration; weights may have changed since."""
    spec = replace(preset(name), mean="none", value_mean=False)
    calibration = calibrate(MODEL, random_ids(2, 40), spec)
    expected = stepwise(MODEL, PackedCache(MODEL, calibration))
    model = scaled_model(2**-12, 2**14)
    assert torch.equal(stepwise(model, PackedCache(model, calibration)), expected)


def test_what_is_in_reach_is_left_alone() -> None:
    for calibration in (without_data(MODEL, "k3v3"), without_data(MODEL, "turboquant")):
        cache = PackedCache(MODEL, calibration)
        stepwise(MODEL, cache)
        for index, layer in enumerate(cache.layers):
            assert layer.constants is calibration.layers[index]


def test_only_heads_out_of_reach_are_moved() -> None:
    constants = without_data(MODEL, "k3v3").layers[0]
    k_BHED = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    k_BHED[:, 1] *= 2.0**-20
    reach = NormReach(constants)
    reach.settle(k_BHED, k_BHED, torch.arange(9)[None])
    assert reach.is_settled
    found = reach.constants
    ratio_HDD = found.key.matrix_HDD / constants.key.matrix_HDD
    assert torch.equal(ratio_HDD[0], torch.ones(16, 16))
    assert float(ratio_HDD[1, 0, 0]).is_integer()
    assert 2.0**16 <= float(ratio_HDD[1, 0, 0]) <= 2.0**22
    assert torch.equal(found.key.inverse_HDD * ratio_HDD, constants.key.inverse_HDD)


@torch.no_grad()
def test_padding_does_not_decide() -> None:
    constants = without_data(MODEL, "k3v3").layers[0]
    k_BHED = torch.ones(1, 2, 4, 16)
    k_BHED[:, :, 0] = 1e9
    there_BE = torch.tensor([[False, True, True, True]])
    reach = NormReach(constants)
    reach.settle(k_BHED, k_BHED, torch.arange(4)[None], there_BE)
    assert reach.constants is constants


@pytest.mark.parametrize("name", ["k3v3", "turboquant-prod"])
def test_heads_of_zeros_come_back_as_zeros_until_they_are_something(name: str) -> None:
    model = copy.deepcopy(MODEL)
    first = 6
    # tokens without keys and values come first
    model.model.embed_tokens.weight[IDS[0, :first]] = 0
    ids = torch.cat((IDS[:, :first], IDS[:, :first], IDS[:, :2], IDS[:, first:]), dim=1)
    results = []
    for scale in (1.0, 2.0**-15):
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(scale)
            layer.self_attn.o_proj.weight.div_(scale)
        cache = PackedCache(model, without_data(model, name))
        before = stepwise(model, cache, ids[:, :14])
        assert torch.isfinite(before).all()
        codec = KVCodec(cache.layers[0].constants)
        zero_BHTD = torch.zeros(1, 2, 1, 16)
        codes = codec.encode(zero_BHTD, zero_BHTD, torch.zeros(1, 1, dtype=torch.int64))
        for side_BHTD in codec.decode(codes, torch.zeros(1, 1, dtype=torch.int64)):
            assert float(side_BHTD.abs().max()) < 1e-15
        found = stepwise(model, cache, ids[:, 14:])
        whole = model(input_ids=ids).logits[:, 14:]
        assert (found - whole).norm() < 1.5 * whole.norm()
        results.append(found)
    assert torch.equal(*results)


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("name", ["k3v3", "turboquant"])
def test_a_norm_that_outgrows_its_reach_is_refused(name: str, steps: int) -> None:
    """In a decode step and in a chunk that is coded at once."""
    model = copy.deepcopy(MODEL)
    cache = PackedCache(model, without_data(model, name))
    stepwise(model, cache)
    model.model.layers[1].self_attn.v_proj.weight.mul_(1e9)
    with pytest.raises(RotqError, match="hundreds of times larger than the first"), torch.no_grad():
        model(input_ids=IDS[:, :steps], past_key_values=cache)
    with pytest.raises(RotqError, match=r"call reset\(\)"):
        model(input_ids=IDS[:, :1], past_key_values=cache)
    cache.reset()
    stepwise(model, cache)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("name", ["k3v3", "turboquant"])
def test_what_is_not_finite_is_refused(name: str, steps: int, wrong: float) -> None:
    """Whatever it was that overflowed upstream, no text is made of it."""
    model = copy.deepcopy(MODEL)
    cache = PackedCache(model, without_data(model, name))
    stepwise(model, cache)
    model.model.layers[1].self_attn.v_proj.weight[3, 2] = wrong
    with pytest.raises(RotqError, match="are not finite"), torch.no_grad():
        model(input_ids=IDS[:, :steps], past_key_values=cache)


def test_the_largest_norm_there_is() -> None:
    there_BE = torch.tensor([[True, False]])
    for top, below in (
        (torch.tensor(255, dtype=torch.uint8), torch.tensor(254, dtype=torch.uint8)),
        (torch.tensor(torch.inf).half(), torch.tensor(65504.0).half()),
    ):
        assert outgrown(torch.stack((top, below)).view(1, 1, 2), there_BE)
        assert not outgrown(torch.stack((below, top)).view(1, 1, 2), there_BE)


def test_schemes_without_norms_are_left_alone() -> None:
    form = KVFormat(head_dim=16, k_bits=3, v_bits=3, norm="none")
    constants = transform_of(form, 2)
    k_BHED = torch.full((1, 2, 3, 16), 1e9)
    reach = NormReach(constants)
    reach.settle(k_BHED, k_BHED, torch.arange(3)[None])
    assert reach.is_settled
    assert reach.constants is constants
