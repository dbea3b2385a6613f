"""GPTQModel's PyTorch kernel, without rotq: texts and logits of a GPTQ file."""

import os
import sys
from importlib.metadata import version

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # a pool of one fails on 2 cores

import torch
from gptqmodel import BACKEND, GPTQModel
from reading import answer

if __name__ == "__main__":
    # the kernel has no fp32; scales are fp16
    loaded = GPTQModel.load(
        sys.argv[1], backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    )
    kinds = {type(m).__name__ for m in loaded.model.modules() if hasattr(m, "qweight")}
    names = ("gptqmodel", "transformers", "torch")
    told = ", ".join(f"{name} {version(name)}" for name in names)
    weights = {
        name: module.dequantize_weight().T
        for name, module in loaded.model.named_modules()
        if hasattr(module, "qweight")
    }
    answer(loaded.model, f"{'+'.join(sorted(kinds))}, {told}", weights)
