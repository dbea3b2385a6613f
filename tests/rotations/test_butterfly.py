"""Butterflies: their definition, the Hadamard start, orthogonality at any angle, stored angles."""

import math

import pytest
import torch
from fused_models import fused_logits
from tiny_models import MemorySource, random_ids, tiny_model

from rotq.fusion.draw import build_basis
from rotq.models.attention.online import use_online_attention
from rotq.models.scalings import scalings
from rotq.models.skeleton import Skeleton
from rotq.recipe import Rotation
from rotq.rotations.basis import SCALINGS, Basis, Scales
from rotq.rotations.butterfly import (
    HADAMARD_ANGLE,
    UNIT,
    Butterfly,
    angle_shape,
    fast_butterfly,
    from_codes,
    to_codes,
)
from rotq.rotations.hadamard import fast_hadamard, paley_core, random_signs

SIZES = [2, 64, 24, 48, 80, 688]


def random_angles(n: int, seed: int = 0) -> torch.Tensor:
    """Whole steps, fp64."""
    generator = torch.Generator().manual_seed(seed)
    angles = (
        2 * torch.rand(angle_shape(n), generator=generator, dtype=torch.float64) - 1
    ) * math.pi
    return from_codes(to_codes(angles), torch.float64)


def dense(n: int, angles_AMQ: torch.Tensor) -> torch.Tensor:
    """The matrix as a product of plane reflections, each placed by the bits of its features."""
    stages, runs, _ = angles_AMQ.shape
    length = n // runs
    whole = torch.eye(n, dtype=torch.float64)
    for stage in range(stages):
        step = torch.zeros(n, n, dtype=torch.float64)
        for run in range(runs):
            for low in range(length):
                if low >> stage & 1:
                    continue
                high = low | 1 << stage
                # bits below the stage are at the top by then, in their order
                below, above = low & ((1 << stage) - 1), low >> (stage + 1)
                t = angles_AMQ[stage, run, (below << (stages - 1 - stage)) | above]
                i, j = run * length + low, run * length + high
                step[i, i], step[i, j] = t.cos(), t.sin()
                step[j, i], step[j, j] = t.sin(), -t.cos()
        whole = whole @ step
    mixed = torch.kron(paley_core(runs).double() / runs**0.5, torch.eye(length).double())
    return whole @ mixed


@pytest.mark.parametrize("n", [2, 8, 24, 48])
def test_is_the_product_of_its_reflections(n):
    angles = random_angles(n)
    rows = fast_butterfly(torch.eye(n, dtype=torch.float64), angles)
    torch.testing.assert_close(rows, dense(n, angles), rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [*SIZES, 1536, 11008])
def test_starts_at_the_hadamard_transform(n):
    angles, signs = torch.full(angle_shape(n), HADAMARD_ANGLE), random_signs(n, 1)
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = fast_hadamard(x, n, signs)
    # exactly pi / 4 as stored: rounded to fp32 it is 2e-8 off
    stored = to_codes(angles)
    assert (stored == 2**13).all()
    torch.testing.assert_close(fast_butterfly(x, stored, signs), expected, rtol=0, atol=1e-13)
    single = fast_butterfly(x.float(), stored, signs)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("n", SIZES)
def test_is_orthogonal_at_any_angle(n):
    B = fast_butterfly(torch.eye(n, dtype=torch.float64), random_angles(n), random_signs(n, 2))
    assert (B @ B.T - torch.eye(n)).abs().max() < 1e-13


def test_gradients_of_features_and_angles():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, dtype=torch.float64, generator=generator).requires_grad_()
    angles, signs = random_angles(48).requires_grad_(), random_signs(48, 0)
    assert torch.autograd.gradcheck(lambda x, t: fast_butterfly(x, t, signs), (x, angles))
    fixed = x.detach().float()
    fast_butterfly(fixed, angles).square().sum().backward()
    assert angles.grad.abs().max() < 1e-5  # a rotation keeps the sum of squares


def test_shapes_of_inputs_are_kept():
    angles = random_angles(48)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    y = fast_butterfly(x, angles)
    for index in (0, 1):
        torch.testing.assert_close(y[index], fast_butterfly(x[index], angles), rtol=0, atol=0)
    assert fast_butterfly(x[:0], angles).shape == (0, 3, 48)
    assert fast_butterfly(x.bfloat16(), angles).dtype == torch.bfloat16


def test_stored_angles():
    angles = torch.tensor([0.0, math.pi / 4, -math.pi, math.pi, 3 * math.pi, UNIT * 0.6, -1.0])
    codes = to_codes(angles)
    assert codes.dtype == torch.int16
    assert codes[:6].tolist() == [0, 2**13, -(2**15), -(2**15), -(2**15), 1]
    back = from_codes(codes, torch.float64)
    # the same angles, if not the same numbers
    assert (back.cos() - angles.double().cos()).abs().max() < UNIT
    assert (back.sin() - angles.double().sin()).abs().max() < UNIT
    assert torch.equal(to_codes(back), codes)


@pytest.mark.parametrize("n", [12, 20, 344])
def test_a_core_alone_has_no_pairs(n):
    with pytest.raises(ValueError, match=f"order {n} has no pairs"):
        angle_shape(n)


def test_a_step_turns_by_its_size_whatever_the_order():
    for n in (64, 1536):
        one = Butterfly(torch.full(angle_shape(n), HADAMARD_ANGLE))
        start = fast_butterfly(torch.eye(n), one.angles().detach())
        signs = torch.randint(0, 2, one.free.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            one.free.add_(0.02 * (signs * 2.0 - 1))
        turned = fast_butterfly(torch.eye(n), one.angles().detach())
        angle = (start * turned).sum(0).clamp(-1, 1).acos().square().mean().sqrt()
        assert angle.item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    "name", ["llama-biases", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3-moe-mixed"]
)
def test_random_angles_and_scales_preserve_the_function(name):
    """Every layer and expert with angles of its own, next to every other transform, in fp64."""
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    adapter, config = skeleton.adapter, skeleton.config
    use_online_attention(skeleton.model)
    residual = "hadamard" if adapter.residual_rotation else "none"
    rotation = Rotation(residual=residual, value="dct", down="hadamard", attention="hadamard")
    drawn = build_basis(rotation, adapter, config)
    generator = torch.Generator().manual_seed(1)
    named = drawn.tensors()
    scales = []
    for layer, allowed in enumerate(scalings(skeleton, SCALINGS)):
        paths = adapter.mlp_writers(skeleton.blocks[layer])
        width = skeleton.blocks[layer].get_submodule(paths[0]).in_features
        experts = range(len(paths))
        angles = [random_angles(width, seed=10 * layer + expert) for expert in experts]
        named[f"down.{layer}"] = torch.stack(angles)
        drawn_scales = {
            key: scaling.expand((0.4 * torch.randn(scaling.shape, generator=generator)).exp())
            for key, scaling in allowed.items()
        }
        scales.append(Scales.of({key: factors.double() for key, factors in drawn_scales.items()}))
    basis = drawn.with_tensors(named | Basis(scales=tuple(scales)).tensors())
    assert (basis.down, basis.down_kind) == ("hadamard", "butterfly")
    ids_BT = random_ids(2, 11)
    before, after = (fused_logits(skeleton, source, ids_BT, one) for one in (Basis(), basis))
    assert 0.5 < before.std() < 15
    assert (after - before).abs().max() < 1e-9


def test_the_checksum_knows_angles():
    drawn = Basis(down="hadamard")
    first, second = (
        drawn.with_tensors({"down.0": random_angles(48, seed)[None]}) for seed in (0, 1)
    )
    assert len({drawn.checksum(), first.checksum(), second.checksum()}) == 3
