"""A forward pass that cannot be served is refused with a reason, and leaves the cache as it was."""

from typing import Any

import pytest
import torch
from kv_oracle import calibration_of
from tiny_models import random_ids, tiny_model

from rotq.errors import RotqError
from rotq.kv.cache.packed_cache import PackedCache

IDS = random_ids(2, 8)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def cache(model: Any) -> PackedCache:
    """Four columns, the first of sequence 0 is padding."""
    cache = PackedCache(model, calibration_of(model))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    model(input_ids=IDS[:, :4], attention_mask=mask, past_key_values=cache)
    return cache


MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
NEXT = {"input_ids": IDS[:, 4:6], "attention_mask": MASK}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": None}, "mask differs"),
        ({"attention_mask": MASK.flip(0)}, "mask differs"),
        ({"attention_mask": MASK[:, :2]}, "mask of shape"),
        ({"attention_mask": torch.ones(2, 1, 2, 6)}, "2-D attention mask"),
        ({"attention_mask": {"sliding_attention": MASK}}, "2-D attention mask"),
        ({"position_ids": torch.tensor([[4, 5], [4, 6]])}, "position 6 where 5 follows"),
        ({"position_ids": torch.zeros(2, 2, dtype=torch.int64)}, "where 4 follows"),
        ({"position_ids": torch.arange(4, 6).expand(3, 2, 2)}, "2-D positions"),
        ({"input_ids": IDS[:1, 4:6], "attention_mask": MASK[:1]}, "holds 2 sequences, the input 1"),
        ({"output_attentions": True}, "no attention weights"),
        ({"use_cache": False}, "use_cache=False runs all tokens again"),
    ],
)
@torch.no_grad()
def test_inputs(model: Any, cache: PackedCache, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RotqError, match=message):
        model.model(past_key_values=cache, **(NEXT | change))
    # nothing happened: the right input goes on
    assert cache.get_seq_length() == 4
    model.model(past_key_values=cache, **NEXT)


def generate(model: Any, **how: Any) -> None:
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(
        IDS, past_key_values=PackedCache(model, calibration_of(model)), **settings, **how
    )


@pytest.mark.parametrize("padding", [1, 6])
def test_padding_on_the_right(model: Any, padding: int) -> None:
    mask = torch.ones_like(IDS)
    mask[1, -padding:] = 0
    with pytest.raises(RotqError, match=r"sequence 1 .* padded on the right, .* pad on the left"):
        generate(model, attention_mask=mask)


@torch.no_grad()
def test_padding_on_the_right_without_positions(model: Any) -> None:
    cache, mask = PackedCache(model, calibration_of(model)), torch.ones_like(IDS)
    mask[0, 5:] = 0
    model(input_ids=IDS, attention_mask=mask, past_key_values=cache)
    mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), dim=1)
    with pytest.raises(RotqError, match="position 8 where 5 follows; it is padded on the right"):
        model(input_ids=IDS[:, :1], attention_mask=mask, past_key_values=cache)


def test_generating_without_a_cache(model: Any) -> None:
    with pytest.raises(RotqError, match="use_cache=False runs all tokens again"):
        generate(model, use_cache=False)


@torch.no_grad()
def test_positions_by_name_or_order(model: Any, cache: PackedCache) -> None:
    model.model(IDS[:, 4:6], MASK, torch.tensor([[4, 5], [4, 5]]), cache)
    assert cache.get_seq_length() == 6
    assert cache.sequences.counts == [5, 6]


@torch.no_grad()
def test_update_outside_of_the_model(cache: PackedCache) -> None:
    key = torch.zeros(2, 2, 1, 16)
    with pytest.raises(RotqError, match="outside of a forward pass"):
        cache.update(key, key, 0)


@torch.no_grad()
def test_two_updates_of_a_layer_in_one_pass(
    model: Any, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = PackedCache.update

    def twice(self: PackedCache, *args: Any) -> Any:
        update(self, *args)
        return update(self, *args)

    monkeypatch.setattr(PackedCache, "update", twice)
    with pytest.raises(RotqError, match="outside of a forward pass"):
        model(past_key_values=cache, **NEXT)


@torch.no_grad()
def test_other_window() -> None:
    model = tiny_model("mistral")
    cache = PackedCache(model, calibration_of(model))
    model.config.sliding_window = 6
    with pytest.raises(RotqError, match="attends to 6 tokens, its packed layer was made for 5"):
        model(input_ids=IDS, past_key_values=cache)


@torch.no_grad()
def test_other_model(model: Any, cache: PackedCache) -> None:
    other = tiny_model("llama", seed=1)
    with pytest.raises(RotqError, match="outside of a forward pass"):
        other(past_key_values=cache, **NEXT)
    PackedCache(other, calibration_of(other))
    with pytest.raises(RotqError, match="for another model"):
        other(past_key_values=cache, **NEXT)
    with pytest.raises(RotqError, match="made for another model"):
        PackedCache(tiny_model("qwen3"), calibration_of(model))


@torch.no_grad()
def test_other_attention(model: Any, cache: PackedCache) -> None:
    model.set_attn_implementation("eager")
    with pytest.raises(RotqError, match="attention is now 'eager'"):
        model(past_key_values=cache, **NEXT)


@torch.no_grad()
def test_keys_changed_after_the_cache(
    model: Any, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = PackedCache.update

    def changed(self: PackedCache, *args: Any) -> Any:
        key, value = update(self, *args)
        return key * 2, value

    monkeypatch.setattr(PackedCache, "update", changed)
    with pytest.raises(RotqError, match="changes keys after the cache"):
        model(past_key_values=cache, **NEXT)


@torch.no_grad()
def test_forward_pass_that_failed_halfway(
    model: Any, cache: PackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            model(past_key_values=cache, **NEXT)
    with pytest.raises(RotqError, match=r"failed halfway; call reset\(\)"):
        model(past_key_values=cache, **NEXT)
    cache.reset()
    model(input_ids=IDS, past_key_values=cache)


@torch.no_grad()
def test_layer_that_is_skipped(model: Any, cache: PackedCache) -> None:
    model.model.layers = model.model.layers[:1]
    with pytest.raises(RotqError, match="layer 1 of the model did not attend"):
        model(past_key_values=cache, **NEXT)


def test_gradients(model: Any) -> None:
    model.requires_grad_(True)
    cache = PackedCache(model, calibration_of(model))
    with pytest.raises(RotqError, match="inference"):
        model(input_ids=IDS, past_key_values=cache)


def test_is_not_compiled(model: Any) -> None:
    cache = PackedCache(model, calibration_of(model))
    assert not cache.is_compileable
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(IDS, past_key_values=cache, cache_implementation="static", max_new_tokens=2)
