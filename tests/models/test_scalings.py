"""Which factors are free: features that RoPE mixes and heads behind a norm share theirs."""

import pytest
import torch
from tiny_models import MemorySource, tiny_model

from rotq.errors import RotqError
from rotq.models.scalings import Scaling, scalings
from rotq.models.skeleton import Skeleton


def test_partial_rotary_leaves_the_rest_free():
    scaling = Scaling(shape=(1, 5), num_pairs=2)
    factors = scaling.expand(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    assert factors.tolist() == [[1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0]]


def test_norms_on_heads_share_factors_of_queries_and_keys():
    skeletons = {n: Skeleton.open(MemorySource(tiny_model(n))) for n in ("llama", "qwen3")}
    shapes = {n: scalings(s, ["query_key"])[0]["query_key"].shape for n, s in skeletons.items()}
    assert shapes == {"llama": (2, 8), "qwen3": (1, 12)}


def test_rope_of_unknown_layout_is_refused(monkeypatch):
    skeleton = Skeleton.open(MemorySource(tiny_model("llama")))
    monkeypatch.setattr("rotq.models.scalings.rotaries", lambda config: [None, None])
    with pytest.raises(RotqError, match="scaling query_key is not possible"):
        scalings(skeleton, ["query_key"])
    assert scalings(skeleton, ["up"])[0]["up"].shape == (1, 80)
