"""The layer loss: features in the basis are those of the fused block, and less of it is better."""

import pytest
import torch
from memory_jobs import make_job
from tiny_transforms import LEARNED, SCALED, W4A4KV4

from rotq.calibration.capture import capture_inputs
from rotq.formats.activations import fake_quantize
from rotq.fusion.draw import build_basis
from rotq.fusion.fuse import fuse_block, in_basis
from rotq.fusion.maps import block_maps
from rotq.job.part_names import TRANSFORM
from rotq.layers.online_linear import OnlineLinear, prepared_input
from rotq.models.scalings import scalings
from rotq.recipe import Rotation
from rotq.rotations.basis import Basis, Scales
from rotq.transform.layer_loss import LayerLoss, _in_basis, spaced, squared_steps
from rotq.transform.methods import learned
from rotq.transform.parameters import Parameters
from rotq.transform.windows import TrainingWindows


def loss_of(job, *, folds_gains=True):
    loss = LayerLoss(job=job, folds_gains=folds_gains)
    loss.measure(TrainingWindows(job).embedded())
    return loss


def random_basis(skeleton):
    """R1, R2 and R4 Hadamard, every scale random."""
    adapter = skeleton.adapter
    residual = "hadamard" if adapter.residual_rotation else "none"
    rotation = Rotation(residual=residual, value="hadamard", down="hadamard", seed=2)
    basis = build_basis(rotation, adapter, skeleton.config)
    generator = torch.Generator().manual_seed(1)
    scales = []
    for layer in scalings(skeleton, SCALED):
        drawn = {
            name: scaling.expand((0.4 * torch.randn(scaling.shape, generator=generator)).exp())
            for name, scaling in layer.items()
        }
        scales.append(Scales.of({name: factors.double() for name, factors in drawn.items()}))
    return basis.with_tensors(basis.tensors() | Basis(scales=tuple(scales)).tensors())


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "gemma3", "qwen3-moe-mixed"])
def test_features_in_the_basis_are_what_the_fused_layers_read(tmp_path, name):
    job = make_job(tmp_path / "job", W4A4KV4 | {"rotation.residual": "none"}, name=name)
    skeleton, basis = job.skeleton, random_basis(job.skeleton)
    loss = loss_of(job, folds_gains=basis.residual_DD is not None)
    hidden_BTD = TrainingWindows(job).embedded()[0]
    R_DD = basis.residual_DD
    turned_BTD = hidden_BTD if R_DD is None else hidden_BTD @ R_DD.float()
    block = skeleton.load_block(0, job.source, device="cpu", dtype=torch.float32)
    features, _ = loss._features(0, block, hidden_BTD)
    reads, _ = block_maps(block, dict(block.named_parameters()), skeleton.adapter, basis, 0)
    fused = skeleton.load_block(0, job.source, device="cpu", dtype=torch.float32)
    fuse_block(fused, skeleton.adapter, basis, 0)
    firsts = {site.name: site.linears[0] for site in skeleton.adapter.sites(block)}
    kwargs = skeleton.block_kwargs(0, turned_BTD)
    seen, _ = capture_inputs(fused, firsts.values(), turned_BTD, kwargs)
    for site, first in firsts.items():
        linear = fused.get_submodule(first)
        read = seen[first]
        if isinstance(linear, OnlineLinear):
            read = linear.prepare_input(read)
        ours = _in_basis(features[site].double(), reads[first], site).float()
        scale = read.abs().max().item()
        torch.testing.assert_close(ours, read, rtol=1e-3, atol=1e-4 * scale)


def actual_error(job, basis, index=1):
    """Mean over linears of |Q(x') W'^T - x' W'^T|^2 / |x' W'^T|^2."""
    skeleton = job.skeleton
    hidden_BTD = TrainingWindows(job).embedded()[0]
    fused = skeleton.load_block(index, job.source, device="cpu", dtype=torch.float32)
    fuse_block(fused, skeleton.adapter, basis, index)
    names = [p for site in skeleton.adapter.sites(fused) for p in site.linears]
    kwargs = skeleton.block_kwargs(index, hidden_BTD)
    turned_BTD = hidden_BTD @ basis.residual_DD.float()
    seen, _ = capture_inputs(fused, names, turned_BTD, kwargs)
    shares = []
    for name in names:
        linear = fused.get_submodule(name)
        x = linear.prepare_input(seen[name]) if isinstance(linear, OnlineLinear) else seen[name]
        y = x @ linear.weight.T
        rounded = fake_quantize(x, job.plan.inputs) @ linear.weight.T
        shares.append((rounded - y).square().sum() / y.square().sum())
    return torch.stack(shares).mean().item()


def test_the_loss_foretells_the_error_of_rounded_inputs(tmp_path):
    job = make_job(tmp_path / "job", {**W4A4KV4, "weights.bits": 8}, num_windows=8)
    skeleton = job.skeleton
    drawn = build_basis(job.recipe.rotation, skeleton.adapter, skeleton.config)
    loss = loss_of(job)
    hidden_BTD = TrainingWindows(job).embedded()[0]
    single = drawn.with_tensors({n: t.float() for n, t in drawn.tensors().items()})
    foretold = loss._block_loss(1, hidden_BTD, single).item()
    assert foretold == pytest.approx(actual_error(job, drawn), rel=0.25)


@pytest.mark.parametrize("residual", ["none", "hadamard"])
def test_the_first_loss_is_that_of_the_start(tmp_path, residual):
    """With gains in the weights where R1 moves them there, in what is read where it does not."""
    choices = {**LEARNED, "rotation.residual": residual, "transform.layer_steps": 1}
    choices |= {"transform.steps": 0, "transform.balance": [], "weights.bits": 8}
    job = make_job(tmp_path / "job", choices, num_windows=1)
    skeleton = job.skeleton
    drawn = build_basis(job.recipe.rotation, skeleton.adapter, skeleton.config)
    _, figures = learned(TrainingWindows(job), drawn)
    # what is read and what reads it, taken from the fused blocks
    expected = []
    for index in (0, 1):
        hidden_BTD = loss_of(job, folds_gains=residual != "none").hidden[index][0]
        block = skeleton.load_block(index, job.source, device="cpu", dtype=torch.float32)
        fuse_block(block, skeleton.adapter, drawn, index)
        sites = skeleton.adapter.sites(block)
        turned_BTD = in_basis(hidden_BTD, drawn)
        kwargs = skeleton.block_kwargs(index, turned_BTD)
        seen, _ = capture_inputs(block, [s.linears[0] for s in sites], turned_BTD, kwargs)
        for site in sites:
            linear = block.get_submodule(site.linears[0])
            x_MK = prepared_input(linear, seen[site.linears[0]])
            step = squared_steps(x_MK, 4, symmetric=False).mean()
            for path in site.linears:
                weight_NK = block.get_parameter(f"{path}.weight")
                energy = (x_MK @ weight_NK.T).square().sum(-1).mean()
                expected.append(step * weight_NK.square().sum() / 12 / energy)
    # rounding weights to 8 bits adds less than this tolerance
    found = figures["layers"]["loss_first_quarter"]
    assert found == pytest.approx(torch.stack(expected).mean().item(), rel=0.02)


def test_training_lowers_the_error_that_is_made(tmp_path):
    trained = {"transform.layer_steps": 40, "transform.steps": 0, "transform.balance": []}
    job = make_job(tmp_path / "job", {**LEARNED, **trained}, num_windows=4)
    skeleton = job.skeleton
    # something to gain: features of very different size in front of down
    generator = torch.Generator().manual_seed(0)
    spread_I1 = (1.5 * torch.randn(80, 1, generator=generator)).exp()
    for index in (0, 1):
        job.source.tensors[f"model.layers.{index}.mlp.up_proj.weight"] *= spread_I1
    drawn = build_basis(job.recipe.rotation, skeleton.adapter, skeleton.config)
    basis, figures = learned(TrainingWindows(job), drawn)
    assert figures["layers"]["loss_last_quarter"] < 0.9 * figures["layers"]["loss_first_quarter"]
    assert actual_error(job, basis) < 0.85 * actual_error(job, drawn)
    assert not job.folder.recorded(TRANSFORM)


def test_a_common_factor_of_all_scales_changes_nothing(tmp_path):
    """Or the loss could be made as small as one likes by scaling weights down."""
    job = make_job(tmp_path / "job", {**W4A4KV4, "activations.bits": 16})
    skeleton, loss = job.skeleton, loss_of(job)
    drawn = build_basis(job.recipe.rotation, skeleton.adapter, skeleton.config)
    hidden_BTD = TrainingWindows(job).embedded()[0]
    losses = []
    for factor in (1.0, 3.0):
        scales = [
            {name: torch.full(s.shape, factor) for name, s in layer.items()}
            for layer in scalings(skeleton, ["qkv", "gate_up", "value", "up"])
        ]
        named = drawn.tensors() | Basis(scales=tuple(Scales.of(s) for s in scales)).tensors()
        single = drawn.with_tensors({n: t.float() for n, t in named.items()})
        losses.append(loss._block_loss(0, hidden_BTD, single).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_gradients_reach_what_is_trained(tmp_path):
    job = make_job(tmp_path / "job", W4A4KV4)
    skeleton, loss = job.skeleton, loss_of(job)
    drawn = build_basis(job.recipe.rotation, skeleton.adapter, skeleton.config)
    parameters = Parameters(
        drawn,
        skeleton,
        scaled=SCALED,
        factors={},
        device=torch.device("cpu"),
    )
    with torch.enable_grad():
        loss.backward(parameters, 0)
    for name, free in parameters.free().items():
        if not name.endswith("query_key"):
            assert free.grad is not None, name
            assert free.grad.abs().max() > 0, name


def test_steps_take_evenly_spaced_blocks():
    assert spaced(0, 30, 8) == [0, 3, 6, 9, 12, 15, 18, 21]
    assert spaced(2, 2, 8) == [0, 1]
    assert {index for step in range(30) for index in spaced(step, 30, 8)} == set(range(30))
