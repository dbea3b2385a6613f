"""Norms and rotary positions in their input's dtype."""

import pytest
import torch
from tiny_models import tiny_model
from transformers.models.esm import modeling_esm

from rotq.models.exact import exact_norms, exact_rotary


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_exact_norms_are_theirs_but_for_rounding(name):
    model = tiny_model(name)
    norm = model.model.layers[0].input_layernorm
    x_ND = torch.randn(5, 48, dtype=torch.float64)
    theirs = norm(x_ND)
    with exact_norms(model):
        ours = norm(x_ND)
    assert 0 < (ours - theirs).abs().max() < 1e-5
    gain_D = norm.weight + (1.0 if name == "gemma3" else 0.0)
    by_hand = x_ND / (x_ND.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain_D
    torch.testing.assert_close(ours, by_hand, rtol=1e-14, atol=1e-14)
    assert torch.equal(norm(x_ND), theirs)


def test_unknown_norm_is_refused():
    class StrangeRMSNorm(torch.nn.Module):
        eps = 1e-6

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.weight.square()

    with (
        pytest.raises(ValueError, match=r"StrangeRMSNorm is not an RMSNorm with gain"),
        exact_norms(torch.nn.Sequential(StrangeRMSNorm())),
    ):
        pass


def test_esm_turns_in_the_dtype_it_is_given():
    generator = torch.Generator().manual_seed(0)
    q_BHTD = torch.randn(1, 2, 5, 8, generator=generator, dtype=torch.float64)
    angle_BTD = torch.linspace(0, 3, 40, dtype=torch.float64).view(1, 5, 8)
    given = (q_BHTD, q_BHTD, angle_BTD.cos(), angle_BTD.sin())
    theirs, _ = modeling_esm.apply_rotary_pos_emb(*given)
    with exact_rotary():
        ours, key = modeling_esm.apply_rotary_pos_emb(*given)
    first, second = q_BHTD.chunk(2, dim=-1)
    by_hand = q_BHTD * angle_BTD.cos() + torch.cat((-second, first), dim=-1) * angle_BTD.sin()
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-15)
    assert torch.equal(ours, key)
    assert 0 < (ours - theirs).abs().max() < 1e-5
    assert torch.equal(modeling_esm.apply_rotary_pos_emb(*given)[0], theirs)
