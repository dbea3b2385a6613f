"""Perplexity protocols and divergence, against plain formulas in fp64."""

import math
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, random_ids, tiny_model
from torch import Tensor

from rotq.errors import RotqError
from rotq.evaluation.divergence import compare
from rotq.evaluation.perplexity import Protocol, evaluate


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def other() -> Any:
    return tiny_model("llama", seed=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids_N() -> Tensor:
    return random_ids(1, 61)[0]


def log_probs(model: Any, ids_T: Tensor) -> Tensor:
    """(T, V) in fp64."""
    return torch.log_softmax(model(input_ids=ids_T[None]).logits[0].double(), dim=-1)


def test_windowed_scores_all_but_the_first_position(model: Any, ids_N: Tensor) -> None:
    nll = []
    for start in (0, 20, 40):
        window = ids_N[start : start + 20]
        logp = log_probs(model, window)
        nll += [-logp[t - 1, window[t]].item() for t in range(1, 20)]
    found = evaluate(model, ids_N, protocol=Protocol(windows=3, seq_len=20))
    assert found.tokens == 57
    assert found.ppl == pytest.approx(math.exp(sum(nll) / 57), rel=1e-5)
    assert found.protocol.startswith("windowed: first 3 non-overlapping windows of 20 tokens")


def test_strided_scores_each_token_once(model: Any, ids_N: Tensor) -> None:
    nll = {}
    for start in (0, 8, 16, 24, 32, 40):
        window = ids_N[start : start + 20]
        logp = log_probs(model, window)
        for t in range(1, 20):
            nll.setdefault(start + t, -logp[t - 1, window[t]].item())
    found = evaluate(model, ids_N, protocol=Protocol(windows=0, seq_len=20, stride=8))
    assert found.tokens == len(nll) == 59
    assert found.ppl == pytest.approx(math.exp(sum(nll.values()) / 59), rel=1e-5)
    assert found.protocol.startswith("strided: 6 windows of 20 tokens every 8")


def test_every_window_begins_with_the_special_tokens_and_scores_all_of_its_text(
    model: Any, ids_N: Tensor
) -> None:
    first = (5, 3)
    nll = []
    for start in (0, 18, 36):
        window = torch.cat((torch.tensor(first), ids_N[start : start + 18]))
        logp = log_probs(model, window)
        nll += [-logp[t - 1, window[t]].item() for t in range(2, 20)]
    found = evaluate(model, ids_N, protocol=Protocol(windows=3, seq_len=20, first=first))
    assert found.tokens == 54
    assert found.ppl == pytest.approx(math.exp(sum(nll) / 54), rel=1e-5)
    assert found.protocol.endswith("18 scored in each, each behind special tokens 5, 3")


def test_strided_windows_begin_with_the_special_tokens(model: Any, ids_N: Tensor) -> None:
    nll = {}
    for start in (0, 8, 16, 24, 32, 40):
        window = torch.cat((torch.tensor((5,)), ids_N[start : start + 19]))
        logp = log_probs(model, window)
        for t in range(1, 20):
            nll.setdefault(start + t, -logp[t - 1, window[t]].item())
    protocol = Protocol(windows=6, seq_len=20, stride=8, first=(5,))
    found = evaluate(model, ids_N, protocol=protocol)
    assert found.tokens == len(nll) == 59
    assert found.ppl == pytest.approx(math.exp(sum(nll.values()) / 59), rel=1e-5)


@pytest.mark.parametrize(("seq_len", "stride"), [(2, 0), (10, 8)])
def test_windows_hold_more_than_what_they_begin_with(
    ids_N: Tensor, seq_len: int, stride: int
) -> None:
    protocol = Protocol(windows=1, seq_len=seq_len, stride=stride, first=(5, 3))
    with pytest.raises(RotqError, match=f"hold {seq_len - 2} of the text; {stride + 1} are needed"):
        protocol.cut(ids_N)


def test_divergence_from_a_reference(model: Any, other: Any, ids_N: Tensor) -> None:
    kl, agree = [], []
    for start in (0, 30):
        window = ids_N[start : start + 30]
        p, q = log_probs(other, window)[:-1], log_probs(model, window)[:-1]
        kl += (p.exp() * (p - q)).sum(dim=-1).tolist()
        agree += (p.argmax(dim=-1) == q.argmax(dim=-1)).tolist()
    found = evaluate(model, ids_N, protocol=Protocol(windows=2, seq_len=30), reference=other)
    assert found.kl == pytest.approx(sum(kl) / 58, rel=1e-4)
    assert found.top1 == pytest.approx(sum(agree) / 58)
    alone = evaluate(other, ids_N, protocol=Protocol(windows=2, seq_len=30))
    assert found.reference_ppl == pytest.approx(alone.ppl, rel=1e-6)


def test_a_model_does_not_diverge_from_itself(model: Any, ids_N: Tensor) -> None:
    found = evaluate(model, ids_N, protocol=Protocol(windows=1, seq_len=30), reference=model)
    assert (found.kl, found.top1) == (0.0, 1.0)


def test_without_reference_there_is_no_divergence(model: Any, ids_N: Tensor) -> None:
    found = evaluate(model, ids_N, protocol=Protocol(windows=1, seq_len=30)).to_dict()
    assert (found["kl"], found["top1"], found["reference_ppl"]) == (None, None, None)


def test_chunks_do_not_change_the_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    p_TV, q_TV = torch.randn(2, 11, VOCAB, generator=generator)
    whole, parts = compare(p_TV, q_TV, chunk=11), compare(p_TV, q_TV, chunk=4)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert parts.top1 == whole.top1
    assert parts.kl_N.numel() == 11


def test_kl_of_two_coins() -> None:
    p_TV, q_TV = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert compare(p_TV, q_TV, chunk=1).kl == pytest.approx(expected, rel=1e-5)


def test_vocabularies_must_agree() -> None:
    with pytest.raises(RotqError, match="vocabulary of 5, the model one of 6"):
        compare(torch.zeros(2, 5), torch.zeros(2, 6), chunk=8)


def test_short_text_says_how_many_windows_fit(model: Any, ids_N: Tensor) -> None:
    with pytest.raises(RotqError, match="61 tokens hold 3 of the 4 windows of 20"):
        evaluate(model, ids_N, protocol=Protocol(windows=4, seq_len=20))
    with pytest.raises(RotqError, match="hold 0 of the 1 windows of 62"):
        evaluate(model, ids_N, protocol=Protocol(windows=0, seq_len=62))


def test_foreign_token_ids(model: Any) -> None:
    ids_N = torch.full((30,), VOCAB)
    with pytest.raises(RotqError, match=f"token id {VOCAB} is outside the model's {VOCAB}"):
        evaluate(model, ids_N, protocol=Protocol(windows=1, seq_len=30))


def test_foreign_ids_and_positions_are_settled_before_the_first_window() -> None:
    bounded = tiny_model("gpt2", dtype=torch.float32)
    seen: list[int] = []
    bounded.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids_N = random_ids(1, 300)[0]
    found = evaluate(bounded, ids_N, protocol=Protocol(windows=3, seq_len=90))
    assert seen == [64, 64, 64]
    assert found.tokens == 3 * 63
    assert "windows of 64 tokens" in found.protocol
    ids_N[150] = VOCAB
    with pytest.raises(RotqError, match=f"token id {VOCAB} is outside"):
        evaluate(bounded, ids_N, protocol=Protocol(windows=3, seq_len=64))
    assert len(seen) == 3
    with pytest.raises(RotqError, match="64 positions leave room for 64 tokens"):
        evaluate(bounded, ids_N, protocol=Protocol(windows=1, seq_len=90, stride=64))


def test_logits_must_be_finite(ids_N: Tensor) -> None:
    broken = tiny_model("llama", dtype=torch.float32)
    broken.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(RotqError, match="not finite"):
        evaluate(broken, ids_N, protocol=Protocol(windows=1, seq_len=30))


@pytest.mark.parametrize(
    "values",
    [
        {"windows": -1},
        {"seq_len": 1},
        {"stride": -1},
        {"seq_len": 8, "stride": 8},
    ],
)
def test_protocol_checks_its_values(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=list(values)[-1]):
        Protocol(**values)
