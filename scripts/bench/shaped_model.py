"""Checkpoints of a Llama's shape with random weights, and jobs on them in other processes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rotq.checkpoint.safetensors import Part, write_parts

CHUNK = 1 << 26
"""Numbers that are drawn at a time."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama, as its configuration calls them."""

    hidden_size: int = 8192
    intermediate_size: int = 28672
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    num_hidden_layers: int = 2
    vocab_size: int = 128256

    @property
    def block_parameters(self) -> int:
        """Of one block's matrices."""
        head = self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * head * self.num_key_value_heads
        return attention + 3 * self.hidden_size * self.intermediate_size

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        D, M = self.hidden_size, self.intermediate_size
        kv = D // self.num_attention_heads * self.num_key_value_heads
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, D),
            "lm_head.weight": (self.vocab_size, D),
            "model.norm.weight": (D,),
        }
        for index in range(self.num_hidden_layers):
            block = f"model.layers.{index}"
            attention = {"q_proj": (D, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, D)}
            mlp = {"gate_proj": (M, D), "up_proj": (M, D), "down_proj": (D, M)}
            found |= {f"{block}.self_attn.{name}.weight": s for name, s in attention.items()}
            found |= {f"{block}.mlp.{name}.weight": shape for name, shape in mlp.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{block}.{norm}.weight"] = (D,)
        return found


def write_model(folder: Path, shape: Shape, seed: int = 0) -> None:
    """A bf16 checkpoint (deviation 0.02) with a tokenizer of bytes; one that is there stays."""
    config = {
        **asdict(shape),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
    told = folder / "config.json"
    if told.exists() and json.loads(told.read_text()) == config:
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    parts = [_part(name, size, generator) for name, size in shape.tensors().items()]
    write_parts(folder / "model.safetensors", parts, {"format": "pt"})
    bytes_tokenizer().save_pretrained(folder)
    told.write_text(json.dumps(config))


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {letter: 1 + n for n, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _part(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Part:
    numel = 1
    for size in shape:
        numel *= size

    def write(file: BinaryIO) -> None:
        for start in range(0, numel, CHUNK):
            drawn = torch.ones(min(CHUNK, numel - start))
            if len(shape) > 1:
                drawn.normal_(0, 0.02, generator=generator)
            file.write(drawn.bfloat16().view(torch.uint8).numpy().data)

    return Part(name=name, dtype="BF16", shape=shape, num_bytes=2 * numel, write=write)


def run_job(arguments: Sequence[str | Path]) -> dict[str, Any]:
    """``rotq ARGUMENTS`` in a process of its own: seconds, CPU seconds and peak bytes of the whole.

    The peak is the largest of the process and of each process that it has started.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on stderr.
    """
    command = [sys.executable, "-m", "rotq", *map(str, arguments)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
    assert process.stdout is not None
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak": _bytes(usage),
        "output": output,
    }


def _bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
