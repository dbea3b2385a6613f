"""Layers coded as one get the codes that each would get."""

from dataclasses import replace

import pytest
import torch
from kv_cases import transform_of
from kv_oracle import calibration_of, calibration_with, oracle_cache
from tiny_models import random_ids, tiny_model

from rotq.kv.cache import encoded_layer
from rotq.kv.cache.batched_encoding import BatchedEncoder, batched_encoders
from rotq.kv.cache.layer import PackedLayer
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.cache.pages import PageTable
from rotq.kv.cache.placement import Placement
from rotq.kv.cache.sequences import Sequences
from rotq.ops import KVConstants, KVFormat

FORM = KVFormat(head_dim=16, k_bits=3, v_bits=4, page_size=16)
PLACEMENT = Placement(
    sequences=Sequences(sinks=0, recent=0), table=PageTable(page_size=16), window=0
)


def number_of_kinds(*transforms: KVConstants) -> int:
    calibration = calibration_with(*transforms)
    layers = [PackedLayer(calibration, index, PLACEMENT) for index in calibration.layers]
    return len(batched_encoders(layers, calibration))


def test_kinds() -> None:
    transform = transform_of(FORM, 2)
    assert number_of_kinds(transform, transform_of(FORM, 2, seed=5)) == 1
    assert transform.inv_freq_R is not None
    for other in (
        transform_of(replace(FORM, k_bits=4), 2),
        transform_of(FORM, 2, mean="static"),
        transform_of(FORM, 2, gain="norm"),
        replace(transform, inv_freq_R=2 * transform.inv_freq_R),
        replace(transform, rotary_scale=1.5),
        replace(transform, key=replace(transform.key, gain="norm")),
        replace(transform, value=replace(transform.value, gain="norm")),
    ):
        assert number_of_kinds(transform, other, transform) == 2
    with_residual = transform_of(replace(FORM, residual="sign"), 2)
    assert number_of_kinds(with_residual, with_residual) == 2


@torch.no_grad()
def test_caches_of_a_calibration_share_its_constants() -> None:
    model = tiny_model("llama")
    calibration = calibration_of(model)
    first, second, other = (
        PackedCache(model, given) for given in (calibration, calibration, calibration_of(model))
    )
    for cache in (first, second, other):
        model(input_ids=random_ids(1, 4), past_key_values=cache)
    codecs = [cache._encoders[0].codec for cache in (first, second, other)]
    assert codecs[0] is codecs[1]
    assert codecs[0] is not codecs[2]


@pytest.mark.parametrize("residual", ["none", "sign", "qjl"])
@torch.no_grad()
def test_layers_of_other_kinds(residual: str) -> None:
    model = tiny_model("llama")
    calibration = calibration_of(model, residual=residual)
    other = calibration_of(model, name="k8v3")
    calibration.layers[1] = other.layers[1]
    ids = random_ids(2, 30)
    found, expected = (
        torch.cat(
            [model(input_ids=part, past_key_values=cache).logits for part in ids.split(1, dim=1)],
            dim=1,
        )
        for cache in (PackedCache(model, calibration), oracle_cache(calibration))
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("batch", "length"), [(1, 100), (4, 32), (1, 200), (5, 30)])
@torch.no_grad()
def test_a_short_prompt_is_coded_for_all_layers_at_once(
    batch: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    calibration = calibration_of(model)
    pages, postponed = [], list[list[bool]]()
    encode_rest = BatchedEncoder.encode

    def encode(encoder: BatchedEncoder) -> None:
        postponed.append([layer.uncoded is not None for layer in encoder.layers])
        encode_rest(encoder)

    monkeypatch.setattr(BatchedEncoder, "encode", encode)
    for short in (encoded_layer.SHORT, 0):
        monkeypatch.setattr(encoded_layer, "SHORT", short)
        cache = PackedCache(model, calibration)
        postponed.clear()
        model(input_ids=random_ids(batch, length), past_key_values=cache)
        assert postponed == [[batch * length <= short] * len(cache.layers)]
        pages.append([held for layer in cache.layers for held in layer.pages.tensors()])
    for found, expected in zip(*pages, strict=True):
        assert torch.equal(found, expected)
