"""Packed keys and values of a text decoder that images are written into."""

import pytest
import torch
from kv_oracle import oracle_cache
from tiny_multimodal import image_inputs, tiny_multimodal

from rotq.errors import RotqError
from rotq.kv.cache.masks import plain_mask
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset
from rotq.models.multimodal import text_model

CAUSAL_TN = torch.ones(2, 5, dtype=torch.bool).tril(3)


def generated(model, cache, inputs):
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            past_key_values=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )


@pytest.mark.parametrize("name", ["qwen3_vl", "mistral3", "idefics3"])
def test_generates_after_an_image(name):
    plain, model = tiny_multimodal(name), tiny_multimodal(name)
    calibration, inputs = data_oblivious(model.config, preset("k8v3")), image_inputs(model)
    expected = generated(plain, oracle_cache(calibration), inputs)
    found = generated(model, PackedCache(model, calibration), inputs)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert text_model(model).config._attn_implementation == "rotq_packed"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_masks_that_are_made_in_front_of_the_decoder():
    plain, model = tiny_multimodal("gemma3"), tiny_multimodal("gemma3")
    calibration = data_oblivious(model.config, preset("k8v3"))
    ids_BT = torch.arange(40).view(2, 20) * 7 % 200 + 3
    mask_BT = torch.ones(2, 20, dtype=torch.int64)
    mask_BT[0, :5] = 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    found = generated(model, PackedCache(model, calibration), inputs)
    # the oracle takes padding for tokens
    for row, ids_T in enumerate((ids_BT[0, 5:], ids_BT[1])):
        expected = generated(plain, oracle_cache(calibration), {"input_ids": ids_T[None]})
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], rtol=1e-3, atol=1e-3)
    # the tokens of an image see each other
    with pytest.raises(RotqError, match="causal, and in this pass tokens see later ones"):
        model(**image_inputs(model), past_key_values=PackedCache(model, calibration))


def test_a_causal_mask_says_which_columns_are_tokens():
    there_BN = torch.tensor([[False, True, True, True, True], [True] * 5])
    mask = (CAUSAL_TN & there_BN[:, None])[:, None]
    assert torch.equal(plain_mask(mask, 2), there_BN)
    both = {"full_attention": mask, "sliding_attention": mask.flip(-1)}
    assert torch.equal(plain_mask(both, 2), there_BN)
    assert plain_mask({"full_attention": None, "sliding_attention": None}, 2) is None


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 2, 5, dtype=torch.bool),
        (CAUSAL_TN & (torch.arange(5) != 2))[None, None] | (torch.arange(2) == 0)[:, None],
        {"sliding_attention": CAUSAL_TN[None, None]},
        torch.zeros(2, 1, 2, 5),
    ],
    ids=["all", "hole", "window", "floats"],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(RotqError, match=r"causal|2-D attention mask"):
        plain_mask(mask, 2)
