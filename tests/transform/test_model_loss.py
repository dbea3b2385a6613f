"""The streamed loss and its gradients, against one graph through the whole model."""

from dataclasses import replace

import pytest
import torch
from memory_jobs import make_job
from tiny_models import tiny_model
from tiny_transforms import LEARNED

from rotq.fusion.draw import build_basis
from rotq.transform.model_loss import Lesson, backward, teach
from rotq.transform.parameters import Parameters
from rotq.transform.teacher import next_tokens
from rotq.transform.windows import TrainingWindows


def prepared(folder, choices, name="llama"):
    job = make_job(folder, choices, name=name)
    recipe, skeleton = job.recipe, job.skeleton
    drawn = build_basis(recipe.rotation, skeleton.adapter, skeleton.config)
    parameters = Parameters(
        drawn,
        skeleton,
        scaled=recipe.transform.scalings,
        factors={},
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for free in parameters.free().values():
            free.add_(0.1 * torch.randn(free.shape, generator=generator))
    windows = TrainingWindows(job)
    first = windows.trained_on[:1]
    targets = teach(windows.student, windows.outer, first, 20)
    return windows, parameters, Lesson(ids_BT=first[0], targets=targets[0])


def unstreamed(windows, parameters, lesson):
    """The same loss as one graph, written down without slopes in closed form."""
    student, basis = windows.student, parameters.basis()
    skeleton = windows.job.skeleton
    hidden_BTD = skeleton.embed(windows.outer, lesson.ids_BT)
    if basis.residual_DD is not None:
        hidden_BTD = hidden_BTD @ basis.residual_DD
    for run in student.runs(basis, hidden_BTD):
        hidden_BTD = run(hidden_BTD)
    if basis.residual_DD is not None:
        hidden_BTD = hidden_BTD @ basis.residual_DD.T
    log_q = skeleton.logits(windows.outer, hidden_BTD)[0].log_softmax(-1)
    log_p_Tk, token_Tk = lesson.targets.log_p_Tk, lesson.targets.token_Tk.long()
    return (log_p_Tk.exp() * (log_p_Tk - log_q.gather(-1, token_Tk))).sum(-1).mean()


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-moe"])
def test_gradients_are_those_of_the_whole_graph(tmp_path, name):
    windows, parameters, lesson = prepared(tmp_path / "job", LEARNED, name)
    with torch.enable_grad():
        loss = backward(windows.student, parameters, windows.outer, lesson, 0)
    streamed = {key: free.grad.clone() for key, free in parameters.free().items()}
    for free in parameters.free().values():
        free.grad = None
    with torch.enable_grad():
        whole = unstreamed(windows, parameters, lesson)
        whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-4)
    for key, free in parameters.free().items():
        assert free.grad.abs().max() > 0, key
        scale = free.grad.abs().max().item()
        torch.testing.assert_close(streamed[key], free.grad, rtol=1e-3, atol=1e-3 * scale)


def test_without_rounding_every_basis_has_the_loss_of_the_original(tmp_path):
    choices = {**LEARNED, "activations.bits": 16, "kv_cache.bits": 16}
    windows, parameters, lesson = prepared(tmp_path / "job", choices)
    exact = replace(windows.student, rounds_weights=False)
    assert backward(exact, parameters, windows.outer, lesson, 0) == pytest.approx(0, abs=1e-4)
    # weights only: what is rounded then are weights
    assert windows.student.rounds_weights
    assert backward(windows.student, parameters, windows.outer, lesson, 0) > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_without_rounding_nothing_has_a_gradient(tmp_path, name):
    """What moves in the weights moves back in what they read, or slopes would be left over."""
    largest = {}
    for bits in (16, 4):
        choices = {**LEARNED, "activations.bits": bits, "kv_cache.bits": bits}
        windows, parameters, lesson = prepared(tmp_path / f"job-{bits}", choices, name)
        text = Lesson(ids_BT=lesson.ids_BT, targets=next_tokens(lesson.ids_BT[0]))
        student = replace(windows.student, rounds_weights=False)
        with torch.enable_grad():
            backward(student, parameters, windows.outer, text, 0)
        largest[bits] = {key: free.grad.abs().max() for key, free in parameters.free().items()}
    for key, rounded in largest[4].items():
        assert largest[16][key] < 1e-3 * rounded, key


def test_the_teacher_is_the_original_model(tmp_path):
    _, _, lesson = prepared(tmp_path / "job", LEARNED)
    model = tiny_model("llama", dtype=torch.float32)
    log_p = model(lesson.ids_BT).logits[0].log_softmax(-1)
    top = log_p.topk(20, dim=-1)
    torch.testing.assert_close(lesson.targets.log_p_Tk, top.values, rtol=1e-3, atol=1e-3)
