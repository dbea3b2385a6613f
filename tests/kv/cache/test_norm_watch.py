"""A GPU's answer about norms comes before the next pass, and is asked for once."""

from typing import Any

import pytest
import torch
from kv_oracle import calibration_of
from tiny_models import random_ids, tiny_model

from rotq.errors import RotqError
from rotq.kv.cache.norm_watch import NormWatch
from rotq.kv.cache.packed_cache import PackedCache


class Copied:
    """In place of an event of CUDA."""

    def __init__(self) -> None:
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


def test_an_answer_is_asked_for_once() -> None:
    watch, copied = NormWatch(), Copied()
    watch.settle()
    watch._pending = torch.tensor(False), copied  # type: ignore[assignment]
    watch.settle()
    watch.settle()
    assert copied.waits == 1
    watch._pending = torch.tensor(True), copied  # type: ignore[assignment]
    with pytest.raises(RotqError, match="not finite"):
        watch.settle()
    watch.settle()
    watch._pending = torch.tensor(True), copied  # type: ignore[assignment]
    watch.forget()
    watch.settle()


@torch.no_grad()
def test_a_cache_whose_norms_did_not_fit_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the pass itself has ended well."""
    model, ids = tiny_model("llama", dtype=torch.float32), random_ids(1, 12)
    cache = PackedCache(model, calibration_of(model))
    look = NormWatch.look

    def later(watch: NormWatch, layers: Any) -> None:
        try:
            look(watch, layers)
        except RotqError:
            watch._pending = torch.tensor(True), Copied()  # type: ignore[assignment]

    monkeypatch.setattr(NormWatch, "look", later)
    model(input_ids=ids[:, :5], past_key_values=cache)
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    model(input_ids=ids[:, 5:6], past_key_values=cache)
    for message in ("not finite", r"call reset\(\)"):
        with pytest.raises(RotqError, match=message):
            model(input_ids=ids[:, 6:7], past_key_values=cache)
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = 0.1
    cache.reset()
    model(input_ids=ids[:, :5], past_key_values=cache)
