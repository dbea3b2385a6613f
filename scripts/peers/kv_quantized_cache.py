"""transformers' QuantizedCache on the same windows, run in chunks so that history is quantized.

    ENV/bin/python scripts/peers/kv_quantized_cache.py MODEL --text FILE --bits 4 --windows 16

Needs transformers 5.23 and hqq 0.2.8 (``DISABLE_CUDA=1 pip install hqq==0.2.8``), nothing of rotq.
Each chunk of a window sees earlier chunks as the cache gives them back and itself exactly, which
is kinder to the cache than decoding one by one. ``residual_length=1`` makes it quantize at every
chunk; it quantizes its whole history each time, as it does in generation. Prints one JSON line.
"""

import argparse
import json
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantizedCache


def windows_of(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.text, encoding="utf-8") as file:
        ids = tokenizer(file.read(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids).unfold(0, args.seq_len, args.seq_len)[: args.windows]


def cached_logits(model, ids_T, args):
    cache = QuantizedCache(
        backend=args.backend,
        config=model.config,
        nbits=args.bits,
        axis_key=args.axis,
        axis_value=args.axis,
        q_group_size=args.group_size,
        residual_length=args.residual,
    )
    chunks = ids_T.split(args.chunk)
    return torch.cat([model(chunk[None], past_key_values=cache).logits[0] for chunk in chunks])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--backend", default="hqq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--axis", type=int, default=1, help="0 is transformers' default")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--residual", type=int, default=1, help="128 is transformers' default")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    kl = nll = reference_nll = agreements = cosine = tokens = 0
    for ids_T in windows_of(args):
        with torch.inference_mode():
            p_TV = model(ids_T[None], use_cache=False).logits[0, :-1]
            q_TV = cached_logits(model, ids_T, args)[:-1]
            cosine += torch.cosine_similarity(
                p_TV - p_TV.mean(-1, keepdim=True), q_TV - q_TV.mean(-1, keepdim=True), dim=-1
            ).sum()
            p_TV, q_TV = p_TV.log_softmax(-1), q_TV.log_softmax(-1)
            kl += (p_TV.exp() * (p_TV - q_TV)).sum(-1).double().sum()
            agreements += (p_TV.argmax(-1) == q_TV.argmax(-1)).sum()
            target_T1 = ids_T[1:, None]
            nll -= q_TV.gather(1, target_T1).double().sum()
            reference_nll -= p_TV.gather(1, target_T1).double().sum()
            tokens += len(target_T1)
    row = {
        "preset": f"{args.backend}-{args.bits}",
        "ppl": math.exp(nll / tokens),
        "ppl_ratio": math.exp((nll - reference_nll) / tokens),
        "kl": float(kl / tokens),
        "top1": float(agreements / tokens),
        "cosine": float(cosine / tokens),
        # scale and zero of a group in the model's dtype
        "bits_per_element": args.bits + 2 * 8 * model.dtype.itemsize / args.group_size,
        "tokens": tokens,
    }
    print(json.dumps(row | {key: getattr(args, key) for key in ("axis", "residual", "chunk")}))


if __name__ == "__main__":
    main()
