"""Figures of a packed cache on a text."""

from dataclasses import replace

import pytest
import torch
from kv_oracle import calibration_of
from tiny_models import VOCAB, random_ids, tiny_model
from tiny_readers import BYTES, reader

from rotq.errors import RotqError
from rotq.evaluation.kv import bits_per_element, evaluate_kv
from rotq.evaluation.perplexity import Protocol, evaluate
from rotq.evaluation.quantized_history import KVScheme, scheme_of
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset

MODEL = tiny_model("llama", dtype=torch.float32)
IDS_N = random_ids(1, 100)[0]
PROTOCOL = Protocol(windows=3, seq_len=20)


def scheme(**changes: int) -> KVScheme:
    return replace(scheme_of(calibration_of(MODEL)), **changes)


def test_exact_cache_costs_nothing() -> None:
    found = evaluate_kv(MODEL, IDS_N, [scheme(sinks=20)], protocol=PROTOCOL)[0]
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert (found.top1, found.ppl_ratio) == (1.0, pytest.approx(1, abs=1e-5))
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert max(found.attention_error) < 1e-8
    assert found.bits_per_element == 32


def test_reference_is_that_of_eval_ppl() -> None:
    found = evaluate_kv(MODEL, IDS_N, [scheme()], protocol=PROTOCOL)[0]
    expected = evaluate(MODEL, IDS_N, protocol=PROTOCOL)
    assert found.reference_ppl == pytest.approx(expected.ppl, rel=1e-6)
    assert (found.tokens, found.sinks, found.recent) == (57, 2, 0)
    assert found.ppl == pytest.approx(found.reference_ppl * found.ppl_ratio)
    assert found.kl > 0.01
    assert 0 < found.top1 < 1
    assert 0 < found.cosine < 1
    assert len(found.attention_error) == 2
    assert "stepwise cache; windowed: first 3" in found.protocol


def test_kl_by_position_and_flips_are_parts_of_the_whole() -> None:
    protocol = Protocol(windows=3, seq_len=25)
    found = evaluate_kv(MODEL, IDS_N, [scheme()], protocol=protocol)[0]
    assert len(found.kl_by_position) == 8
    assert sum(found.kl_by_position) / 8 == pytest.approx(found.kl)
    assert found.flips == pytest.approx(1 - found.top1)
    assert found.kl_p50 < found.kl_p99 <= found.kl_p999
    # the first positions see sinks only
    assert found.kl_by_position[0] < found.kl


def test_passes_of_several_tokens_cost_less_than_decoding() -> None:
    found = [
        evaluate_kv(MODEL, IDS_N, [scheme()], protocol=PROTOCOL, chunk=chunk)[0]
        for chunk in (1, 5, 20)
    ]
    assert found[0].kl > found[1].kl > found[2].kl == pytest.approx(0, abs=1e-6)
    assert [row.chunk for row in found] == [1, 5, 20]
    assert "cache in passes of 5 tokens" in found[1].protocol


def test_schemes_do_not_touch_each_other() -> None:
    seen = []
    both = evaluate_kv(
        MODEL,
        IDS_N,
        [scheme(), replace(scheme(recent=4), name="other")],
        protocol=PROTOCOL,
        on_window=lambda done, total: seen.append((done, total)),
    )
    alone = evaluate_kv(MODEL, IDS_N, [scheme()], protocol=PROTOCOL)
    assert both[0] == alone[0]
    assert [found.preset for found in both] == ["k3v3", "other"]
    assert both[1].kl < both[0].kl
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_bits_count_what_is_kept_whole() -> None:
    held = KVScheme(name="x", coders={}, sinks=4, recent=0, stored_bits=3.125, elements=128)
    assert bits_per_element(held, 1024, torch.float16) == (1020 * 3.125 + 4 * 16) / 1024
    assert bits_per_element(held, 1024, torch.float32) < 3.25
    assert bits_per_element(replace(held, recent=128), 1024, torch.float16) > 4.5
    assert bits_per_element(held, 3, torch.float16) == 16
    found = evaluate_kv(MODEL, IDS_N, [scheme()], protocol=PROTOCOL)[0]
    # head_dim 16: two words for 16 codes of 3 bits, padded to 32, and 8 bits of norm
    assert found.bits_per_element == pytest.approx((18 * 6.5 + 2 * 32) / 20)
    assert found.bytes_per_token == 6.5 * 128 / 8


def test_too_short() -> None:
    with pytest.raises(RotqError, match="text is too short"):
        evaluate_kv(MODEL, IDS_N, [scheme()], protocol=Protocol(windows=6, seq_len=20))


def test_foreign_ids_and_positions_are_settled_before_the_first_window() -> None:
    bounded = reader("gpt2", n_positions=64)
    seen: list[int] = []
    bounded.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    schemes = [scheme_of(data_oblivious(bounded.config, preset("turboquant")))]
    ids_N = random_ids(1, 200)[0]
    found = evaluate_kv(bounded, ids_N, schemes, protocol=Protocol(windows=2, seq_len=90))[0]
    assert set(seen) == {64}
    assert found.tokens == 2 * 63
    seen.clear()
    ids_N[100] = BYTES
    with pytest.raises(RotqError, match=f"token id {BYTES} is outside"):
        evaluate_kv(bounded, ids_N, schemes, protocol=Protocol(windows=2, seq_len=64))
    assert seen == []


def test_logits_that_are_not_finite() -> None:
    broken = tiny_model("llama", dtype=torch.float32)
    broken.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(RotqError, match="logits are not finite"):
        evaluate_kv(broken, IDS_N, [scheme()], protocol=PROTOCOL)
    assert int(IDS_N.max()) < VOCAB
