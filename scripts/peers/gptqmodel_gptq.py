"""GPTQModel's GPTQ (default: group-aware reordering) on the CPU."""

import os
import tempfile

os.environ.setdefault(
    "GPTQMODEL_CPU_WORKERS", "2"
)  # a 2-core machine otherwise gets a pool of one and fails

import torch
from common import Run, export_dense, parser
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def main():
    p = parser(__doc__)
    p.add_argument(
        "--mse", type=float, default=0.0, help="exponent of the clipping search; 0: min-max"
    )
    p.add_argument("--dtype", help="of the computation; without, GPTQModel's choice: bf16 on a CPU")
    p.add_argument("--desc-act", action="store_true", help="columns by falling activation")
    args = p.parse_args()
    windows = torch.load(args.calibration_ids)

    run = Run(args, "gptqmodel", mse=args.mse, windows=len(windows), length=windows.shape[1])
    config = QuantizeConfig(
        bits=args.bits,
        group_size=args.group_size,
        sym=args.symmetric,
        mse=args.mse,
        desc_act=args.desc_act,
        # the default; GPTQModel refuses it without groups, and beside desc_act
        act_group_aware=args.group_size > 0 and not args.desc_act,
        device="cpu",
    )
    chosen = {"dtype": getattr(torch, args.dtype)} if args.dtype else {}
    model = GPTQModel.load(str(args.model), config, **chosen)
    calibration = [{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows]
    model.quantize(calibration, batch_size=1)
    with tempfile.TemporaryDirectory() as packed:
        model.save(packed)
        run.settings |= {
            "dtype": str(model.model.dtype),
            "damp_percent": config.damp_percent,
            "desc_act": config.desc_act,
            "act_group_aware": config.act_group_aware,
        }
        run.done()
        quantized = GPTQModel.load(packed, backend=BACKEND.GPTQ_TORCH, device="cpu").model
        weights = {
            name: module.dequantize_weight().T.float()
            for name, module in quantized.named_modules()
            if hasattr(module, "dequantize_weight")
        }
    export_dense(args.model, weights, args.out)


if __name__ == "__main__":
    main()
