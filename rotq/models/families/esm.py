"""ESM-2 and ESM-1b, masked language models of proteins.

Norms before each branch, biases everywhere, rotary positions, and a head that is dense, GELU,
LayerNorm and a decoder tied to the embedding. Zeroed <mask> embeddings and the scale of token
dropout are linear in each token, and the contact head reads attention maps only, so rotations
leave them as they are. ESM-1b normalizes its embeddings with a gain before the first block, which
R1 cannot pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.esm import modeling_esm

from rotq.errors import RotqError
from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="ESM-2",
    architectures=("EsmForMaskedLM",),
    embedding="esm.embeddings.word_embeddings",
    blocks="esm.encoder.layer",
    final_norm="esm.encoder.emb_layer_norm_after",
    head="lm_head.decoder",
    head_reader="lm_head.dense",
    layer_norm=True,
    attention_norm="attention.LayerNorm",
    mlp_norm="LayerNorm",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    mlp="",
    mlp_inputs=("intermediate.dense",),
    mlp_output="output.dense",
    residual_needs=(("emb_layer_norm_before", False), ("position_embedding_type", "rotary")),
    # frequencies are stored once per layer and read once; transformers 5.23 writes the asterisk
    renames=(
        (
            r"^esm\.encoder\.layer\.(\*|0)\.attention\.self\.rotary_embeddings\.inv_freq$",
            "esm.rotary_embeddings.inv_freq",
        ),
    ),
)


def first_position(config: Any) -> int:
    """Position of a sequence's first token: tables of positions begin behind the padding's."""
    return 0 if config.position_embedding_type == "rotary" else int(config.pad_token_id) + 1


def contact_regression(model: Any) -> nn.Linear | None:
    """The contact head's regression on the maps of all heads; None in a model without one.

    One that is all zeros was not in the checkpoint's source (``checkpoint.fair_esm``).
    """
    found = getattr(getattr(model.base_model, "contact_head", None), "regression", None)
    return found if found is not None and bool(found.weight.any()) else None


@contextmanager
def packed_embeddings(model: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Embed sequences that stand behind each other in one row each by itself.

    Token dropout scales what it embeds by the share of <mask> among it.

    Args:
        model: An ESM of transformers, called with ``position_ids`` and without a mask.
        lengths: Tokens of each sequence.
    """

    def each(module: nn.Module, _: Any, given: dict[str, Any], __: Tensor) -> Tensor:
        parts = (given[name].split(list(lengths), 1) for name in ("input_ids", "position_ids"))
        # forward: a call would come back here
        found = [
            module.forward(input_ids=ids_1T, position_ids=position_1T)
            for ids_1T, position_1T in zip(*parts, strict=True)
        ]
        return torch.cat(found, dim=1)

    hook = model.base_model.embeddings.register_forward_hook(each, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def check_decodes(name: str, config: Any) -> None:
    """Refuse what ``as_decoder`` cannot run.

    Raises:
        RotqError: the model is no ESM-2 with rotary positions.
    """
    if config.model_type != "esm" or config.position_embedding_type != "rotary":
        raise RotqError(f"{name} is no ESM-2 with rotary positions")


@contextmanager
def as_decoder(model: Any) -> Iterator[None]:
    """Let an ESM-2 attend to the left only, and let its attention know its layer.

    What a cache needs: keys and values of a token must not change when others follow. It was
    trained on both sides, so this is a way to run the network, not a language model.

    Raises:
        RotqError: the model is no ESM-2 with rotary positions.
    """
    check_decodes(type(model).__name__, model.config)
    attentions = [m for m in model.modules() if isinstance(m, modeling_esm.EsmSelfAttention)]
    for index, attention in enumerate(attentions):
        attention.layer_idx, attention.is_causal = index, True
    try:
        yield
    finally:
        for attention in attentions:
            attention.layer_idx, attention.is_causal = None, False
