"""Moments of slopes at what layers put out."""

import torch

from rotq.quantize.output_moments import OutputMoments
from rotq.ranks import ALONE


def test_a_matrix_of_which_a_half_is_summed_is_stored_whole() -> None:
    N = 520  # from 512 on
    moments, slope_MN = OutputMoments(), torch.randn(9, N)
    moments.see("mlp.up_proj", slope_MN[:4])
    moments.see("mlp.up_proj", slope_MN[4:].unflatten(0, (1, 5)))
    [found_NN] = moments.stored("block", ALONE).values()
    assert torch.equal(found_NN, found_NN.T)
    torch.testing.assert_close(found_NN, slope_MN.T @ slope_MN, rtol=1e-5, atol=1e-4)
