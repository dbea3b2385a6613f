"""A quantized checkpoint as one GGUF file: codes as they are, in the types that hold them.

Names and metadata are those of llama.cpp's architectures. For ``llama`` the rows of q and k are
put in the order of its rotary embedding, which turns neighbours where transformers turns halves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotq.checkpoint.gguf_tokenizer import add_tokenizer, read_tokenizer
from rotq.errors import RotqError
from rotq.formats.gguf_blocks import blocks, obstacle, type_for
from rotq.formats.integer import Quantized
from rotq.layers.packed_weight import PackedWeight

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name by transformers' model type."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What is in the file."""

    types: dict[str, int]
    """Number of tensors by type."""
    largest_change: float
    """Of a packed weight, relative to its norm: what its type rounds of scales and offsets."""


def check_model(config: Any) -> None:
    """Refuse what llama.cpp's architectures of these names do not have.

    Raises:
        RotqError: another family, or a rotary embedding that is not written.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise RotqError(f"{kind} is not exported to GGUF; known: {', '.join(ARCHITECTURES)}")
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        raise RotqError(f"rotary embeddings of type {rope['rope_type']} are not exported to GGUF")


def write_gguf(model: Any, folder: Path, file: Path, kind: str) -> Written:
    """Write a packed model and its tokenizer.

    Args:
        model: From ``load_model``, packed; nothing is done to its inputs at run time.
        folder: With tokenizer and chat template.
        file: To be made.
        kind: One of ``TYPES`` for all packed layers, or "auto": for each the first that holds it.

    Raises:
        RotqError: a layer that ``kind`` does not hold; names the type that does. Or the family,
            the tokenizer, or the package gguf.
    """
    try:
        import gguf
    except ImportError:
        raise RotqError("GGUF files need the package gguf: pip install rotq[gguf]") from None

    config = model.config
    check_model(config)
    tokenizer = read_tokenizer(folder, config.vocab_size)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    types = {name: _type(name, layer, kind) for name, layer in packed.items()}
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    _add_metadata(writer, config, folder.name, types)
    add_tokenizer(writer, tokenizer, folder)
    names = gguf.get_tensor_name_map(_architecture(gguf, architecture), config.num_hidden_layers)
    counts: dict[str, int] = {}
    largest = 0.0
    for name, module, key, tensor in _tensors(model):
        theirs = names.get_name(f"{name}.{key}", try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise RotqError(f"{name}.{key} has no name in llama.cpp's {architecture}")
        order = _row_order(config, architecture, name)
        if isinstance(module, PackedWeight) and key == "weight":
            change = _add_packed(writer, theirs, module, types[name], order)
            largest, shown = max(largest, change), types[name]
        else:
            assert tensor is not None
            shown = _add_dense(writer, theirs, tensor if order is None else tensor[order])
        counts[shown] = counts.get(shown, 0) + 1
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(types=counts, largest_change=largest)


def _type(name: str, layer: PackedWeight, kind: str) -> str:
    columns = layer.shape[1]
    nearest = type_for(layer.grid, columns)
    if kind == "auto":
        return nearest
    reason = obstacle(kind, layer.grid, columns)
    if reason is not None:
        raise RotqError(f"{kind} does not hold {name}: {reason}; {nearest} does")
    return kind


def _tensors(model: Any) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
    """Every weight and bias once: module's name, module, key, and what is stored dense."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            yield name, module, "weight", None
        for key, tensor in module.named_parameters(recurse=False):
            if id(tensor) not in seen and key in ("weight", "bias"):
                seen.add(id(tensor))
                yield name, module, key, tensor


def _add_packed(
    writer: Any, name: str, layer: PackedWeight, kind: str, order: Tensor | None
) -> float:
    """Returns how far what was written is from the weight, relative to its norm."""
    from gguf import GGMLQuantizationType, dequantize

    if kind == "bf16":
        weight_NK = layer.dequantize(torch.float32)
        _add_dense(writer, name, (weight_NK if order is None else weight_NK[order]).bfloat16())
        return _distance(weight_NK.bfloat16().float(), weight_NK)
    quantized = layer.quantized()
    if order is not None:
        quantized = _reordered(quantized, order)
    rows, type_ = blocks(quantized, kind), GGMLQuantizationType[kind.upper()]
    writer.add_tensor(name, rows, raw_dtype=type_)
    return _distance(torch.from_numpy(dequantize(rows, type_)), quantized.dequantize())


def _distance(found_NK: Tensor, wanted_NK: Tensor) -> float:
    return float((found_NK - wanted_NK).norm() / wanted_NK.norm().clamp(min=1e-30))


def _reordered(quantized: Quantized, order: Tensor) -> Quantized:
    zero_NG = quantized.zero_NG
    return Quantized(
        q_NK=quantized.q_NK[order],
        scale_NG=quantized.scale_NG[order],
        zero_NG=None if zero_NG is None else zero_NG[order],
        grid=quantized.grid,
        global_scale=quantized.global_scale,
    )


def _add_dense(writer: Any, name: str, tensor: Tensor) -> str:
    """Vectors in fp32, which llama.cpp adds and multiplies them in; matrices as they are."""
    from gguf import GGMLQuantizationType

    tensor = tensor.detach().cpu().contiguous()
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
        return "f32"
    if tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.numpy())
        return "f16"
    raw = tensor.bfloat16().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)
    return "bf16"


def _row_order(config: Any, architecture: str, name: str) -> Tensor | None:
    """Rows of q and k by pairs that are turned together; None where they stay."""
    last = name.rpartition(".")[2]
    if architecture != "llama" or last not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
    rows = torch.arange(heads * _head_dim(config))
    return rows.view(heads, 2, -1).transpose(1, 2).flatten()


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _architecture(gguf: Any, name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _add_metadata(writer: Any, config: Any, name: str, types: dict[str, str]) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    commonest = max(set(types.values()), key=list(types.values()).count, default="bf16")
    file_types = {
        "q4_0": LlamaFileType.MOSTLY_Q4_0,
        "q4_1": LlamaFileType.MOSTLY_Q4_1,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
        "mxfp4": LlamaFileType.MOSTLY_MXFP4_MOE,
        "bf16": LlamaFileType.MOSTLY_BF16,
    }
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_name(name)
    writer.add_quantized_by("rotq")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(file_types[commonest])
    writer.add_block_count(config.num_hidden_layers)
    # llama.cpp's architectures of these names attend to everything before a token
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _rope_factors(config: Any) -> Tensor | None:
    """What Llama 3 divides its rotary frequencies by, fp32 (head size / 2); None without.

    The longest waves by ``factor``, the shortest by 1, those between by a mean of both.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    size = _head_dim(config)
    wave = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    turns = rope["original_max_position_embeddings"] / wave
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / rope["factor"] + share)
