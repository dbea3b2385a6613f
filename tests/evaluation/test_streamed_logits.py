"""Logits that are made when they are asked for are those of the model."""

import pytest
import torch
from tiny_models import random_ids, tiny_model

from rotq.errors import RotqError
from rotq.evaluation.logits import window_logits
from rotq.evaluation.streamed_logits import StreamedLogits


@pytest.mark.parametrize(("family", "streamed"), [("llama", True), ("qwen3", True)])
def test_they_are_those_of_the_model(family: str, streamed: bool) -> None:
    model, ids_T = tiny_model(family, dtype=torch.float32), random_ids(1, 40)[0]
    with torch.inference_mode():
        expected = window_logits(model, ids_T)
        found = StreamedLogits(model, ids_T)
        assert (found._logits_TV is None) == streamed
        parts = [found[slice(at, at + 7)] for at in range(0, 40, 7)]
    torch.testing.assert_close(torch.cat(parts), expected)


def test_logits_that_are_more_than_a_product_are_kept_whole() -> None:
    """With a softcap the head alone gives others."""
    model, ids_T = tiny_model("gemma3", dtype=torch.float32), random_ids(1, 20)[0]
    model.config.final_logit_softcapping = 0.05
    with torch.inference_mode():
        found = StreamedLogits(model, ids_T)
        assert found._hidden_TE is None
        torch.testing.assert_close(found[slice(3, 9)], window_logits(model, ids_T)[3:9])


def test_numbers_that_are_not_finite_are_refused() -> None:
    model, ids_T = tiny_model("llama", dtype=torch.float32), random_ids(1, 20)[0]
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with torch.inference_mode(), pytest.raises(RotqError, match="logits are not finite"):
        StreamedLogits(model, ids_T)[slice(0, 4)]
