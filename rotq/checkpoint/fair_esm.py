"""ESM-2, ESM-1b and ESM-1v as fair-esm publishes them: a .pt file for the names of transformers.

    cfg    ESM-2: its ``model`` has layers, width and heads       (esm2_t33_650M_UR50D.pt)
    args   ESM-1b and ESM-1v, ``arch`` is roberta_large           (esm1b_t33_650M_UR50S.pt)
    model  the tensors, behind encoder. or encoder.sentence_encoder.

The contact head is in a file of its own, NAME-contact-regression.pt; without it its regression is
zero, which ``rotq eval contacts`` takes for none. Rotary frequencies are in every layer and are the
same; transformers has them once. ESM-1, the MSA transformer and inverse folding are other networks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rotq.checkpoint.published import Published
from rotq.errors import RotqError

VOCABULARY = (
    *("<cls>", "<pad>", "<eos>", "<unk>"),
    *"LAGVSERTIDPKQNFYMHWCXBUZO.-",
    *("<null_1>", "<mask>"),
)
"""fair-esm's alphabet "ESM-1b", as transformers writes it."""

_PREFIX = re.compile(r"^encoder\.(sentence_encoder\.)?")
_OUTER = {
    "embed_tokens.weight": "esm.embeddings.word_embeddings.weight",
    "embed_positions.weight": "esm.embeddings.position_embeddings.weight",
    "emb_layer_norm_before": "esm.embeddings.layer_norm",
    "emb_layer_norm_after": "esm.encoder.emb_layer_norm_after",
    "contact_head.regression": "esm.contact_head.regression",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
    "lm_head.bias": "lm_head.bias",
}
_BLOCK = {
    "self_attn_layer_norm": "attention.LayerNorm",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "final_layer_norm": "LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_REGRESSION = "esm.contact_head.regression"


def is_fair_esm(stored: Mapping[str, Any]) -> bool:
    """Whether a file's content is laid out so."""
    return "model" in stored and ("cfg" in stored or "args" in stored)


def read_fair_esm(stored: Mapping[str, Any], contacts: Mapping[str, Any] | None) -> Published:
    """Configuration and tensors as transformers has them.

    Args:
        stored: Content of the .pt file.
        contacts: Of the file with the contact head's regression, if there is one.

    Raises:
        RotqError: another network, or a tensor of no known name.
    """
    settings = stored["cfg"]["model"] if "cfg" in stored else stored["args"]
    arch = getattr(settings, "arch", "esm2")
    if "cfg" not in stored and arch != "roberta_large":
        raise RotqError(f"its architecture is {arch}; fair-esm's ESM-2, ESM-1b and ESM-1v are read")
    named = {_PREFIX.sub("", name): tensor for name, tensor in stored["model"].items()}
    if contacts is not None:
        named |= contacts["model"]
    tied = named.pop("lm_head.weight", None)
    tensors = {_renamed(name): tensor for name, tensor in named.items() if _is_kept(name)}
    embedding = tensors["esm.embeddings.word_embeddings.weight"]
    if tied is not None and not bool((tied == embedding).all()):
        raise RotqError("its head is not tied to its embedding")
    config = _config(settings, tensors)
    if f"{_REGRESSION}.weight" not in tensors:
        heads = config["num_hidden_layers"] * config["num_attention_heads"]
        tensors[f"{_REGRESSION}.weight"] = embedding.new_zeros(1, heads)
        tensors[f"{_REGRESSION}.bias"] = embedding.new_zeros(1)
    return Published(config=config, tensors=tensors, vocabulary=VOCABULARY)


def _is_kept(name: str) -> bool:
    """Versions count fairseq's formats; frequencies of the first layer are those of all."""
    again = name.endswith(".rot_emb.inv_freq") and not name.startswith("layers.0.")
    return not (again or name.endswith(("version", "_float_tensor")))


def _renamed(name: str) -> str:
    if name == "layers.0.self_attn.rot_emb.inv_freq":
        return "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq"
    block = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is not None and block[2] in _BLOCK:
        return f"esm.encoder.layer.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"
    for known, ours in _OUTER.items():
        if name == known or name in (f"{known}.weight", f"{known}.bias"):
            return ours + name.removeprefix(known)
    raise RotqError(f"its tensor {name} is of no known layer")


def _config(settings: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    def setting(name: str) -> Any:
        # ESM-1b's names were written with and without the prefix
        return getattr(settings, f"encoder_{name}", None) or getattr(settings, name)

    embedding = tensors["esm.embeddings.word_embeddings.weight"]
    positions = tensors.get("esm.embeddings.position_embeddings.weight")
    return {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "vocab_size": len(embedding),
        "hidden_size": embedding.shape[1],
        "num_hidden_layers": setting("layers"),
        "num_attention_heads": setting("attention_heads"),
        "intermediate_size": len(tensors["esm.encoder.layer.0.intermediate.dense.bias"]),
        "max_position_embeddings": 1026 if positions is None else len(positions),
        "position_embedding_type": "rotary" if positions is None else "absolute",
        "emb_layer_norm_before": "esm.embeddings.layer_norm.weight" in tensors,
        "token_dropout": bool(getattr(settings, "token_dropout", True)),
        "mask_token_id": VOCABULARY.index("<mask>"),
        "pad_token_id": VOCABULARY.index("<pad>"),
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": True,
    }
