"""A layer's codec: what a code stands for, spelled out; errors that theory predicts."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.codec import KVCodec
from rotq.kv.presets import KVSpec, preset
from rotq.models.rotary import Rotary
from rotq.ops import KVConstants, decode_norm, level_values


def transform_of(spec: KVSpec) -> KVConstants:
    return data_oblivious(tiny_model("llama").config, spec).layers[0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, x: Tensor) -> float:
    return float((found - x).square().sum() / x.square().sum())


def test_codes_stand_for_level_norm_matrix_and_mean() -> None:
    transform = transform_of(preset("k4v3"))
    transform.mean = "static"
    transform.key.mean_HD = normal(2, 16, seed=1)
    transform.value.mean_HD = normal(2, 16, seed=2)
    k_BHTD, v_BHTD = normal(3, 2, 5, 16, seed=3), normal(3, 2, 5, 16, seed=4)
    position_BT = torch.arange(5).expand(3, -1)
    codec = KVCodec(transform)
    codes = codec.encode(k_BHTD, v_BHTD, position_BT)
    assert codes.k_codes_BHTD.dtype == torch.uint8
    assert int(codes.k_codes_BHTD.max()) == 15
    assert int(codes.v_codes_BHTD.max()) == 7
    k_hat_BHTD, v_hat_BHTD = codec.decode(codes, position_BT, torch.float64)
    for side, bits, stored, q, found in (
        (transform.key, 4, codes.k_norm_BHT, codes.k_codes_BHTD, k_hat_BHTD),
        (transform.value, 3, codes.v_norm_BHT, codes.v_codes_BHTD, v_hat_BHTD),
    ):
        assert stored is not None
        for head in range(2):
            level = level_values(side.levels_HL, bits)[head][q[:, head].long()].double()
            s = decode_norm(stored[:, head], side.base_H[head])[..., None].double()
            expected = (s * level) @ side.inverse_HDD[head].mT.double() + side.mean_HD[head]
            torch.testing.assert_close(found[:, head], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_error_on_normal_numbers(bits: int, expected: float) -> None:
    spec = replace(preset("turboquant"), k_bits=bits, v_bits=bits)
    config = tiny_model("llama").config
    config.head_dim = 128
    codec = KVCodec(data_oblivious(config, spec).layers[0])
    k_BHTD = normal(1, 2, 500, 128)
    k_hat_BHTD, v_hat_BHTD = codec.fake_quantize(k_BHTD, k_BHTD, torch.arange(500)[None])
    assert relative_error(k_hat_BHTD, k_BHTD) == pytest.approx(expected, rel=0.03)
    assert torch.equal(k_hat_BHTD, v_hat_BHTD)


@pytest.mark.parametrize("name", ["k8v3", "k4v4", "k3v3", "turboquant", "turboquant-prod"])
def test_scale_equivariant(name: str) -> None:
    codec = KVCodec(transform_of(preset(name)))
    k_BHTD = normal(1, 2, 7, 16)
    position_BT = torch.arange(7)[None]
    once = codec.encode(k_BHTD, k_BHTD, position_BT)
    twice = codec.encode(16 * k_BHTD, 16 * k_BHTD, position_BT)
    assert torch.equal(once.k_codes_BHTD, twice.k_codes_BHTD)
    assert torch.equal(once.v_codes_BHTD, twice.v_codes_BHTD)


def test_turned_mean_costs_nothing() -> None:
    """Keys that are their turned mean come back as they were."""
    transform = transform_of(preset("k3v3"))
    transform.mean, transform.inv_freq_R = "rope", torch.tensor([1.0, 0.5, 0.1, 0.01])
    transform.key.mean_HD = normal(2, 16)
    rotary = Rotary(inv_freq_R=transform.inv_freq_R)
    position_BT = torch.tensor([[5, 6, 100]])
    mean_BHTD = rotary.turn(transform.key.mean_HD[:, None], position_BT[0])[None]
    zero_BHTD = torch.zeros(1, 2, 3, 16)
    found = KVCodec(transform).fake_quantize(mean_BHTD, zero_BHTD, position_BT)[0]
    # the smallest norm there is stands for an rms of 2^-8
    torch.testing.assert_close(found, mean_BHTD, rtol=0, atol=0.01)


@pytest.mark.parametrize("sketch", ["orthogonal", "gaussian"])
def test_unbiased_sketch(sketch: str) -> None:
    """Summed over many keys with their own queries, scores keep their size: slope 1."""
    spec = replace(preset("turboquant-prod"), k_bits=3, sketch=sketch, residual_scale="unbiased")
    config = tiny_model("llama").config
    config.head_dim = 64
    codec = KVCodec(data_oblivious(config, spec).layers[0])
    k_BHTD = normal(1, 2, 4000, 64)
    k_hat_BHTD = codec.fake_quantize(k_BHTD, k_BHTD, torch.arange(4000)[None])[0]
    slope = float((k_BHTD * k_hat_BHTD).sum() / k_BHTD.square().sum())
    assert slope == pytest.approx(1.0, abs=0.005)
    # table of kv.md 1.3: (b - 1 + 1 bits at b = 4) orthogonal 0.0197, Gaussian 0.0543
    expected = {"orthogonal": 0.0197, "gaussian": 0.0543}[sketch]
    assert relative_error(k_hat_BHTD, k_BHTD) == pytest.approx(expected, rel=0.1)


def test_dtypes_come_back() -> None:
    codec = KVCodec(transform_of(preset("k3v3")))
    k_BHTD = normal(1, 2, 3, 16).bfloat16()
    found = codec.fake_quantize(k_BHTD, k_BHTD, torch.arange(3)[None])
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16]
