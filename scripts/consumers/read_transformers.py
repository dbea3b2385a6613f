"""transformers with compressed-tensors, without rotq: texts and logits of a checkpoint."""

import sys
from importlib.metadata import version

import torch
from reading import answer
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    names = ("transformers", "compressed-tensors", "torch")
    answer(model, ", ".join(f"{name} {version(name)}" for name in names))
