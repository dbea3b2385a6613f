"""ESM-C as EvolutionaryScale publishes it: a .pth file for the names of transformers.

    embed, transformer.norm
    transformer.blocks.N.attn      layernorm_qkv (norm, then q, k, v below each other), q_ln, k_ln
    transformer.blocks.N.ffn       0 norm, 1 gate and up below each other, 3 down
    sequence_head                  0 dense, 2 norm, 3 decoder

Heads are 64 wide in every model of the family, which the file does not say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from rotq.checkpoint.published import Published
from rotq.errors import RotqError

HEAD_DIM = 64
VOCABULARY = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-|",
    "<mask>",
)

_OUTER = {
    "embed.weight": "esmc.embed_tokens.weight",
    "transformer.norm.weight": "esmc.norm.weight",
    **{
        f"sequence_head.{number}.{kind}": f"lm_head.{name}.{kind}"
        for number, name in ((0, "dense"), (2, "layer_norm"), (3, "decoder"))
        for kind in ("weight", "bias")
    },
}
_BLOCK = {
    "attn.layernorm_qkv.0.weight": ("input_layernorm.weight",),
    "attn.layernorm_qkv.0.bias": ("input_layernorm.bias",),
    "attn.layernorm_qkv.1.weight": tuple(f"self_attn.{side}_proj.weight" for side in "qkv"),
    "attn.out_proj.weight": ("self_attn.o_proj.weight",),
    "attn.q_ln.weight": ("self_attn.q_norm.weight",),
    "attn.k_ln.weight": ("self_attn.k_norm.weight",),
    "ffn.0.weight": ("post_attention_layernorm.weight",),
    "ffn.0.bias": ("post_attention_layernorm.bias",),
    "ffn.1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.3.weight": ("mlp.down_proj.weight",),
}
"""What a tensor of a block is cut into, along its rows."""


def is_esmc(stored: Mapping[str, object]) -> bool:
    """Whether a file's content is laid out so."""
    return {"embed.weight", "transformer.norm.weight", "sequence_head.3.weight"} <= stored.keys()


def read_esmc(stored: Mapping[str, Tensor]) -> Published:
    """Configuration and tensors as transformers has them.

    Raises:
        RotqError: a tensor of no known name, or a width that heads of 64 do not divide.
    """
    tensors = {name: part for whole, item in stored.items() for name, part in _parts(whole, item)}
    vocabulary, width = tensors["esmc.embed_tokens.weight"].shape
    if width % HEAD_DIM:
        raise RotqError(f"its width is {width}, and heads of ESM-C are {HEAD_DIM} wide")
    blocks = {name.split(".")[2] for name in tensors if name.startswith("esmc.layers.")}
    config = {
        "architectures": ["EsmcForMaskedLM"],
        "model_type": "esmc",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": width // HEAD_DIM,
        "intermediate_size": tensors["esmc.layers.0.mlp.down_proj.weight"].shape[1],
    }
    return Published(config=config, tensors=tensors, vocabulary=VOCABULARY)


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    block = re.fullmatch(r"transformer\.blocks\.(\d+)\.(.+)", name)
    if name in _OUTER:
        yield _OUTER[name], tensor
    elif block is not None and block[2] in _BLOCK:
        ours = _BLOCK[block[2]]
        for part, piece in zip(ours, tensor.chunk(len(ours)), strict=True):
            yield f"esmc.layers.{block[1]}.{part}", piece
    else:
        raise RotqError(f"its tensor {name} is of no known layer")
