"""What needs no training through the model: closed-form scales and R1, OptRot."""

import pytest
import torch
from memory_jobs import make_job
from random_rotations import random_orthogonal
from tiny_models import MemorySource, random_ids, tiny_model
from tiny_transforms import W4A4KV4

from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.models.scalings import Scaling, scalings
from rotq.rotations.basis import SCALINGS, Basis
from rotq.rotations.hadamard import orthogonal
from rotq.transform import optrot
from rotq.transform.balance import Balancer, _tied
from rotq.transform.parameters import Parameters
from rotq.transform.windows import TrainingWindows


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    """A model with features of very different size in front of down and o."""
    model = tiny_model("llama", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        spread = (1.5 * torch.randn(80, generator=generator)).exp()
        layer.mlp.up_proj.weight.mul_(spread[:, None])
        layer.self_attn.v_proj.weight[3].mul_(20)
        layer.self_attn.k_proj.weight[2].mul_(10)
    job = make_job(
        tmp_path_factory.mktemp("balanced") / "job",
        {"weights.group_fallback": "auto"},
        source=MemorySource(model),
    )
    outer = TrainingWindows(job).outer
    embedded = [job.skeleton.embed(outer, ids) for ids in random_ids(4, 32).split(2)]
    balancer = Balancer(job)
    return model, balancer, balancer.measure(embedded)


def test_scales_of_up_are_the_fourth_root_of_mean_squares_over_weights(balanced):
    model, balancer, squares = balanced
    seen = []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(random_ids(4, 32))
    handle.remove()
    x_I = seen[0].flatten(0, 1).square().mean(0)
    w_I = down.weight.square().mean(0)
    expected = (x_I / w_I).pow(0.25)
    found = balancer.scales(squares, Basis(), ["up"])["1.scales.up"][0]
    ratio = found / expected
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones(80), rtol=1e-3, atol=0)
    assert found.log().mean().abs() < 1e-5


def test_scales_of_up_make_the_error_of_rounding_smaller(balanced):
    model, balancer, squares = balanced
    seen = []
    down = model.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(random_ids(8, 32, seed=1))
    handle.remove()
    x_MI = seen[0].flatten(0, 1)
    H_II = orthogonal("hadamard", 80, 0).float()
    grid = ActivationGrid(bits=4, symmetric=False)

    def error(scale_I):
        turned = fake_quantize((x_MI / scale_I) @ H_II, grid)
        return (((turned @ H_II.T) * scale_I - x_MI) @ down.weight.T).square().mean()

    best = balancer.scales(squares, Basis(), ["up"])["0.scales.up"][0]
    assert error(best) < 0.8 * error(torch.ones(80))
    assert error(best) < error(best.square())
    assert error(best) < error(best.sqrt())


def test_factors_of_values_and_keys_counter_outliers(balanced):
    _, balancer, squares = balanced
    factors = balancer.scales(squares, Basis(), ["value", "query_key"])
    value_HK, key_HF = factors["0.scales.value"], factors["0.scales.query_key"]
    # values are divided by their factor, keys multiplied: large features become smaller
    assert value_HK[0, 3] == value_HK.max()
    assert key_HF[0, 2] == key_HF.min()


def mean_squares(model, module, change=lambda x: x):
    """Of a module's input over the tokens of ``balanced``, per feature."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(change(args[0])))
    model(random_ids(4, 32))
    handle.remove()
    return seen[0].flatten(0, 1).square().mean(0)


@pytest.mark.parametrize("rotated", [False, True])
def test_scales_behind_norms_are_the_rms_of_what_is_read(balanced, rotated):
    model, balancer, squares = balanced
    layer = model.model.layers[1]
    x_D = mean_squares(model, layer.self_attn.q_proj)
    basis = Basis()
    if rotated:
        # R1 takes the gain into the weights; its features are mixtures of what is left
        basis = Basis(residual_DD=random_orthogonal(48, 0))
        x_D = (x_D / layer.input_layernorm.weight.square()) @ basis.residual_DD.float().square()
    found = balancer.scales(squares, basis, ["qkv"])["1.scales.qkv"]
    ratio = found / x_D.sqrt()
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones(48), rtol=1e-3, atol=0)


def test_factors_of_keys_are_shared_by_the_features_that_rope_mixes(balanced):
    model, balancer, squares = balanced
    found = balancer.scales(squares, Basis(), ["query_key"])["1.scales.query_key"]
    attention, ids = model.model.layers[1].self_attn, random_ids(4, 32)
    seen = {}
    handles = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda _, __, y, name=name: seen.update({name: y.flatten(0, 1).square().mean(0)})
        )
        for name in "qk"
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    # two query heads per KV head, features i and i + 8
    q_HF = seen["q"].view(2, 2, 2, 8).sum((1, 2))
    k_HF = seen["k"].view(2, 1, 2, 8).sum((1, 2))
    ratio = found / (q_HF / k_HF).pow(0.25)
    torch.testing.assert_close(ratio / ratio.mean(), torch.ones(2, 8), rtol=1e-3, atol=0)


def test_a_feature_that_rope_leaves_counts_as_a_pair_of_itself():
    scaling = Scaling(shape=(1, 3), num_pairs=2)
    tied = _tied(torch.tensor([1.0, 2.0, 10.0, 20.0, 5.0]), scaling)
    assert tied.tolist() == [[11.0, 22.0, 10.0]]


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3-moe-mixed", "llama-biases"])
def test_every_family_gets_factors_of_the_right_shape(tmp_path, name):
    job = make_job(tmp_path / "job", {"weights.group_fallback": "auto"}, name=name)
    balancer = Balancer(job)
    squares = balancer.measure(TrainingWindows(job).embedded())
    factors = balancer.scales(squares, Basis(), SCALINGS)
    for index, layer in enumerate(scalings(job.skeleton, SCALINGS)):
        for key, scaling in layer.items():
            found = factors[f"{index}.scales.{key}"]
            assert found.shape == scaling.shape
            assert (found > 0).all()
            assert torch.isfinite(found).all()


def test_optrot_flattens_and_is_invariant_to_what_norms_scale(tmp_path):
    job = make_job(tmp_path / "job", {**W4A4KV4, "activations.bits": 16})
    drawn = Basis(residual_DD=torch.eye(48, dtype=torch.float64))
    parameters = Parameters(
        drawn,
        job.skeleton,
        scaled=(),
        factors={},
        device=torch.device("cpu"),
    )
    with torch.enable_grad():
        loss = optrot.backward(job, parameters, 0)
    model = tiny_model("llama", dtype=torch.float64)
    kinds = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (None, (attention.o_proj, mlp.down_proj)),
        ):
            for linear in linears:
                weight = linear.weight if norm is None else linear.weight * norm.weight
                kinds.append(weight.pow(4).mean() / weight.square().mean() ** 2)
    # by block, then over blocks: every block has seven layers
    assert loss == pytest.approx(torch.stack(kinds).mean().item(), rel=1e-4)
    assert parameters.free()["residual"].grad.abs().max() > 0
