"""Gradient importance against gradients of the whole model, and what it refuses."""

import dataclasses

import pytest
import torch
from memory_jobs import make_job
from tiny_models import random_ids, tiny_model

from rotq.calibration.batches import Batch
from rotq.errors import RotqError
from rotq.fusion.draw import build_basis
from rotq.quantize import gradients
from rotq.quantize.block_runner import BlockRunner
from rotq.quantize.gradients import GradientPass, gradient_weights
from rotq.quantize.output_moments import output_moments
from rotq.quantize.rotated_model import RotatedModel

CHOICES = {
    "weights.group_size": 16,
    "weights.group_fallback": "auto",
    "calibration.precision": "highest",
    "importance.strategy": "gradient",
}
ROTATED = {"rotation.residual": "hadamard", "rotation.value": "hadamard"}


sampled_slope = gradients.sampled_slope


@pytest.fixture(autouse=True)
def _least_likely(monkeypatch):
    """In place of the draw: the loss of the least likely token, which batches do not change."""

    def slope(logits_BCV, generator):
        least_BC1 = logits_BCV.argmin(-1, keepdim=True)
        return logits_BCV.softmax(-1).scatter_add(-1, least_BC1, -torch.ones_like(logits_BCV))

    monkeypatch.setattr(gradients, "sampled_slope", slope)


def passed(folder, choices=CHOICES, name="llama", batches=None):
    """A job whose gradients are there."""
    job = make_job(folder, choices, name=name)
    if batches is not None:
        job = dataclasses.replace(job, windows=dataclasses.replace(job.windows, batches=batches))
    basis = build_basis(job.recipe.rotation, job.skeleton.adapter, job.skeleton.config)
    with torch.no_grad():
        rotated = RotatedModel(job, basis)
        GradientPass(job, rotated).run(BlockRunner(job).start(*rotated.outer()).quantized)
    return job


def whole_model_slopes(name, ids_BT, asked_BT, mask_BT=None):
    """Slopes (M, N) at every linear layer's outputs by plain autograd in fp64."""
    model = tiny_model(name)
    slopes = {}

    def watch(path, output):
        output.register_hook(lambda slope: slopes.__setitem__(path, slope.flatten(0, -2)))

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, out, path=path: watch(path, out))
    embedded = model.get_input_embeddings().register_forward_hook(
        lambda _, __, out: out.requires_grad_()
    )
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    embedded.remove()
    log_p_BT = logits_BTV.log_softmax(-1).amin(-1)
    (-log_p_BT * asked_BT).sum().backward()
    return slopes


def whole_model_weights(name, ids_BT, asked_BT, groups=1, mask_BT=None):
    """Mean squared slopes of rows that are no padding, mean one."""
    slopes = whole_model_slopes(name, ids_BT, asked_BT, mask_BT)
    real_M = torch.ones_like(ids_BT).flatten().bool() if mask_BT is None else mask_BT.flatten() > 0
    found = {}
    for path, slope_MN in slopes.items():
        parts = slope_MN[real_M].tensor_split(groups, dim=-1)
        square_MG = torch.stack([part.square().mean(-1) for part in parts], -1)
        found[path] = (square_MG / square_MG.mean(0)).float()
    return found


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3", "gemma3", "mistral"])
def test_weights_are_squared_gradients_of_the_whole_model(name, groups, tmp_path):
    job = passed(tmp_path / "job", {**CHOICES, "importance.groups": groups}, name)
    ids_BT = job.windows.ids_BT
    expected = whole_model_weights(name, ids_BT, torch.ones_like(ids_BT), groups)
    for index in range(job.skeleton.num_blocks):
        prefix = job.skeleton.block_name(index)
        found = gradient_weights(job, index)
        assert {f"{prefix}.{path}" for path in found} == {
            full for full in job.plan.grids if full.startswith(f"{prefix}.")
        }
        for path, [weight_MG] in found.items():
            wanted_MG = expected[f"{prefix}.{path}"]
            torch.testing.assert_close(weight_MG, wanted_MG, rtol=2e-3, atol=2e-3)
            assert weight_MG.std() > 0.1


@pytest.mark.parametrize("strategy", ["none", "gradient"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_moments_of_outputs_are_those_of_the_whole_model(name, strategy, tmp_path):
    choices = {**CHOICES, "importance.strategy": strategy, "solver.two_sided": True}
    job = passed(tmp_path / "job", choices, name)
    ids_BT = job.windows.ids_BT
    slopes = whole_model_slopes(name, ids_BT, torch.ones_like(ids_BT))
    for index in range(job.skeleton.num_blocks):
        prefix = job.skeleton.block_name(index)
        found = output_moments(job, index)
        assert "self_attn.q_proj" in found
        for path, moment_NN in found.items():
            slope_MN = slopes.get(f"{prefix}.{path}")
            if slope_MN is not None:  # experts are modules of their own only in the job
                wanted_NN = (slope_MN.T @ slope_MN).float()
                scale = wanted_NN.diagonal().mean()
                torch.testing.assert_close(moment_NN / scale, wanted_NN / scale, rtol=0, atol=5e-3)
        assert bool(gradient_weights(job, index)) == (strategy == "gradient")


def test_an_orthogonal_basis_changes_no_weight_of_whole_layers(tmp_path):
    """|d loss / d y|^2 is the same in any basis of y."""
    plain = passed(tmp_path / "plain")
    rotated = passed(tmp_path / "rotated", {**CHOICES, **ROTATED})
    for index in range(2):
        found = gradient_weights(rotated, index)
        for path, [weight_MG] in gradient_weights(plain, index).items():
            torch.testing.assert_close(found[path][0], weight_MG, rtol=5e-3, atol=5e-3)


def test_padding_is_left_out(tmp_path):
    ids_BT = random_ids(2, 24)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 15:] = 0
    job = passed(tmp_path / "job", batches=(Batch(ids_BT=ids_BT, mask_BT=mask_BT),))
    expected = whole_model_weights("llama", ids_BT, mask_BT, mask_BT=mask_BT)
    for path, [weight_MG] in gradient_weights(job, 0).items():
        assert len(weight_MG) == 24 + 15
        wanted_MG = expected[f"model.layers.0.{path}"]
        torch.testing.assert_close(weight_MG, wanted_MG, rtol=2e-3, atol=2e-3)


def test_a_masked_model_is_asked_where_a_token_is_hidden(tmp_path):
    ids_BT = random_ids(2, 24)
    hidden_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    hidden_BT[0, 3], hidden_BT[1, 7] = True, True
    job = passed(tmp_path / "job", batches=(Batch(ids_BT=ids_BT, hidden_BT=hidden_BT),))
    expected = whole_model_weights("llama", ids_BT, hidden_BT)
    [weight_MG] = gradient_weights(job, 1)["mlp.down_proj"]
    wanted_MG = expected["model.layers.1.mlp.down_proj"]
    torch.testing.assert_close(weight_MG, wanted_MG, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_an_expert_weighs_the_tokens_that_are_sent_to_it(name, tmp_path):
    job = passed(tmp_path / "job", name=name)
    experts = {path: w for path, [w] in gradient_weights(job, 0).items() if "experts" in path}
    assert experts
    sent = torch.stack([weight_MG[:, 0] > 0 for weight_MG in experts.values()])
    # two of four for each token, and the same ones for all products of an expert
    assert (sent.sum(0) * 4 == 2 * len(sent)).all()


def test_a_finished_pass_is_not_run_again(tmp_path):
    before = gradient_weights(passed(tmp_path / "job"), 0)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "job").glob("gradient-*")}
    after = gradient_weights(passed(tmp_path / "job"), 0)
    assert len(written) == 2
    assert written == {file: file.stat().st_mtime_ns for file in written}
    assert all(torch.equal(before[path][0], after[path][0]) for path in before)
    assert not list((tmp_path / "job").glob("hidden-*"))


def test_a_window_that_asks_nothing_is_refused(tmp_path):
    ids_BT = random_ids(2, 24)
    special_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    special_BT[1] = True
    with pytest.raises(RotqError, match="a calibration window has no gradient"):
        passed(tmp_path / "job", batches=(Batch(ids_BT=ids_BT, special_BT=special_BT),))


def test_a_head_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "sampled_slope", lambda logits_BCV, _: logits_BCV / 0)
    with pytest.raises(RotqError, match="at the head is not finite"):
        passed(tmp_path / "job")


def test_a_layer_without_gradient_is_named():
    none_MG = torch.zeros(5, 1)
    with pytest.raises(RotqError, match=r"h\.0\.fc: the loss has no gradient there"):
        gradients.with_mean_one("h.0.fc", none_MG, False)
    assert (gradients.with_mean_one("h.0.fc", none_MG, True) == 1).all()
    with pytest.raises(RotqError, match=r"h\.0\.fc: the gradient of the loss is not finite"):
        gradients.with_mean_one("h.0.fc", none_MG / 0, False)


def test_the_loss_is_of_tokens_drawn_from_the_model():
    """Over many draws every token is drawn as often as its probability says."""
    logits_BCV = torch.tensor([2.0, 1.0, 0.0, -torch.inf]).expand(2, 3000, -1)
    slope_BCV = sampled_slope(logits_BCV, torch.Generator().manual_seed(0))
    drawn_BCV = logits_BCV.softmax(-1) - slope_BCV
    assert set(drawn_BCV.round(decimals=5).unique().tolist()) == {0.0, 1.0}
    assert (drawn_BCV.round().sum(-1) == 1).all()
    torch.testing.assert_close(
        drawn_BCV.mean((0, 1)), logits_BCV[0, 0].softmax(-1), atol=0.02, rtol=0
    )
    again_BCV = sampled_slope(logits_BCV, torch.Generator().manual_seed(0))
    assert torch.equal(slope_BCV, again_BCV)
