"""KL-Top: the whole vocabulary is the full KL, cached is live, and the closed form of the slope."""

import pytest
import torch

from rotq.transform.teacher import (
    Targets,
    head_loss,
    likely_tokens,
    loss_and_slope,
    next_tokens,
)

V, T = 23, 300


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, T, V, generator=generator)


def full_kl(teacher_TV, student_TV):
    log_p, log_q = teacher_TV.log_softmax(-1), student_TV.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def test_all_tokens_give_the_full_kl(logits):
    teacher, student = logits
    loss, slope_TV = loss_and_slope(student, likely_tokens(teacher, V))
    assert loss == pytest.approx(full_kl(teacher, student).item(), rel=1e-5)
    torch.testing.assert_close(
        slope_TV, student.softmax(-1) - teacher.softmax(-1), rtol=1e-4, atol=1e-6
    )
    more = likely_tokens(teacher, 10 * V)
    assert more.token_Tk.shape == (T, V)


def test_the_cached_teacher_is_the_live_one(logits):
    """Probabilities are of the whole vocabulary, not of the k tokens kept."""
    teacher, student = logits
    targets = likely_tokens(teacher, 5)
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    live = 0.0
    for t in range(T):
        top = p[t].argsort(descending=True)[:5]
        assert set(top.tolist()) == set(targets.token_Tk[t].tolist())
        live += (p[t, top] * (p[t, top].log() - log_q[t, top])).sum().item()
    loss, _ = loss_and_slope(student, targets)
    assert loss == pytest.approx(live, rel=1e-4)


def test_the_slope_is_m_q_minus_p_on_the_likely_tokens(logits):
    teacher, student = logits
    targets = likely_tokens(teacher, 5)
    given = student.double().requires_grad_()
    log_q = given.log_softmax(-1)
    p = targets.log_p_Tk.double().exp()
    loss = (p * (p.log() - log_q.gather(-1, targets.token_Tk.long()))).sum()
    loss.backward()
    _, slope_TV = loss_and_slope(student, targets)
    torch.testing.assert_close(slope_TV.double(), given.grad, rtol=1e-4, atol=1e-6)


def test_the_text_itself_is_cross_entropy(logits):
    ids_T = torch.arange(T) % V
    loss, slope_TV = loss_and_slope(logits[0], next_tokens(ids_T))
    expected = torch.nn.functional.cross_entropy(logits[0][:-1], ids_T[1:], reduction="sum")
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    # the last position has nothing to predict
    assert slope_TV[-1].abs().max() == 0


def test_chunks_of_positions_add_up(logits):
    teacher, _ = logits
    targets = likely_tokens(teacher, 5)
    generator = torch.Generator().manual_seed(1)
    head_VD = torch.randn(V, 7, generator=generator, requires_grad=True)
    hidden_BTD = torch.randn(1, T, 7, generator=generator)
    loss, slope_BTD = head_loss(lambda h: h @ head_VD.T, hidden_BTD, targets)
    given = hidden_BTD.clone().requires_grad_()
    whole, slope_TV = loss_and_slope((given[0] @ head_VD.T).detach(), targets)
    assert loss == pytest.approx(whole / T, rel=1e-5)
    kept = head_VD.grad.clone()
    head_VD.grad = None
    (given[0] @ head_VD.T).backward(slope_TV / T)
    torch.testing.assert_close(slope_BTD, given.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(kept, head_VD.grad, rtol=1e-4, atol=1e-6)


def test_a_probability_of_zero_counts_nothing():
    targets = Targets(
        token_Tk=torch.tensor([[0]], dtype=torch.int32), log_p_Tk=torch.tensor([[-torch.inf]])
    )
    loss, slope = loss_and_slope(torch.randn(1, 4), targets)
    assert loss == 0.0
    assert slope.abs().max() == 0
