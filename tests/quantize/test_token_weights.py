"""Weights of a job's tokens: mean one over each window, padding left out."""

import dataclasses

import pytest
import torch
from memory_jobs import make_job

from rotq.calibration.batches import Batch
from rotq.quantize.block_runner import BlockRunner
from rotq.quantize.token_weights import token_weights
from rotq.ranks import ALONE

STRATEGIES = ["attention", "activation_norm", "token_similarity", "token_frequency"]
PADDING = 96
"""Larger than every id in the windows, which token counts end with."""


def weights_of(folder, strategy):
    """Two windows, the second with 4 tokens of padding."""
    job = make_job(folder, {"weights.group_size": 16, "importance.strategy": strategy})
    ids_BT = job.windows.ids_BT[:2].clamp(max=50)
    mask_BT = torch.ones_like(ids_BT)
    ids_BT[1, 20:], mask_BT[1, 20:] = PADDING, 0
    batch = Batch(ids_BT=ids_BT, mask_BT=mask_BT)
    job = dataclasses.replace(job, windows=dataclasses.replace(job.windows, batches=(batch,)))
    streams = BlockRunner(job).start(job.skeleton.load_outer(job.source, dtype=job.dtype))
    return token_weights(job, 0, job.load_block(0, job.dtype), streams), batch


def test_without_a_strategy_all_tokens_count_the_same(tmp_path):
    assert weights_of(tmp_path / "job", "none")[0] is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_window_has_the_same_mass_and_padding_is_left_out(tmp_path, strategy):
    weights, batch = weights_of(tmp_path / "job", strategy)
    weight_M1 = weights.of("self_attn.q_proj", 0)
    assert weight_M1.shape == (batch.num_tokens, 1)
    for weight_T in weight_M1[:, 0].split(batch.lengths()):
        assert weight_T.mean() == pytest.approx(1.0, rel=1e-5)
        assert weight_T.std() > 0.01
    assert 0.2 < weights.effective_share(ALONE) < 0.999


def test_rare_tokens_weigh_more(tmp_path):
    weights, batch = weights_of(tmp_path / "job", "token_frequency")
    ids_M, weight_M = batch.ids_BT[0], weights.of("any", 0)[: batch.lengths()[0], 0]
    counts_V = torch.bincount(batch.without_padding(batch.ids_BT.flatten()), minlength=PADDING)
    rare, common = counts_V[ids_M].argmin(), counts_V[ids_M].argmax()
    assert weight_M[rare] > weight_M[common]
