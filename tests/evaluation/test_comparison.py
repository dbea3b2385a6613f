"""Intervals of the ratio of perplexities: plain draws, and how often they hold the truth."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import random_ids, tiny_model

from rotq.evaluation.comparison import compare_scores, paired_interval
from rotq.evaluation.divergence import Divergence
from rotq.evaluation.perplexity import Protocol, evaluate, score_windows


@pytest.mark.parametrize(("windows", "noise"), [(8, 0.02), (16, 0.02), (64, 0.2)])
def test_the_interval_holds_the_true_difference_in_90_of_100(windows: int, noise: float) -> None:
    truth, held = 0.05, 0
    for seed in range(100):
        drawn = np.random.default_rng(1000 + seed)
        hard_W = drawn.normal(3.0, 0.5, windows)  # what both models have in common
        ours_W = hard_W + truth + drawn.normal(0, noise, windows)
        tokens = [100] * windows
        found = paired_interval(ours_W * 100, hard_W * 100, tokens, seed=seed)
        held += found.low <= truth <= found.high
        assert found.low <= found.mean <= found.high
    assert held >= 90


def test_pairs_take_out_what_windows_have_in_common() -> None:
    drawn = np.random.default_rng(0)
    hard_W = drawn.normal(3.0, 1.0, 16)
    paired = paired_interval(hard_W + 0.1, hard_W, [1] * 16, seed=0)
    assert paired.high - paired.low < 1e-9
    unpaired = paired_interval(hard_W + 0.1, hard_W[::-1], [1] * 16, seed=0)
    assert unpaired.high - unpaired.low > 0.5


def test_windows_count_by_their_tokens() -> None:
    found = paired_interval([10.0, 0.0], [0.0, 0.0], [10, 90], seed=0)
    assert found.mean == pytest.approx(0.1)


def test_a_single_window_has_no_width() -> None:
    found = paired_interval([3.0], [1.0], [2], seed=0)
    assert (found.low, found.mean, found.high) == (1.0, 1.0, 1.0)


def test_percentiles_are_numpys() -> None:
    kl_N = torch.rand(1001, dtype=torch.float64)
    found = Divergence(kl_N, 3).percentiles()
    for name, share in (("kl_p50", 50), ("kl_p99", 99), ("kl_p999", 99.9)):
        assert found[name] == pytest.approx(np.percentile(kl_N.numpy(), share))
    assert all(low < high for low, high in pairwise(found.values()))


def test_figures_are_those_of_single_evaluations() -> None:
    models = [tiny_model("llama", seed=seed, dtype=torch.float32) for seed in (0, 1, 2)]
    ids_N = random_ids(1, 90)[0]
    protocol = Protocol(windows=4, seq_len=20)
    scored = [
        score_windows(model, ids_N, protocol=protocol, reference=models[0]) for model in models[1:]
    ]
    found = compare_scores([scores for scores, _ in scored], scored[0][1], seed=0)
    for model, one in zip(models[1:], found, strict=True):
        alone = evaluate(model, ids_N, protocol=protocol, reference=models[0])
        assert one.evaluation == alone
        assert alone.reference_ppl is not None
        assert one.ln_ratio.mean == pytest.approx(math.log(alone.ppl / alone.reference_ppl))
    assert found[0].against_first is None
    assert found[1].against_first is not None
    ratio = math.log(found[1].evaluation.ppl / found[0].evaluation.ppl)
    assert found[1].against_first.mean == pytest.approx(ratio)
