"""KV schemes of others: what their formulae promise."""

import pytest
import torch
from tiny_models import random_ids, tiny_model

from rotq.evaluation.kv import evaluate_kv
from rotq.evaluation.peers import PEERS, balanced, behind_sinks, round_last, scheme_of_peer
from rotq.evaluation.perplexity import Protocol
from rotq.kv.calibration.statistics import collect

MODEL = tiny_model("llama", dtype=torch.float32)


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_codes_a_model_and_errs_less_with_a_window(name: str) -> None:
    ids_BT = random_ids(4, 40)
    statistics = collect(MODEL, ids_BT, sinks=2) if PEERS[name].calibrated else []
    found = [
        evaluate_kv(
            MODEL,
            random_ids(1, 80)[0],
            [scheme_of_peer(PEERS[name], MODEL, statistics, sinks=2, recent=recent)],
            protocol=Protocol(windows=2, seq_len=40),
        )[0]
        for recent in (0, 30)
    ]
    # four layers at the ends are whole, and the tiny model has two in all
    whole = PEERS[name].boundary
    assert (found[0].kl > 1e-4) != bool(whole)
    assert whole or found[1].kl < found[0].kl
    assert found[0].bits_per_element < found[1].bits_per_element or whole


def test_bits_are_those_of_the_papers_at_their_widths() -> None:
    """KVarN K4V2 in tiles of 128 at width 128: 3.4; OSCAR 2.25 without its window; KIVI + 1."""
    assert PEERS["kvarn-k4v2"].stored_bits(128) == pytest.approx(3.375)
    assert PEERS["kvarn-k2v2"].stored_bits(64) == pytest.approx(2.5625)
    assert PEERS["oscar-int2"].stored_bits(128) == pytest.approx(2.25)
    assert PEERS["kivi-2"].stored_bits(64) == 3
    # 102 bytes of a token's head of 128 at 3 bits, as vLLM's own page has it
    assert PEERS["vllm-tq3"].stored_bits(128) * 2 * 128 / 8 == pytest.approx(102)


def test_rounding_hits_both_ends_and_errs_half_a_step_at_most() -> None:
    x = sample(5, 64)
    for bits in (2, 3, 4):
        found = round_last(x, bits)
        step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
        # ends and steps are rounded to fp16
        assert ((found - x).abs().amax(-1) <= step * 0.51 + 4e-3).all()
        assert len(found[0].unique()) <= 2**bits
    assert round_last(x, 2, clip=0.5).amax() < x.amax()


def test_a_tile_is_balanced_in_rows_and_columns() -> None:
    x = sample(1, 2, 128, 16) * sample(1, 2, 128, 1).exp() * (2 * sample(1, 2, 1, 16)).exp()
    even, row, column = balanced(x)
    torch.testing.assert_close(even * row * column, x, rtol=1e-4, atol=1e-5)
    for dim in (-1, -2):
        torch.testing.assert_close(
            even.std(dim, correction=0), torch.ones_like(even.std(dim)), rtol=0.05, atol=0
        )


def test_a_tile_of_channels_with_large_means_has_factors_that_fp16_holds() -> None:
    x = sample(1, 2, 128, 16) + 300 * sample(1, 2, 1, 16)
    even, row, column = balanced(x)
    assert all(factor.isfinite().all() and (factor > 0).all() for factor in (row, column))
    torch.testing.assert_close(even * row * column, x, rtol=1e-4, atol=1e-3)


def test_channels_of_other_sizes_cost_kvarn_nothing() -> None:
    """What it was made for: a channel 100 times as large as the others."""
    model = tiny_model("llama", dtype=torch.float32)
    code = PEERS["kvarn-k3v3"].sides(PEERS["kvarn-k3v3"], None)
    k, v = sample(1, 2, 128, 16), sample(1, 2, 128, 16)
    errors = []
    for factor in (1.0, 100.0):
        scaled = k.clone()
        scaled[:, :, 5] *= factor
        k_hat, _ = code(scaled, v)
        errors.append(float(((k_hat - scaled)[:, :, 6:]).square().mean()))
    assert errors[1] < 1.5 * errors[0]
    assert model.config.head_dim == 16


def test_sinks_are_no_part_of_a_tile() -> None:
    k, v = sample(1, 2, 40, 16), sample(1, 2, 40, 16)
    code = behind_sinks(PEERS["kivi-2"].sides(PEERS["kivi-2"], None), 3)
    found = code(k, v, torch.arange(40)[None])
    k[:, :, :3] *= 1000
    again = code(k, v, torch.arange(40)[None])
    assert torch.equal(found[0][:, :, 3:], again[0][:, :, 3:])
    assert torch.equal(again[0][:, :, :3], k[:, :, :3])
