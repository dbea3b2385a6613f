"""What transformers computes in fp32 is computed in fp64."""

import pytest
import torch
from tiny_models import tiny_model
from transformers.models.esm import modeling_esm

from rotq.models.exact import InDouble


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_norms_are_theirs_but_for_rounding(name):
    norm = tiny_model(name).model.layers[0].input_layernorm
    x_ND = torch.randn(5, 48, dtype=torch.float64)
    theirs = norm(x_ND)
    with InDouble():
        ours = norm(x_ND)
    assert 0 < (ours - theirs).abs().max() < 1e-5
    gain_D = norm.weight + (1.0 if name == "gemma3" else 0.0)
    by_hand = x_ND / (x_ND.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain_D
    torch.testing.assert_close(ours, by_hand, rtol=1e-14, atol=1e-14)
    assert torch.equal(norm(x_ND), theirs)


class PlainRMSNorm(torch.nn.Module):
    """Without a gain, as in Gemma 3n, DiffLlama and NanoChat."""

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_a_norm_without_a_gain():
    norm = PlainRMSNorm()
    x_ND = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with InDouble():
        ours = norm(x_ND)
    by_hand = x_ND / (x_ND.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(ours, by_hand, rtol=1e-14, atol=1e-14)
    assert 0 < (norm(x_ND) - ours).abs().max() < 1e-5


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.float32),
        lambda x: torch.softmax(x, -1, dtype=torch.float32),
        lambda x: torch.nn.functional.softmax(x, dim=-1, dtype=torch.float),
        lambda x: torch.zeros(3, dtype=torch.float32),
    ],
)
def test_ways_to_ask_for_fp32(made):
    x_N = torch.rand(3, dtype=torch.float64)
    with InDouble():
        assert made(x_N).dtype == torch.float64
    assert made(x_N).dtype == torch.float32


def test_other_dtypes_are_what_was_asked_for():
    with InDouble():
        assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16
        assert torch.ones(2, dtype=torch.float64).long().dtype == torch.int64


def test_esm_turns_in_the_dtype_it_is_given():
    generator = torch.Generator().manual_seed(0)
    q_BHTD = torch.randn(1, 2, 5, 8, generator=generator, dtype=torch.float64)
    angle_BTD = torch.linspace(0, 3, 40, dtype=torch.float64).view(1, 5, 8)
    given = (q_BHTD, q_BHTD, angle_BTD.cos(), angle_BTD.sin())
    theirs, _ = modeling_esm.apply_rotary_pos_emb(*given)
    with InDouble():
        ours, key = modeling_esm.apply_rotary_pos_emb(*given)
    first, second = q_BHTD.chunk(2, dim=-1)
    by_hand = q_BHTD * angle_BTD.cos() + torch.cat((-second, first), dim=-1) * angle_BTD.sin()
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-15)
    assert torch.equal(ours, key)
    assert 0 < (ours - theirs).abs().max() < 1e-5
