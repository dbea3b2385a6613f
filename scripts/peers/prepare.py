"""Turn a GGUF file into a dense fp32 Hugging Face directory and draw the calibration windows."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--out", type=Path, required=True, help="dense model directory to write")
    parser.add_argument(
        "--calibration-ids", type=Path, required=True, help="token-id tensor to write"
    )
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    source = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del (
        model.config.quantization_config,
        model.hf_quantizer,
    )  # the weights are dense now: let them be saved
    model.save_pretrained(args.out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(args.out)

    text = args.text.read_text(encoding="utf-8-sig")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    generator = torch.Generator().manual_seed(args.seed)
    starts = torch.randint(0, len(ids) - args.length - 1, (args.windows,), generator=generator)
    windows = torch.stack([ids[s : s + args.length] for s in starts.tolist()])
    torch.save(windows, args.calibration_ids)
    print(f"{len(ids)} tokens, windows {tuple(windows.shape)}, first ids {windows[0, :8].tolist()}")


if __name__ == "__main__":
    main()
