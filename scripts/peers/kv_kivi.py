"""KIVI (arXiv 2402.02750) on the same windows: keys per channel, values per token, groups of 32.

    python scripts/peers/kv_kivi.py MODEL --text FILE --bits 3 --windows 16

x ~ zero + scale q, scale and zero in fp16, of 32 tokens of a channel for keys and of 32 channels
of a token for values: 1 bit per element more than the codes. The residual window of full groups
that KIVI keeps is left out and the sinks are ours, so that all rows see the same tokens whole.
Prints one JSON line as ``rotq eval kv --json`` does.
"""

import argparse
import functools
import json
from pathlib import Path

import torch

from rotq.calibration.texts import read_text
from rotq.calibration.tokenized import tokenize
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.evaluation.kv import evaluate_kv
from rotq.evaluation.perplexity import Protocol
from rotq.evaluation.quantized_history import KVScheme
from rotq.models.rotary import kv_shapes

GROUP = 32


def round_groups(x, bits):
    """Asymmetric min-max rounding over the last axis, which is one group."""
    low = x.amin(-1, keepdim=True)
    scale = ((x.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    code = ((x - low) / scale.clamp(min=1e-8)).round().clamp(0, 2**bits - 1)
    return code * scale + low


def kivi(k_BHTD, v_BHTD, position_BT, *, bits):
    """Keys and values as KIVI gives them back; a last part group of keys is a group."""
    tokens = k_BHTD.shape[2]
    groups = [round_groups(g.mT, bits).mT for g in k_BHTD.split(GROUP, dim=2)]
    v_hat = round_groups(v_BHTD.unflatten(-1, (-1, GROUP)), bits).flatten(-2)
    k_hat = torch.cat(groups, dim=2)
    assert k_hat.shape[2] == tokens == position_BT.shape[1]
    return k_hat, v_hat


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--recent", type=int, default=0)
    args = parser.parse_args()
    model = load_model(args.model, dtype="float32")
    ids_N = tokenize(read_text(args.text, split="test"), load_tokenizer(args.model))
    shapes = kv_shapes(model.config)
    scheme = KVScheme(
        name=f"kivi-{args.bits}",
        coders=dict.fromkeys(range(len(shapes)), functools.partial(kivi, bits=args.bits)),
        sinks=args.sinks,
        recent=args.recent,
        stored_bits=args.bits + 32 / GROUP,
        elements=sum(2 * shape.num_heads * shape.head_dim for shape in shapes),
    )
    protocol = Protocol(windows=args.windows, seq_len=args.seq_len)
    print(json.dumps(evaluate_kv(model, ids_N, [scheme], protocol=protocol)[0].to_dict()))


if __name__ == "__main__":
    main()
