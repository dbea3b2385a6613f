"""Token weights: scales, scores, and attention received against the dense definition."""

import pytest
import torch

from rotq.calibration.batches import Batch
from rotq.calibration.importance import (
    attention_received,
    frequency_score,
    hidden_score,
    weights_from_scores,
)
from rotq.recipe import Importance


@pytest.mark.parametrize("scaling", ["minmax", "quantile", "sink"])
@pytest.mark.parametrize("power", [1, 2])
def test_weights_have_mean_one_and_keep_the_order(scaling, power):
    score_BT = torch.rand(3, 500)
    importance = Importance(strategy="attention", scaling=scaling, floor=0.05, power=power)
    weight_BT = weights_from_scores(score_BT, importance)
    torch.testing.assert_close(weight_BT.mean(-1), torch.ones(3))
    order = score_BT.argsort(-1)
    assert (weight_BT.gather(1, order).diff(dim=-1) >= 0).all()
    ratio = weight_BT.amin(-1) / weight_BT.amax(-1)
    torch.testing.assert_close(ratio, torch.full((3,), 0.05**power), rtol=1e-4, atol=1e-6)


def test_equal_scores_give_equal_weights():
    weight_BT = weights_from_scores(torch.full((2, 9), 4.0), Importance(strategy="attention"))
    assert torch.equal(weight_BT, torch.ones(2, 9))


def test_a_sink_flattens_minmax_but_not_the_others():
    score_BT = torch.linspace(1, 2, 1000)[None].clone()
    score_BT[0, 0] = 1000.0

    def spread(scaling: str) -> float:
        weight_BT = weights_from_scores(score_BT, Importance(strategy="attention", scaling=scaling))
        return float(weight_BT[0, 1:].max() / weight_BT[0, 1:].min())

    assert spread("minmax") < 1.1
    assert spread("quantile") > 5
    assert spread("sink") > 5


def test_hidden_scores_equal_their_definitions():
    hidden_BTD, output_BTD = torch.randn(2, 8, 5), torch.randn(2, 8, 5)

    def score(strategy: str) -> torch.Tensor:
        return hidden_score(strategy, hidden_BTD, lambda: output_BTD, 0.25)

    assert score("first_n").tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]] * 2
    torch.testing.assert_close(score("activation_norm"), hidden_BTD.norm(dim=-1))
    difference_BT = (hidden_BTD - output_BTD).norm(dim=-1)
    torch.testing.assert_close(score("activation_difference"), -difference_BT)
    squares = (hidden_BTD[:, :, None] - hidden_BTD[:, None]).square().sum(-1).mean(-1)
    torch.testing.assert_close(score("token_similarity"), squares, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="unknown strategy 'luck'"):
        score("luck")


def test_rare_tokens_score_higher():
    counts_V = torch.tensor([5, 1, 0])
    assert frequency_score(torch.tensor([[0, 1, 0]]), counts_V).tolist() == [[-5, -1, -5]]


@pytest.mark.parametrize("masking", ["causal", "boolean", "additive", "none"])
def test_attention_received_equals_dense_softmax(masking):
    B, H, T, d = 2, 4, 300, 8
    query, key = torch.randn(B, H, T, d), torch.randn(B, 2, T, d)
    visible = torch.ones(T, T, dtype=torch.bool)
    if masking in ("causal", "boolean", "additive"):
        visible = visible.tril()
    if masking in ("boolean", "additive"):
        visible = visible & ~visible.tril(-50)  # a sliding window
    visible = visible.expand(B, 1, T, T)
    mask = {"boolean": visible, "additive": torch.where(visible, 0.0, -3e38)}.get(masking)
    actual = attention_received(query, key, scale=0.3, mask=mask, causal=masking == "causal")
    logits = query @ key.repeat_interleave(2, 1).mT * 0.3
    dense = logits.masked_fill(~visible, -torch.inf).softmax(-1).sum((1, 2))
    torch.testing.assert_close(actual, dense / visible.sum((1, 2)), rtol=1e-4, atol=1e-5)


PADDED = Batch(
    ids_BT=torch.zeros(2, 6, dtype=torch.int64),
    mask_BT=torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    special_BT=torch.tensor([[True, *[False] * 4, True], [True, False, False, True, False, False]]),
)


@pytest.mark.parametrize("scaling", ["minmax", "quantile", "sink"])
def test_padding_has_no_weight_and_special_tokens_do_not_set_the_range(scaling):
    importance = Importance(strategy="attention", scaling=scaling)
    score_BT = torch.tensor([[90.0, 1, 2, 3, 4, -80], [70, 1, 2, 60, 1e6, -1e6]])
    weight_BT = weights_from_scores(score_BT, importance, PADDED)
    torch.testing.assert_close(weight_BT.sum(1), torch.tensor([6.0, 4.0]))
    assert weight_BT[1, 4:].tolist() == [0, 0]
    assert torch.equal(weight_BT[:, 0], weight_BT.amax(1))
    # residues 1 to 4 fill the range: the least of them is at the floor
    assert weight_BT[0, 1] / weight_BT[0, 0] == pytest.approx(0.1, abs=0.02)
    assert weight_BT[0, 5] == weight_BT[0, 0]
    moved_BT = score_BT + torch.tensor([[1e3, 0, 0, 0, 0, 1e3], [1e3, 0, 0, 1e3, 5, 5]])
    torch.testing.assert_close(weights_from_scores(moved_BT, importance, PADDED), weight_BT)


def test_without_padding_the_batch_changes_nothing():
    score_BT = torch.rand(2, 6)
    plain = weights_from_scores(score_BT, Importance(strategy="attention"))
    batch = Batch(ids_BT=PADDED.ids_BT)
    assert torch.equal(
        weights_from_scores(score_BT, Importance(strategy="attention"), batch), plain
    )


def test_padded_queries_give_no_attention():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(2))
    mask = torch.tensor([True] * 4 + [False] * 2).view(1, 1, 1, 6)
    how = {"scale": 0.3, "causal": False}
    whole = attention_received(query, key, mask=mask, real_BT=mask.view(1, 6), **how)
    alone = attention_received(query[:, :, :4], key[:, :, :4], mask=None, **how)
    torch.testing.assert_close(whole[:, :4], alone)
    assert not whole[:, 4:].any()
