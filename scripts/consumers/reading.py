"""What readers with a model of transformers' answer: FILE ASKED FOUND on the command line."""

import json
import sys
from pathlib import Path

import torch


@torch.no_grad()
def answer(model, versions):
    """Texts behind the prompts, and logits of the last prompt, as check.py reads them."""
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
    found.write_text(json.dumps(told))
