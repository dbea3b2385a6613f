"""What a model writes behind a prompt when it always takes the most likely token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotq.models.limits import embedding_device


@torch.inference_mode()
def continuation(model: Any, tokenizer: Any, prompt_T: Tensor, *, tokens: int) -> str:
    """Greedy text behind a prompt.

    Args:
        model: A causal language model of transformers, on any device.
        tokenizer: Its own.
        prompt_T: int64 ids.
        tokens: At most; fewer where the model ends its text.
    """
    ids_1T = prompt_T[None].to(embedding_device(model))
    written_1T = model.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    new_T = written_1T[0, ids_1T.shape[1] :]
    return str(tokenizer.decode(new_T.tolist(), skip_special_tokens=True))
