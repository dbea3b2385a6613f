"""Choosing tokens: by hand, and against the distribution that was asked for."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from rotq.serve.engine.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 2.0])
DRAWS = 4000


def shares(**options: Any) -> dict[int, float]:
    sampler = Sampler(Sampling(seed=1, **options))
    counts = Counter(sampler.pick(LOGITS).token for _ in range(DRAWS))
    return {token: number / DRAWS for token, number in counts.items()}


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert Sampler(Sampling(temperature=0)).pick(LOGITS).token == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-300, 1e-20, 1e-5])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    for logits in (LOGITS, 1e4 * LOGITS, LOGITS.half()):
        picked = Sampler(Sampling(temperature=temperature, seed=1, logprobs=1)).pick(logits)
        assert picked == Sampler(Sampling(temperature=0, logprobs=1)).pick(logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    wanted = (LOGITS / temperature).softmax(-1)
    found = shares(temperature=temperature)
    for token, share in enumerate(wanted.tolist()):
        assert found.get(token, 0.0) == pytest.approx(share, abs=4 * math.sqrt(0.25 / DRAWS))


def test_top_k_keeps_the_likeliest_and_their_proportions() -> None:
    found = shares(top_k=3)
    assert found.keys() == {1, 4, 2}
    assert found[1] / found[2] == pytest.approx(math.e, rel=0.2)
    assert shares(top_k=1) == {1: 1.0}


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    share = LOGITS.softmax(-1)
    edge = float(share[1] + share[4])
    assert shares(top_p=edge - 0.01).keys() == {1, 4}
    assert shares(top_p=edge + 0.01).keys() == {1, 4, 2}
    assert shares(top_p=1e-9) == {1: 1.0}


def test_top_p_is_of_what_top_k_leaves() -> None:
    assert shares(top_k=2, top_p=0.4) == {1: 1.0}


def test_seeds() -> None:
    def tokens(seed: int | None, index: int = 0) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), index)
        return [sampler.pick(LOGITS).token for _ in range(40)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(7) != tokens(7, index=1)
    assert tokens(None) != tokens(None)


def test_logprobs_are_the_models_own() -> None:
    picked = Sampler(Sampling(temperature=0.1, top_k=1, logprobs=2)).pick(LOGITS)
    wanted = LOGITS.log_softmax(-1)
    assert picked.logprob == pytest.approx(float(wanted[picked.token]))
    assert {token for token, _ in picked.top} == {1, 4}
    assert Sampler(Sampling(logprobs=0)).pick(LOGITS).top == ()
    assert len(Sampler(Sampling(logprobs=9)).pick(LOGITS).top) == 5
    assert Sampler(Sampling()).pick(LOGITS).logprob is None
