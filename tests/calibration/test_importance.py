"""Token weights: scales, scores, and attention received against the dense definition."""

import pytest
import torch

from rotq.calibration.importance import (
    attention_received,
    frequency_score,
    hidden_score,
    token_weights,
)
from rotq.recipe import Importance


@pytest.mark.parametrize("scaling", ["minmax", "quantile", "sink"])
@pytest.mark.parametrize("power", [1, 2])
def test_weights_have_mean_one_and_keep_the_order(scaling, power):
    score_BT = torch.rand(3, 500)
    importance = Importance(strategy="attention", scaling=scaling, floor=0.05, power=power)
    weight_BT = token_weights(score_BT, importance)
    torch.testing.assert_close(weight_BT.mean(-1), torch.ones(3))
    order = score_BT.argsort(-1)
    assert (weight_BT.gather(1, order).diff(dim=-1) >= 0).all()
    ratio = weight_BT.amin(-1) / weight_BT.amax(-1)
    torch.testing.assert_close(ratio, torch.full((3,), 0.05**power), rtol=1e-4, atol=1e-6)


def test_equal_scores_give_equal_weights():
    weight_BT = token_weights(torch.full((2, 9), 4.0), Importance(strategy="attention"))
    assert torch.equal(weight_BT, torch.ones(2, 9))


def test_a_sink_flattens_minmax_but_not_the_others():
    score_BT = torch.linspace(1, 2, 1000)[None].clone()
    score_BT[0, 0] = 1000.0

    def spread(scaling: str) -> float:
        weight_BT = token_weights(score_BT, Importance(strategy="attention", scaling=scaling))
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
