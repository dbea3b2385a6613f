"""The error of single blocks: its value, its gradients, training by it, stops and refusals."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from tiny_transforms import LEARNED, make_setting, spoil_block

from rotq.errors import RotqError
from rotq.formats.activations import fake_quantize
from rotq.fusion.fuse import fuse_block, in_basis
from rotq.job.folder import TRANSFORM
from rotq.report.progress import Progress
from rotq.rotations.basis import build_basis
from rotq.transform.block_error import backward, block_loss
from rotq.transform.parameters import Parameters
from rotq.transform.search import find_basis

BLOCK_MSE = {**LEARNED, "transform.objective": "block_mse", "transform.down": "butterfly"}


class Interrupted(Progress):
    def transform_step(self, name: str, step: int, total: int, loss: float) -> None:
        if (name, step) == ("blocks", 3):
            raise KeyboardInterrupt


def find(setting):
    skeleton = setting.skeleton
    drawn = build_basis(setting.recipe.rotation, skeleton.adapter, skeleton.config)
    return drawn, find_basis(setting, drawn)


def moved_parameters(setting):
    skeleton, options = setting.skeleton, setting.options
    parameters = Parameters(
        build_basis(setting.recipe.rotation, skeleton.adapter, skeleton.config),
        skeleton,
        scaled=options.scalings,
        factors={},
        butterfly=True,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for free in parameters.free().values():
            free.add_(0.1 * torch.randn(free.shape, generator=generator))
    return parameters


def hidden_states(setting):
    """Of the original model on the first window: before its blocks and behind each."""
    model = tiny_model("llama", dtype=torch.float32)
    states = [setting.skeleton.embed(setting.outer, setting.windows[0])]
    for index, layer in enumerate(model.model.layers):
        kwargs = setting.skeleton.block_kwargs(index, states[-1])
        states.append(layer(states[-1], **kwargs))
    return states


def test_the_loss_is_the_error_of_the_fused_block(tmp_path):
    setting = make_setting(tmp_path / "job", {**BLOCK_MSE, "kv_cache.bits": 16})
    skeleton = setting.skeleton
    basis = moved_parameters(setting).finished()
    states = hidden_states(setting)
    # by hand: fused, inputs of linears rounded by hooks, no basis in training involved
    block = skeleton.load_block(1, setting.source, device="cpu", dtype=torch.float32)
    fuse_block(block, skeleton.adapter, basis, 1)
    for site in skeleton.adapter.sites(block):
        for path in site.linears:
            linear = block.get_submodule(path)
            if path.endswith("down_proj"):
                linear.input_grid = setting.plan.inputs
            else:
                linear.register_forward_pre_hook(
                    lambda _, args: (fake_quantize(args[0], setting.plan.inputs),)
                )
    kwargs = skeleton.block_kwargs(1, states[1])
    found = block(in_basis(states[1], basis), **kwargs) @ basis.residual_DD.float().T
    expected = ((found - states[2]).square().sum(-1) / states[2].square().sum(-1)).mean()
    loss = block_loss(setting.student, 1, basis, states[1], states[2])
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert expected > 1e-3


def test_gradients_are_summed_over_blocks(tmp_path):
    setting = make_setting(tmp_path / "job", BLOCK_MSE)
    parameters, states = moved_parameters(setting), hidden_states(setting)
    with torch.enable_grad():
        loss = backward(setting.student, parameters, setting.outer, setting.windows[0], 0)
    streamed = {key: free.grad.clone() for key, free in parameters.free().items()}
    for free in parameters.free().values():
        free.grad = None
    with torch.enable_grad():
        basis = parameters.basis()
        losses = [
            block_loss(setting.student, index, basis, states[index], states[index + 1])
            for index in (0, 1)
        ]
        whole = torch.stack(losses).mean()
        whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-4)
    for key, free in parameters.free().items():
        assert free.grad.abs().max() > 0, key
        scale = free.grad.abs().max().item()
        torch.testing.assert_close(streamed[key], free.grad, rtol=1e-3, atol=1e-3 * scale)


def test_without_rounding_there_is_no_error(tmp_path):
    choices = {**BLOCK_MSE, "activations.bits": 16, "kv_cache.bits": 16}
    setting = make_setting(tmp_path / "job", choices)
    exact = replace(setting.student, rounds_weights=False)
    parameters = moved_parameters(setting)
    with torch.enable_grad():
        loss = backward(exact, parameters, setting.outer, setting.windows[0], 0)
        # what is rounded then are weights
        rounded = backward(setting.student, parameters, setting.outer, setting.windows[0], 0)
    assert loss < 1e-9
    assert rounded > 1e-4


def test_without_rounding_no_basis_is_better_than_another(tmp_path):
    """Against any target: slopes of weights, of what is given and of the target cancel."""
    choices = {**BLOCK_MSE, "activations.bits": 16, "kv_cache.bits": 16}
    setting = make_setting(tmp_path / "job", choices)
    exact = replace(setting.student, rounds_weights=False)
    parameters, states = moved_parameters(setting), hidden_states(setting)
    target_BTD = torch.randn(states[1].shape, generator=torch.Generator().manual_seed(0))
    largest = {}
    for name, student in (("exact", exact), ("rounded", setting.student)):
        with torch.enable_grad():
            loss = block_loss(student, 0, parameters.basis(), states[0], target_BTD)
            free = {
                k: v for k, v in parameters.free().items() if not k.startswith(("1.", "down.1"))
            }
            slopes = torch.autograd.grad(loss, list(free.values()))
        largest[name] = {k: s.abs().max() for k, s in zip(free, slopes, strict=True)}
        assert loss > 0.1
    assert max(largest["exact"].values()) < 1e-5
    # a factor of queries scales whole rows of a weight, and their grids with them
    del largest["rounded"]["0.scales.query_key"]
    assert min(largest["rounded"].values()) > 1e-2


def test_training_lowers_the_loss_and_repeats(tmp_path):
    one = {
        **BLOCK_MSE,
        "transform.layer_steps": 0,
        "transform.steps": 24,
        "transform.angle": 0.05,
        "transform.balance": [],
    }
    bases = []
    for run in ("first", "second"):
        setting = make_setting(tmp_path / run, one, num_windows=1)
        bases.append(find(setting)[1])
    found = setting.job.results(TRANSFORM)
    assert found["blocks"]["loss_last_quarter"] < 0.85 * found["blocks"]["loss_first_quarter"]
    assert "model" not in found
    assert bases[0].checksum() == bases[1].checksum()


def test_a_training_that_was_stopped_ends_the_same(tmp_path):
    _, basis = find(make_setting(tmp_path / "whole", BLOCK_MSE))
    with pytest.raises(KeyboardInterrupt):
        find(make_setting(tmp_path / "job", BLOCK_MSE, Interrupted()))
    assert (tmp_path / "job" / "transform-blocks.safetensors").exists()
    _, found = find(make_setting(tmp_path / "job", BLOCK_MSE))
    assert found.checksum() == basis.checksum()


def test_a_loss_that_is_not_finite_names_step_and_layer(tmp_path, monkeypatch):
    spoil_block(monkeypatch)
    where = r"the loss is nan at step 1, first in model\.layers\.1\.mlp\.up_proj"
    with pytest.raises(RotqError, match=where):
        find(make_setting(tmp_path / "job", {**BLOCK_MSE, "transform.layer_steps": 0}))
