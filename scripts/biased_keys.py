"""Give a Llama large biases of its keys, as Qwen2 has: what they cost a cache without calibration.

    python scripts/biased_keys.py out/tiny out/biased [--size 100] [--pairs 2]

The result is a Qwen2 of the same weights. Each head's bias of its keys is N(0, size^2) on the
rotary pairs that turn slowest and 0 elsewhere: there a bias moves all scores of a query nearly
alike, so that the model stays one that predicts. It is another model nonetheless: a cache is to be
compared with this one's own.

Shape suffixes: H KV heads, R rotary pairs.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rotq.disk.filling import folder_to_fill
from rotq.errors import RotqError

KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
)
"""Of the configuration; with these both families compute the same."""


def with_biases(
    llama: LlamaForCausalLM, *, size: float, pairs: int, seed: int = 0
) -> Qwen2ForCausalLM:
    """A Qwen2 of a Llama's weights, in fp32, with biases of its keys.

    Args:
        llama: Without biases, its heads as wide as ``hidden_size / num_attention_heads``.
        size: Standard deviation of the biases.
        pairs: Rotary pairs of each head that have one, the slowest.
        seed: Of their draw.

    Raises:
        RotqError: a Llama that is no Qwen2, or more pairs than a head has.
    """
    config = llama.config
    width = config.hidden_size // config.num_attention_heads
    if config.head_dim != width or config.attention_bias or config.mlp_bias:
        raise RotqError("heads of another width than a Qwen2's, or biases of its own")
    if pairs > width // 2:
        raise RotqError(f"--pairs {pairs}: a head has {width // 2}")
    qwen = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(config, name) for name in KEPT})).eval()
    missing = qwen.load_state_dict(llama.state_dict(), strict=False).missing_keys
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in missing:
            qwen.get_parameter(name).zero_()
        for block in qwen.model.layers:
            bias_H2R = block.self_attn.k_proj.bias.view(-1, 2, width // 2)
            drawn = torch.randn(len(bias_H2R), 2, pairs, generator=generator)
            bias_H2R[..., width // 2 - pairs :] = size * drawn
    return qwen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=float, default=100.0)
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    try:
        folder = folder_to_fill(arguments.folder, "biased_keys.py")
        llama = LlamaForCausalLM.from_pretrained(arguments.llama, dtype=torch.float32)
        model = with_biases(llama, size=arguments.size, pairs=arguments.pairs)
    except RotqError as error:
        sys.exit(f"biased_keys.py: {error}")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(arguments.llama).save_pretrained(folder)
    print(f"{folder}: biases of size {arguments.size:g} on {arguments.pairs} rotary pairs")


if __name__ == "__main__":
    main()
