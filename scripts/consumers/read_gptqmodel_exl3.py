"""GPTQModel's PyTorch kernel, without rotq: texts, logits and weights of an EXL3 file."""

import os
import sys
from importlib.metadata import version

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # a pool of one fails on 2 cores

import torch
from gptqmodel import BACKEND, GPTQModel
from reading import answer
from torch.nn import functional as F


def pad(layer):
    """Let a layer whose sides are no multiples of 128 take and give what the model has.

    exllamav3 pads at run time; the kernel here takes and gives padded features only.
    """
    wanted, kept = len(layer.suh), layer.out_features
    layer.in_features, layer.out_features = wanted, len(layer.svh)
    layer.register_forward_pre_hook(lambda _, args: F.pad(args[0], (0, wanted - args[0].shape[-1])))
    layer.register_forward_hook(lambda _, args, y: y[..., :kept])


if __name__ == "__main__":
    # on CPUs the kernel computes in fp32, whatever the model's dtype
    loaded = GPTQModel.load(
        sys.argv[1], backend=BACKEND.EXL3_TORCH, device="cpu", dtype=torch.float32
    )
    layers = {name: m for name, m in loaded.model.named_modules() if hasattr(m, "trellis")}
    dense = {
        name: layer.get_weight_tensor()[: layer.in_features, : layer.out_features].T.contiguous()
        for name, layer in layers.items()
    }
    for layer in layers.values():
        pad(layer)
    kinds = {type(layer).__name__ for layer in layers.values()}
    names = ("gptqmodel", "transformers", "torch")
    told = ", ".join(f"{name} {version(name)}" for name in names)
    answer(loaded.model, f"{'+'.join(sorted(kinds))}, {told}", dense=dense)
