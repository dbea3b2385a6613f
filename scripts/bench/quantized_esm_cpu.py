"""Memory and time of a quantized ESM-2 on a CPU against fp32, by the shapes of real models.

    python scripts/bench/quantized_esm_cpu.py --shape 650M --blocks 3

Weights are random, shapes those of the model asked for; --blocks of its blocks are built and timed,
and what one takes is counted for all. Rows take turns; seconds are medians of --repeats rounds
without the first. Bytes are those of all weights as they are held, embedding and head included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from packed_rows_cpu import SHAPES, esm
from torch import Tensor, nn

from rotq.formats.activations import ActivationGrid
from rotq.formats.integer import Grid, Quantized
from rotq.layers.quant_linear import QuantLinear, multiply_integers

ROWS: dict[str, tuple[Grid, ActivationGrid | None]] = {
    "W8A8": (
        Grid(bits=8, symmetric=True, group_size=-1),
        ActivationGrid(bits=8, symmetric=False),
    ),
    "W4A8": (
        Grid(bits=4, symmetric=True, group_size=128),
        ActivationGrid(bits=8, symmetric=False),
    ),
    "W4": (Grid(bits=4, symmetric=True, group_size=128), None),
}


def rounded(weight_NK: Tensor, grid: Grid) -> Quantized:
    """To the nearest code."""
    w_NGg = weight_NK.unflatten(1, (-1, grid.columns_per_group(weight_NK.shape[1])))
    scale_NG = w_NGg.abs().amax(-1) / grid.q_max
    q_NGg = (w_NGg / scale_NG[..., None]).round().clamp(grid.q_min, grid.q_max)
    codes_NK = q_NGg.flatten(1).to(torch.int8)
    return Quantized(q_NK=codes_NK, scale_NG=scale_NG.half(), zero_NG=None, grid=grid)


def quantize(model: nn.Module, grid: Grid, input_grid: ActivationGrid | None) -> None:
    """Every linear layer of every block, in place."""
    blocks = model.esm.encoder.layer
    for name, module in list(blocks.named_modules()):
        if isinstance(module, nn.Linear):
            packed = rounded(module.weight.detach(), grid)
            layer = QuantLinear.from_quantized(packed, module.bias, input_grid=input_grid)
            blocks.set_submodule(name, layer)
    multiply_integers(model)


def num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="650M")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--residues", type=int, default=510)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    layers = SHAPES[arguments.shape][0]
    ids_BT = torch.randint(4, 24, (1, arguments.residues + 2))
    models = {"fp32": esm(arguments.shape, arguments.blocks)}
    for name, (grid, input_grid) in ROWS.items():
        models[name] = esm(arguments.shape, arguments.blocks)
        quantize(models[name], grid, input_grid)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(arguments.repeats + 1):
            for name, model in models.items():
                started = time.perf_counter()
                model(ids_BT)
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    held = {}
    for name, model in models.items():
        blocks = num_bytes(model.esm.encoder.layer)
        held[name] = num_bytes(model) + blocks * (layers - arguments.blocks) // arguments.blocks
    for name in models:
        row = {
            "row": name,
            "bytes": held[name],
            "memory": held[name] / held["fp32"],
            "ms_per_residue": 1e3 * median[name] / arguments.residues * layers / arguments.blocks,
            "time": median[name] / median["fp32"],
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
