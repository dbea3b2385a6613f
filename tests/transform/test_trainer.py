"""Parameters start where they are told, and the trainer's steps have the sizes it is told."""

import pytest
import torch
from memory_jobs import make_job
from tiny_transforms import LEARNED, SCALED

from rotq.fusion.draw import build_basis
from rotq.transform.methods import balanced, learned
from rotq.transform.parameters import Parameters
from rotq.transform.trainer import WARM_UP, Pace, Trainer, schedule
from rotq.transform.windows import TrainingWindows


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    choices = {**LEARNED, "transform.layer_steps": 0, "transform.steps": 0}
    return make_job(tmp_path_factory.mktemp("train") / "job", choices)


def drawn_by(job):
    skeleton = job.skeleton
    return build_basis(job.recipe.rotation, skeleton.adapter, skeleton.config)


def parameters_of(job, factors=None):
    return Parameters(
        drawn_by(job),
        job.skeleton,
        scaled=SCALED,
        factors=factors or {},
        device=torch.device("cpu"),
    )


def test_factors_are_where_scales_start(job):
    factors = {"1.scales.up": torch.linspace(0.5, 2.0, 80)[None]}
    scales = parameters_of(job, factors).finished().scales
    torch.testing.assert_close(scales[1].up_EI, factors["1.scales.up"].double())
    assert (scales[0].up_EI == 1).all()


def test_without_steps_the_closed_form_is_what_comes_out(job):
    """Of what the recipe balances, and of nothing else."""
    drawn = drawn_by(job)
    for find in (learned, balanced):
        basis, _ = find(TrainingWindows(job), drawn)
        assert basis.scales[0].up_EI.std() > 0.05
        assert basis.scales[0].query_key_HK.std() > 0.01
        assert (basis.scales[0].qkv_D == 1).all()
        assert torch.equal(basis.residual_DD.sign(), drawn.residual_DD.sign())


def test_a_restart_is_where_the_others_ended(job):
    first = parameters_of(job)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for free in first.free().values():
            free.add_(0.3 * torch.randn(free.shape, generator=generator))
    start, factors = first.restart()
    second = Parameters(
        start,
        job.skeleton,
        scaled=SCALED,
        factors=factors,
        device=torch.device("cpu"),
    )
    ended, started = first.finished().tensors(), second.finished().tensors()
    assert ended.keys() == started.keys()
    for name, tensor in ended.items():
        torch.testing.assert_close(started[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_the_schedule_warms_up_and_ends_at_two_percent():
    steps = [schedule(step, 100) for step in range(100)]
    assert steps[0] == pytest.approx(1 / WARM_UP)
    assert max(steps) == steps[WARM_UP - 1] > 0.98
    assert steps[WARM_UP:] == sorted(steps[WARM_UP:], reverse=True)
    assert steps[-1] == pytest.approx(0.02, abs=0.01)


def test_steps_have_the_sizes_of_the_pace(job):
    parameters = parameters_of(job)

    def backward(step: int) -> float:
        for free in parameters.free().values():
            free.grad = torch.ones_like(free)
        return 1.0

    trainer = Trainer(parameters, Pace(steps=20, angle=0.04, scale_rate=0.01), backward)
    for _ in range(3):
        before = {name: free.detach().clone() for name, free in parameters.free().items()}
        size = schedule(len(trainer.losses), 20)
        trainer.step()
        for name, free in parameters.free().items():
            rate = 0.01 if ".scales." in name else 0.04
            moved = (before[name] - free.detach()).mean().item()
            assert moved == pytest.approx(rate * size, rel=1e-3), name
