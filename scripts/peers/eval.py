"""Perplexity of a dense model, with KL divergence and top-1 agreement to a reference."""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


def log_probs(path, windows):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for window in windows:
        yield model(window[None]).logits[0, :-1].float().log_softmax(-1)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True, help="unquantized model directory")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--cache", type=Path, help="keep the reference's log-probabilities in this file"
    )
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.reference)
    text = args.text.read_text(encoding="utf-8-sig")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    windows = ids[: args.windows * args.length].view(args.windows, args.length)

    if args.cache and args.cache.exists():
        reference = torch.load(args.cache, mmap=True)
    else:
        reference = log_probs(args.reference, windows)
        if args.cache:
            reference = torch.stack(list(reference))
            torch.save(reference, args.cache)

    nll, kl, top1 = [], [], []
    for window, logp, ref in zip(windows, log_probs(args.model, windows), reference, strict=True):
        nll.append(F.nll_loss(logp, window[1:]).item())
        kl.append(F.kl_div(logp, ref, log_target=True, reduction="batchmean").item())
        top1.append((logp.argmax(-1) == ref.argmax(-1)).float().mean().item())
    ppl, kl, top1 = (torch.tensor(x, dtype=torch.float64).mean() for x in (nll, kl, top1))
    print(json.dumps({"ppl": ppl.exp().item(), "kl": kl.item(), "top1": top1.item()}))


if __name__ == "__main__":
    main()
