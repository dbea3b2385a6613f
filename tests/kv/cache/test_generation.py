"""generate() with packed keys and values gives the tokens of a dense cache of decoded codes."""

from typing import Any

import pytest
import torch
from kv_oracle import calibration_of, oracle_cache
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.kv.cache.packed_cache import PackedCache


def generate(model: Any, ids_BT: Tensor, cache: Any, **how: Any) -> Tensor:
    return model.generate(
        ids_BT,
        past_key_values=cache,
        generation_config=None,
        do_sample=how.pop("do_sample", False),
        max_new_tokens=how.pop("max_new_tokens", 25),
        eos_token_id=None,
        pad_token_id=0,
        **how,
    )


@pytest.mark.parametrize("recent", [0, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_tokens(family: str, recent: int) -> None:
    model = tiny_model(family)
    calibration = calibration_of(model, recent=recent)
    ids = random_ids(2, 11)
    found = generate(model, ids, PackedCache(model, calibration))
    assert torch.equal(found, generate(model, ids, oracle_cache(calibration)))


def test_sampled_tokens() -> None:
    model = tiny_model("llama")
    calibration = calibration_of(model)
    results = []
    for cache in (PackedCache(model, calibration), oracle_cache(calibration)):
        torch.manual_seed(3)
        results.append(
            generate(model, random_ids(2, 9), cache, do_sample=True, num_return_sequences=2)
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beams(family: str) -> None:
    model = tiny_model(family)
    calibration = calibration_of(model, recent=2)
    ids = random_ids(2, 21)
    cache = PackedCache(model, calibration)
    found = generate(model, ids, cache, num_beams=3, num_return_sequences=3)
    assert torch.equal(
        found, generate(model, ids, oracle_cache(calibration), num_beams=3, num_return_sequences=3)
    )


def test_left_padded_batch_generates_what_single_prompts_do() -> None:
    model = tiny_model("gemma3")
    calibration = calibration_of(model, recent=3)
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    for b, padding in enumerate((0, 4, 11)):
        ids[b, :padding], mask[b, :padding] = 0, 0
    found = generate(model, ids, PackedCache(model, calibration), attention_mask=mask)
    for b, padding in enumerate((0, 4, 11)):
        alone = ids[b : b + 1, padding:]
        expected = generate(model, alone, PackedCache(model, calibration))
        assert torch.equal(found[b, padding:], expected[0])


def test_second_turn_continues() -> None:
    model = tiny_model("qwen3")
    calibration = calibration_of(model)
    results = []
    for cache in (PackedCache(model, calibration), oracle_cache(calibration)):
        first = generate(model, random_ids(2, 9), cache, max_new_tokens=8)
        prompt = torch.cat((first, random_ids(2, 6, seed=5)), dim=1)
        results.append(generate(model, prompt, cache, max_new_tokens=8))
    assert torch.equal(*results)


def test_prefill_in_chunks() -> None:
    model = tiny_model("llama")
    calibration = calibration_of(model)
    ids = random_ids(2, 30)
    results = [
        generate(model, ids, cache, prefill_chunk_size=8)
        for cache in (PackedCache(model, calibration), oracle_cache(calibration))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("recent", [0, 4])
def test_prompt_lookup_takes_back_rejected_tokens(family: str, recent: int) -> None:
    model = tiny_model(family)
    calibration = calibration_of(model, recent=recent)
    ids = random_ids(1, 6).repeat(1, 5)
    results = [
        generate(model, ids, cache, prompt_lookup_num_tokens=3)
        for cache in (PackedCache(model, calibration), oracle_cache(calibration))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("recent", [0, 4])
def test_an_assistant_s_rejected_tokens_are_taken_back(recent: int) -> None:
    model, assistant = tiny_model("llama"), tiny_model("llama-tied")
    calibration = calibration_of(model, recent=recent)
    results = [
        generate(model, random_ids(1, 9), cache, assistant_model=assistant)
        for cache in (PackedCache(model, calibration), oracle_cache(calibration))
    ]
    assert torch.equal(*results)


def test_a_cache_by_name_and_one_in_hand_are_one_too_many() -> None:
    model = tiny_model("llama")
    cache = PackedCache(model, calibration_of(model))
    with pytest.raises(ValueError, match="use only one of the two"):
        generate(model, random_ids(1, 9), cache, cache_implementation="static")
