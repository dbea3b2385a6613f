"""llm-compressor's GPTQ (static activation ordering) on the CPU."""

import torch
from common import Run, export_dense, parser
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    p = parser(__doc__)
    p.add_argument(
        "--observer", default="memoryless_minmax", help="memoryless_mse searches for a clipping"
    )
    p.add_argument(
        "--dtype", default="float32", help="bfloat16: a third of the time on a CPU with AVX512-BF16"
    )
    args = p.parse_args()
    windows = torch.load(args.calibration_ids)

    run = Run(
        args,
        "llmcompressor",
        actorder="static",
        observer=args.observer,
        windows=len(windows),
        length=windows.shape[1],
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    grid = QuantizationArgs(
        num_bits=args.bits,
        symmetric=args.symmetric,
        strategy="channel" if args.group_size == -1 else "group",
        group_size=None if args.group_size == -1 else args.group_size,
        observer=args.observer,
    )
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=grid)},
        ignore=["lm_head"],
        actorder="static",
    )
    ids = windows.tolist()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": ids, "attention_mask": [[1] * len(w) for w in ids]}
        ),
        processor=AutoTokenizer.from_pretrained(args.model),
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    run.settings |= {
        "dtype": str(model.dtype),
        "dampening_frac": recipe.dampening_frac,
        "block_size": recipe.block_size,
    }
    run.done()

    weights = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            # the weights lie on the grid up to rounding to the dtype: put them there exactly
            module.float()
            weights[name] = forward_quantize(
                module, module.weight.detach(), "weight", scheme.weights
            )
    export_dense(args.model, weights, args.out)


if __name__ == "__main__":
    main()
