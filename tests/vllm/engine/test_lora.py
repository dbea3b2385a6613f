"""Adapters on packed layers, one with a rotated input."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm_engines import ask, assert_equal_to_model, engine, prompts_of

from rotq.checkpoint.load import load_model
from rotq.layers.online_linear import OnlineLinear, rotate_input

PROMPTS = prompts_of(3, 70)
RANK = 8
LAYERS = ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")


def write_adapter(folder: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """An adapter as PEFT stores it; what it adds to each weight (N, K)."""
    generator = torch.Generator().manual_seed(5)
    stored, added = {}, {}
    for name, (rows, columns) in sizes.items():
        a_RK = torch.randn(RANK, columns, generator=generator) * 0.3
        b_NR = torch.randn(rows, RANK, generator=generator) * 0.1
        stored |= {
            f"base_model.model.{name}.lora_A.weight": a_RK,
            f"base_model.model.{name}.lora_B.weight": b_NR,
        }
        added[name] = 2.0 * b_NR @ a_RK
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({name.rpartition(".")[2] for name in sizes}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def test_an_adapter_and_none(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    path = checkpoint(4, format="rotq", rotated=True)
    model = load_model(path, packed=False)
    layers = {name: model.get_submodule(name) for name in LAYERS}
    added = write_adapter(
        tmp_path / "adapter", {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    )
    with engine(path, enable_lora=True, max_lora_rank=RANK) as llm:
        plain = ask(llm, PROMPTS)
        adapted = ask(llm, PROMPTS, lora_request=LoRARequest("a", 1, str(tmp_path / "adapter")))
    assert_equal_to_model(model, PROMPTS, plain)
    for name, layer in layers.items():
        turned = added[name]
        if isinstance(layer, OnlineLinear):
            turned = rotate_input(turned, layer.input_signs)
        layer.weight.data += turned
    assert_equal_to_model(model, PROMPTS, adapted)
    assert plain != adapted
