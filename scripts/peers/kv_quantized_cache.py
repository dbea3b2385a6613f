"""transformers' QuantizedCache on the same windows, in two protocols.

    ENV/bin/python scripts/peers/kv_quantized_cache.py MODEL --text FILE --bits 4 --windows 16
    ENV/bin/python scripts/peers/kv_quantized_cache.py MODEL --text FILE --chunk 128

Needs transformers 5.23 and hqq 0.2.8 (``DISABLE_CUDA=1 pip install hqq==0.2.8``), nothing of rotq.

Without ``--chunk``: as rotq eval kv, every earlier token but the sinks is read as the cache's own
code quantizes and dequantizes a window's keys and values, once; the query's own token is exact.
With it: the cache itself, window by window in chunks. A chunk sees itself exactly, which is kinder
than decoding one by one; ``--residual 1`` makes the cache quantize at every chunk, its whole
history each time, as it does in generation. Prints one JSON line.
"""

import argparse
import json
import math

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, QuantizedCache
from transformers.masking_utils import AttentionMaskInterface


def windows_of(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.text, encoding="utf-8-sig") as file:
        ids = tokenizer(file.read(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids).unfold(0, args.seq_len, args.seq_len)[: args.windows]


def new_cache(model, args):
    return QuantizedCache(
        backend=args.backend,
        config=model.config,
        nbits=args.bits,
        axis_key=args.axis,
        axis_value=args.axis,
        q_group_size=args.group_size,
        residual_length=args.residual,
    )


def chunked_logits(model, ids_T, args):
    cache = new_cache(model, args)
    chunks = ids_T.split(args.chunk)
    return torch.cat([model(chunk[None], past_key_values=cache).logits[0] for chunk in chunks])


def stepwise_logits(model, ids_T, args):
    """With a quantized history and an exact diagonal, in one pass."""
    cache = new_cache(model, args)
    causal_TT = torch.ones(len(ids_T), len(ids_T), dtype=torch.bool).tril()

    def attention(module, query, key, value, mask, scaling=None, **_):
        layer = cache.layers[module.layer_idx]
        layer.update(key, value)
        k_hat = layer._dequantize(layer._quantized_keys).reshape(key.shape)
        v_hat = layer._dequantize(layer._quantized_values).reshape(value.shape)
        k_hat[:, :, : args.sinks], v_hat[:, :, : args.sinks] = (
            key[:, :, : args.sinks],
            value[:, :, : args.sinks],
        )
        group = query.shape[1] // key.shape[1]
        key, value, k_hat, v_hat = (
            x.repeat_interleave(group, 1) for x in (key, value, k_hat, v_hat)
        )
        score = query @ k_hat.mT * scaling
        score.diagonal(dim1=-2, dim2=-1).copy_((query * key).sum(-1) * scaling)
        p = score.masked_fill(~causal_TT, -1e30).softmax(-1)
        own = p.diagonal(dim1=-2, dim2=-1)[..., None]
        return (p @ v_hat + own * (value - v_hat)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("peer", attention)
    AttentionMaskInterface.register("peer", lambda *_, **__: None)
    model.set_attn_implementation("peer")
    logits_TV = model(ids_T[None], use_cache=False).logits[0]
    model.set_attn_implementation("sdpa")
    return logits_TV


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--backend", default="hqq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--axis", type=int, default=1, help="0 is transformers' default")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--residual", type=int, default=1, help="128 is transformers' default")
    parser.add_argument("--chunk", type=int, default=0, help="0: the stepwise protocol")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    run = chunked_logits if args.chunk else stepwise_logits
    kl = nll = reference_nll = agreements = cosine = tokens = 0
    for ids_T in windows_of(args):
        with torch.inference_mode():
            p_TV = model(ids_T[None], use_cache=False).logits[0, :-1]
            q_TV = run(model, ids_T, args)[:-1]
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
