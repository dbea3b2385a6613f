"""What the loss feels of rounding: against gradients of the whole model, and through whole jobs."""

import dataclasses

import pytest
import torch
from memory_jobs import make_job
from tiny_models import tiny_model

from rotq.errors import RotqError
from rotq.fusion.draw import build_basis
from rotq.job.part_names import SENSITIVITIES
from rotq.quantize import gradients, sensitivity
from rotq.quantize.block_runner import BlockRunner
from rotq.quantize.gradients import GradientPass
from rotq.quantize.rotated_model import RotatedModel
from rotq.quantize.sensitivity import Sensitivities, choose_grids, predicted
from rotq.solvers.trial import trial_losses

CHOICES = {
    "weights.average_bits": 3.0,
    "weights.overrides": [{"match": ".", "group_size": -1}],
    "calibration.precision": "highest",
    "solver.damping": 0.05,
    "output.format": "rotq",
}


@pytest.fixture(autouse=True)
def _least_likely(monkeypatch):
    """In place of the draw: the loss of the least likely token, which batches do not change."""

    def slope(logits_BCV, generator):
        least_BC1 = logits_BCV.argmin(-1, keepdim=True)
        return logits_BCV.softmax(-1).scatter_add(-1, least_BC1, -torch.ones_like(logits_BCV))

    monkeypatch.setattr(gradients, "sampled_slope", slope)


def passed(folder, choices=CHOICES, name="llama"):
    """A job whose sensitivities are there."""
    job = make_job(folder, choices, name=name)
    basis = build_basis(job.recipe.rotation, job.skeleton.adapter, job.skeleton.config)
    with torch.no_grad():
        rotated = RotatedModel(job, basis)
        GradientPass(job, rotated).run(BlockRunner(job).start(*rotated.outer()).quantized)
    return job


def slopes_and_inputs(name, ids_BT):
    """Of every linear layer by plain autograd in fp64: slopes (M, N), inputs (M, K)."""
    model, slopes, inputs = tiny_model(name), {}, {}

    def watch(path, args, output):
        inputs[path] = args[0].detach().flatten(0, -2)
        output.register_hook(lambda slope: slopes.__setitem__(path, slope.flatten(0, -2)))

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, a, out, path=path: watch(path, a, out))
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, out: out.requires_grad_())
    (-model(input_ids=ids_BT).logits.log_softmax(-1).amin(-1)).sum().backward()
    return model, slopes, inputs


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_losses_are_fisher_times_what_the_solver_leaves(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "TRIED_ROWS", 10**6)
    job = passed(tmp_path / "job", name=name)
    model, slopes, inputs = slopes_and_inputs(name, job.windows.ids_BT)
    losses = job.folder.results(SENSITIVITIES)["losses"]
    assert list(losses) == [unit.name for unit in reversed_blocks(job.plan.units)]
    for unit in job.plan.units:
        square_MN = torch.cat([slopes[path] for path in unit.layers], 1).square()
        x_MK, r_M = inputs[unit.layers[0]], square_MN.sum(1)
        hessian_KK = (x_MK * r_M[:, None]).T @ x_MK / r_M.sum()
        weight_NK = torch.cat([model.get_submodule(path).weight for path in unit.layers]).detach()
        options = dataclasses.replace(job.recipe.solver, refine_sweeps=0)
        loss_CN = trial_losses(
            weight_NK.float(),
            hessian_KK.float(),
            unit.grids,
            options,
            scale_dtype=job.plan.scale_dtype,
        )
        wanted_C = loss_CN.double() @ square_MN.mean(0) / 2
        torch.testing.assert_close(
            torch.tensor(losses[unit.name]).double(), wanted_C, rtol=0.05, atol=0
        )


def reversed_blocks(units):
    """In the order of a backward pass."""
    return sorted(units, key=lambda unit: -int(unit.name.split("layers.")[1].split(".")[0]))


def test_some_rows_stand_for_all(tmp_path, monkeypatch):
    every = passed(tmp_path / "every").folder.results(SENSITIVITIES)["losses"]
    monkeypatch.setattr(sensitivity, "TRIED_ROWS", 12)
    some = passed(tmp_path / "some").folder.results(SENSITIVITIES)["losses"]
    assert some != every
    for name, losses in every.items():
        assert some[name] == pytest.approx(losses, rel=0.6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_felt_by_the_tokens_that_are_sent_to_them(name, tmp_path):
    job = passed(tmp_path / "job", name=name)
    losses = job.folder.results(SENSITIVITIES)["losses"]
    [unit] = [unit for unit in job.plan.units if "layers.0" in unit.name and "experts" in unit.name]
    found = losses[unit.name]
    assert len(found) == 3
    assert found[0] > 2 * found[1] > 4 * found[2] > 0


def test_rtn_is_tried_as_it_rounds(tmp_path):
    found = {
        method: passed(tmp_path / method, {**CHOICES, "solver.method": method})
        for method in ("rtn", "gptq")
    }
    rtn, gptq = (job.folder.results(SENSITIVITIES)["losses"] for job in found.values())
    smallest = [sum(losses[0] for losses in found.values()) for found in (rtn, gptq)]
    assert smallest[0] > 1.1 * smallest[1]


@pytest.mark.parametrize("average", [2.6, 3.0, 3.7])
def test_the_choice_keeps_to_the_budget_and_tells_what_it_expects(average, tmp_path):
    job = passed(tmp_path / "job", {**CHOICES, "weights.average_bits": average})
    chosen = choose_grids(job)
    bits = sum(
        rows * columns * chosen.plan.grids[name].bits_per_weight(columns)
        for name, (rows, columns) in job.plan.shapes.items()
    )
    assert average - 0.2 < bits / job.plan.num_weights <= average
    assert predicted(chosen)["average_bits"] == average
    assert 0 < predicted(chosen)["predicted_kl"] < predicted(job)["predicted_kl"]
    for unit in job.plan.units:
        assert len({chosen.plan.grids[name] for name in unit.layers}) == 1


@pytest.mark.parametrize("end", [0, -1], ids=["least", "most"])
def test_an_average_at_the_limit_is_met(end, tmp_path):
    for width in ("llama", "qwen3", "mixtral"):
        limits = make_job(tmp_path / width, CHOICES, name=width).plan.limits
        at_limit = {**CHOICES, "weights.average_bits": limits[end]}
        job = make_job(tmp_path / width, at_limit, name=width)
        losses = {unit.name: [4.0, 2.0, 1.0] for unit in job.plan.units}
        job.folder.record(SENSITIVITIES, {"losses": losses}, [])
        chosen = choose_grids(job).plan
        assert all(chosen.grids[unit.name] == unit.grids[end] for unit in job.plan.units)


def test_a_finished_pass_is_not_run_again(tmp_path, monkeypatch):
    passed(tmp_path / "job")
    monkeypatch.setattr(GradientPass, "_forward", None)
    passed(tmp_path / "job")
    weighing = {**CHOICES, "importance.strategy": "gradient"}
    with pytest.raises(TypeError):
        passed(tmp_path / "job", weighing)


def test_one_pass_serves_tokens_and_layers(tmp_path):
    alone = passed(tmp_path / "alone").folder.results(SENSITIVITIES)
    both = passed(tmp_path / "both", {**CHOICES, "importance.strategy": "gradient"})
    assert both.folder.results(SENSITIVITIES) == alone
    assert len(list((tmp_path / "both").glob("gradient-*"))) == 2
    assert not list((tmp_path / "alone").glob("gradient-*"))


@pytest.mark.parametrize(
    ("factor", "words"), [(0.0, "the loss has no gradient there"), (torch.nan, "is not finite")]
)
def test_a_layer_that_cannot_be_weighed_is_named(factor, words, tmp_path):
    job = make_job(tmp_path / "job", CHOICES)
    block = job.load_block(0, torch.float32)
    found = Sensitivities(job)
    found.start(block)
    for path in (name.removeprefix("model.layers.0.") for name in job.plan.grids):
        if path.split(".")[0] in ("self_attn", "mlp"):
            linear = block.get_submodule(path)
            rows, columns = linear.weight.shape
            slope = torch.ones(1, 5, rows) * (factor if path == "mlp.down_proj" else 1.0)
            found.see(path, torch.randn(1, 5, columns), slope)
    found.end_window(5)
    with pytest.raises(RotqError, match=rf"layers\.0\.mlp\.down_proj: .*{words}"):
        found.finish(0, block)
