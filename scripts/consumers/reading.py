"""What readers with a model of transformers' answer: FILE ASKED FOUND on the command line."""

import hashlib
import json
import sys
from pathlib import Path

import torch


def digest(weights):
    """sha256 of tensors by name, in their dtype."""
    told = hashlib.sha256()
    for name in sorted(weights):
        told.update(name.encode())
        told.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


@torch.no_grad()
def answer(model, versions, weights=None, dense=None):
    """Texts behind the prompts, and logits of the last prompt, as check.py reads them.

    Args:
        weights: Dense, (N, K) by name, where the reader can be asked for them, and has ours.
        dense: The same where the reader rounds otherwise: they are compared as numbers.
    """
    asked, found = json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    model.eval()
    logits = found.with_suffix(".pt")
    torch.save(model(torch.tensor([asked["prompts"][-1]])).logits, logits)
    greedy = []
    for prompt in asked["prompts"]:
        ids = torch.tensor([prompt])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked["tokens"],
            do_sample=False,
        )
        greedy.append(made[0, len(prompt) :].tolist())
    dtype = str(model.dtype).removeprefix("torch.")
    told = {"greedy": greedy, "logits": str(logits), "dtype": dtype, "versions": versions}
    if weights is not None:
        told["weights"] = digest(weights)
    if dense is not None:
        told["dense"] = str(found.with_suffix(".dense.pt"))
        torch.save(dense, told["dense"])
    found.write_text(json.dumps(told))
