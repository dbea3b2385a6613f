"""AutoRound (SignRound) weight-only quantization on the CPU."""

import torch
from auto_round import AutoRound
from common import Run, export_dense, parser
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    p = parser(__doc__)
    p.add_argument("--iters", type=int, default=200)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    windows = torch.load(args.calibration_ids)
    mask = torch.ones(1, windows.shape[1], dtype=torch.long)

    run = Run(
        args,
        "auto-round",
        iters=args.iters,
        batch_size=args.batch_size,
        windows=len(windows),
        length=windows.shape[1],
    )
    tuner = AutoRound(
        AutoModelForCausalLM.from_pretrained(args.model, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(args.model),
        bits=args.bits,
        group_size=args.group_size,
        sym=args.symmetric,
        iters=args.iters,
        batch_size=args.batch_size,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        dataset=[
            {"input_ids": w[None], "attention_mask": mask} for w in windows
        ],  # a plain tensor list is not accepted
        device_map="cpu",
        enable_torch_compile=args.compile,
    )
    model, layers = tuner.quantize()
    run.settings["tuning_dtype"] = str(model.dtype)
    run.done()

    weights = {}
    for name, config in layers.items():
        if config["bits"] < 16:
            module = model.get_submodule(name)
            weights[name] = requantize(module, args.group_size)
    export_dense(args.model, weights, args.out)


def requantize(module, group_size):
    """fp32 weight from the layer's grid: tuning leaves it rounded to bf16."""
    weight = module.weight.detach().float()
    groups = weight.reshape(
        weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size
    )
    scale = module.scale.float().reshape(*groups.shape[:2], 1)
    zero = (
        module.zp.float().reshape(*groups.shape[:2], 1) if torch.is_tensor(module.zp) else module.zp
    )
    exact = ((groups / scale + zero).round() - zero) * scale
    torch.testing.assert_close(exact, groups, rtol=1e-2, atol=1e-4)
    return exact.reshape_as(weight)


if __name__ == "__main__":
    main()
