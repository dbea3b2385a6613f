"""Two short passes of a model with a cache that is new to it, before anything is promised.

What a family does with its cache shows only when it runs: some change keys after the cache, some
attend with learned sinks, some have other heads than their configuration says. The first cache of a
model therefore sees three tokens, and what fails then refuses the model, by name, while nothing
depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rotq.errors import RotqError, reason
from rotq.models.limits import vocabulary_of

LENGTHS = (2, 1)
"""Tokens of the passes: a prompt, and a step of decoding."""


@torch.no_grad()
def try_out(decoder: Any, run: Callable[[Tensor, Tensor], object]) -> None:
    """Let ``run`` pass a few tokens through a decoder, in eval mode whatever its mode is.

    Args:
        decoder: Of transformers.
        run: Takes ids and positions, int64 (1, T) each, on the decoder's device.

    Raises:
        RotqError: a pass failed.
    """
    device = next(decoder.parameters()).device
    ids_1N = torch.arange(1, 1 + sum(LENGTHS), device=device)[None] % vocabulary_of(decoder)
    position_1N = torch.arange(sum(LENGTHS), device=device)[None]
    training = [module for module in decoder.modules() if module.training]
    try:
        _set_training(training, False)
        for ids_1T, position_1T in zip(
            ids_1N.split(LENGTHS, 1), position_1N.split(LENGTHS, 1), strict=True
        ):
            run(ids_1T, position_1T)
    except RotqError as error:
        raise RotqError(f"{decoder.config.model_type}: {error}") from None
    except Exception as error:
        raise RotqError(
            f"{decoder.config.model_type}: no cache of rotq's for this model, a pass with one "
            f"fails ({type(error).__name__}: {reason(error)})"
        ) from error
    finally:
        _set_training(training, True)


def _set_training(modules: list[nn.Module], training: bool) -> None:
    for module in modules:
        module.training = training
