"""Weights of a job's tokens: mean one over each window, none for padding."""

import dataclasses

import pytest
import torch
from memory_jobs import make_job

from rotq.calibration.batches import Batch
from rotq.quantize.block_runner import BlockRunner
from rotq.quantize.token_weights import effective_share, token_weights

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
    weights, _ = weights_of(tmp_path / "job", "none")
    assert weights is None
    assert effective_share(weights) == 1.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_window_has_the_same_mass_and_padding_none(tmp_path, strategy):
    weights, batch = weights_of(tmp_path / "job", strategy)
    assert len(weights) == 1
    for weight_T, length in zip(weights[0], batch.lengths(), strict=True):
        assert weight_T[:length].mean() == pytest.approx(1.0, rel=1e-5)
        assert weight_T[:length].std() > 0.01
        assert (weight_T[length:] == 0).all()
    assert 0.2 < effective_share(weights) < 0.999


def test_rare_tokens_weigh_more(tmp_path):
    weights, batch = weights_of(tmp_path / "job", "token_frequency")
    ids_M, weight_M = batch.ids_BT[0], weights[0][0]
    counts_V = torch.bincount(batch.without_padding(batch.ids_BT.flatten()), minlength=PADDING)
    rare, common = counts_V[ids_M].argmin(), counts_V[ids_M].argmax()
    assert weight_M[rare] > weight_M[common]
