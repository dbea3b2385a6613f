"""W4A4 in floats of 4 bits: rounded to nearest, with block Hadamards, and with GPTQ behind them.

    python scripts/ablation_floats.py --model DIR --calibration FILE --text FILE \\
        --results floats.jsonl --dtype float32 --num-samples 8 --seq-len 512 --windows 4 \\
        --seeds 0,1,2

Rows ``inputs`` rotate what every linear layer reads, at run time and in blocks of the format's
group, as MR-GPTQ does (arXiv 2509.23202); rows ``fused`` have R1 and R2 in such blocks in the
weights, and R4 at run time. A seed draws the calibration windows and the signs. Rounded to nearest,
MXFP4 without a rotation sees neither; NVFP4 takes the range of inputs from the windows. GPTQ is one
pass a block, for time: target correction and refinement are left out unless --set has them.
Options and the results file are those of ablation.py; rows that are in the file are not run again.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import ablation
from ablation_transforms import preset, sections

GROUPS = {"nvfp4": 16, "mxfp4": 32}
RTN = {"solver.method": "rtn", "solver.scale_search": "minmax"}
GPTQ = {"solver.scale_search": "hessian", "solver.damping": 0.05, "solver.passes": 1}


def rows_of(kind: str) -> dict[str, dict[str, Any]]:
    """Rows of one format, by name."""
    size = GROUPS[kind]
    base = {**sections(preset(kind), "weights", "activations"), "output.format": "rotq"}
    inputs = {"rotation.inputs": "hadamard", "rotation.block_size": size}
    fused = {
        "rotation.residual": "block_hadamard",
        "rotation.value": "block_hadamard",
        "rotation.block_size": size,
        "rotation.down": "hadamard",
        "rotation.down_block_size": size,
    }
    rows = {
        "rtn": RTN,
        "rtn_inputs": {**RTN, **inputs},
        "rtn_fused": {**RTN, **fused},
        "gptq": GPTQ,
        "gptq_inputs": {**GPTQ, **inputs},
    }
    return {f"{kind}_{name}": {**base, **row} for name, row in rows.items()}


ROWS = {**rows_of("nvfp4"), **rows_of("mxfp4")}


def table(results: Path) -> str:
    """Means over seeds and their range, as Markdown."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    told = ["| row | ppl | KL | least to most | KL over RTN's | top-1 | job s | seeds |"]
    told.append("|" + "---|" * 8)
    for name in ROWS:
        found = [line for line in lines if line["row"] == name]
        if not found:
            continue
        plain = [line["kl"] for line in lines if line["row"] == f"{name.split('_')[0]}_rtn"]
        kl = [line["kl"] for line in found]
        share = f"{mean(kl) / mean(plain):.2f}" if plain else ""
        ppl, top1, seconds = (
            mean(line[key] for line in found) for key in ("ppl", "top1", "seconds")
        )
        told.append(
            f"| {name} | {ppl:.2f} | {mean(kl):.4f} | {min(kl):.4f} to {max(kl):.4f} | {share} "
            f"| {top1:.1%} | {seconds:.0f} | {len(found)} |"
        )
    return "\n".join(told)


if __name__ == "__main__":
    print(table(ablation.main(ROWS, str(__doc__))))
