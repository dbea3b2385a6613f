"""HQQ (calibration-free half-quadratic zero points) on the CPU."""

import torch
from common import Run, export_dense, parser
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main():
    args = parser(__doc__).parse_args()
    if args.symmetric:
        raise SystemExit("HQQ has no symmetric grid")
    run = Run(args, "hqq", axis=1, quant_zero=False, quant_scale=False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = BaseQuantizeConfig(
        nbits=args.bits, group_size=None if args.group_size == -1 else args.group_size, axis=1
    )
    weights = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = HQQLinear(
                module, config, compute_dtype=torch.float32, device="cpu", del_orig=False
            )
            weights[name] = layer.dequantize().clone()
    run.done()
    export_dense(args.model, weights, args.out)


if __name__ == "__main__":
    main()
