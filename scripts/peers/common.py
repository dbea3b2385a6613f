"""Arguments, timing and dense export shared by the peer-tool baselines."""

import argparse
import json
import os
import resource
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def parser(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face directory")
    parser.add_argument(
        "--calibration-ids", type=Path, required=True, help="int64 tensor [windows, length]"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="dequantized dense model directory to write"
    )
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument(
        "--group-size", type=int, default=64, help="-1: one scale per output channel"
    )
    parser.add_argument("--symmetric", action="store_true")
    return parser


class Run:
    """Wall time and peak memory of a quantization, written to OUT/run.json with its settings."""

    def __init__(self, args, package, **settings):
        self.out, self.package = args.out, package
        self.settings = {
            "bits": args.bits,
            "group_size": args.group_size,
            "symmetric": args.symmetric,
            **settings,
        }
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def done(self):
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record = {
            "tool": self.package,
            "version": version(self.package),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "settings": self.settings,
            "seconds": round(time.perf_counter() - self.start, 1),
            "cpu_seconds": round(time.process_time() - self.cpu_start, 1),
            "cores": len(os.sched_getaffinity(0)),
            "peak_rss_gb": round(kib * 1024 / 1e9, 2),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "run.json").write_text(json.dumps(record, indent=1))


@torch.no_grad()
def export_dense(model_dir, weights, out):
    """Save the model of `model_dir` in fp32 with the named Linear weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    linears = {
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }
    if linears != weights.keys():
        raise ValueError(
            f"quantized layers differ from the model's: {sorted(linears ^ weights.keys())}"
        )
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(out)
