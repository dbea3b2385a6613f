"""Round to nearest on a min-max grid: the floor every method must beat."""

import torch
from common import Run, export_dense, parser
from transformers import AutoModelForCausalLM


def round_to_nearest(weight, bits, group_size, symmetric):
    groups = weight.reshape(
        weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size
    )
    if symmetric:
        low, high, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0
        scale = groups.abs().amax(-1, keepdim=True) * 2 / (high - low)
    else:
        low, high = 0, 2**bits - 1
        least, most = (
            groups.amin(-1, keepdim=True).clamp(max=0),
            groups.amax(-1, keepdim=True).clamp(min=0),
        )
        scale = (most - least) / high
        zero = (-least / scale).round()
    return (((groups / scale).round() + zero).clamp(low, high) - zero).mul(scale).reshape_as(weight)


@torch.no_grad()
def main():
    args = parser(__doc__).parse_args()
    run = Run(args, "torch", method="rtn min-max")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    weights = {
        name: round_to_nearest(module.weight, args.bits, args.group_size, args.symmetric)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    run.done()
    export_dense(args.model, weights, args.out)


if __name__ == "__main__":
    main()
