"""ProGen2's own folder for the names of transformers' GPT-J, which is the same network.

ProGen2 was trained on TPUs of several cores and stores q, v and k of each core below each other,
core by core (Nijkamp et al., arXiv 2206.13517; its code says 8). GPT-J has them apart:

    qkv (cores, [q, v, k], heads of a core x head size, D)  ->  q, k, v, each (heads x head size, D)

What else there is has the same names: two branches behind one norm, rotary positions that turn
neighbours, a head with a bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rotq.checkpoint.published import Published
from rotq.errors import RotqError

CORES = 8
_KEPT = re.compile(
    r"transformer\.(wte\.weight|ln_f\.(weight|bias)|h\.\d+\.(ln_1|mlp\.fc_in|mlp\.fc_out)\."
    r"(weight|bias)|h\.\d+\.attn\.out_proj\.weight)|lm_head\.(weight|bias)"
)
_QKV = re.compile(r"(transformer\.h\.\d+\.attn\.)qkv_proj\.weight")
_BUFFER = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|causal_mask)")
_SETTINGS = (
    *("n_embd", "n_layer", "n_head", "n_positions", "n_inner", "rotary_dim"),
    *("activation_function", "layer_norm_epsilon", "bos_token_id", "eos_token_id"),
)


def read_progen(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], cores: int = CORES
) -> Published:
    """Configuration and tensors as transformers has them.

    Args:
        config: Of config.json.
        stored: All tensors.
        cores: That q, k and v are spread over.

    Raises:
        RotqError: a tensor of no known name, or sizes that the cores do not divide.
    """
    if config["n_head"] % cores:
        raise RotqError(f"{config['n_head']} heads are not spread over {cores} cores")
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        found = _QKV.fullmatch(name)
        if found is not None:
            tensors |= {
                f"{found[1]}{side}_proj.weight": part
                for side, part in split_cores(tensor, cores).items()
            }
        elif _KEPT.fullmatch(name):
            tensors[name] = tensor
        elif not _BUFFER.fullmatch(name):
            raise RotqError(f"its tensor {name} is of no known layer")
    embedded, predicted = (
        len(tensors[name]) for name in ("transformer.wte.weight", "lm_head.weight")
    )
    if embedded != predicted:
        raise RotqError(f"it embeds {embedded} tokens and predicts {predicted}")
    settings = {name: config[name] for name in _SETTINGS if name in config}
    return Published(
        config={
            "architectures": ["GPTJForCausalLM"],
            "model_type": "gptj",
            "vocab_size": embedded,
            "tie_word_embeddings": False,
            **settings,
        },
        tensors=tensors,
    )


def split_cores(qkv_ND: Tensor, cores: int) -> dict[str, Tensor]:
    """q, k and v, each (N / 3, D), heads in the order of the cores."""
    parts = qkv_ND.unflatten(0, (cores, 3, -1)).unbind(1)
    return {side: torch.flatten(part, 0, 1) for side, part in zip("qvk", parts, strict=True)}
