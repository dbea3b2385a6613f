"""The last check of a job: a fresh process loads what was written and computes the same logits.

``python -m rotq.checkpoint.reload FOLDER PROBE THREADS`` is that process; it prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from rotq.checkpoint.child import run_module
from rotq.checkpoint.load import load_model
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensors
from rotq.errors import CheckFailed
from rotq.layers.packed_weight import multiply_as_dense
from rotq.phases import phase

HELD_BYTES = 2 * 10**9
"""Of a checkpoint's weights; of a larger one each layer is read when it is run, and given up."""


@phase("checks")
def check_reload(
    out_dir: Path, ids_BT: Tensor, logits_BTV: Tensor, *, trust_remote_code: bool = False
) -> None:
    """Load ``out_dir`` in a fresh process and compare its logits bit by bit.

    The process computes with as many threads as this one: sums are split by thread.

    Args:
        out_dir: The checkpoint.
        ids_BT: int64 tokens without padding.
        logits_BTV: Of the quantized model in memory, in the checkpoint's dtype.

    Raises:
        CheckFailed: the logits differ; says by how much.
        RotqError: the checkpoint does not load.
    """
    with tempfile.TemporaryDirectory(prefix="rotq-reload-") as folder:
        probe = Path(folder) / "probe.safetensors"
        save_tensors(probe, {"ids_BT": ids_BT, "logits_BTV": logits_BTV})
        arguments: list[str | Path] = [
            out_dir,
            probe,
            str(torch.get_num_threads()),
            str(int(trust_remote_code)),
        ]
        output = run_module("rotq.checkpoint.reload", arguments, doing=f"reloading {out_dir}")
    result = json.loads(output.splitlines()[-1])
    if not result["equal"]:
        raise CheckFailed(
            f"{out_dir} does not reproduce the quantized model: logits differ by up to "
            f"{result['max_difference']:.3g} ({result['num_different']} of {result['num']} values)"
        )


def compare(out_dir: Path, probe: Path, *, trust_remote_code: bool) -> dict[str, object]:
    """What the fresh process finds: equal, num, num_different, max_difference."""
    expected = read_tensors(probe)
    stored = sum(file.stat().st_size for file in out_dir.glob("*.safetensors"))
    model = load_model(
        out_dir,
        device_map={"": "disk"} if stored > HELD_BYTES else None,
        trust_remote_code=trust_remote_code,
    )
    multiply_as_dense(model)
    with torch.no_grad():
        logits_BTV = model(expected["ids_BT"], use_cache=False).logits
    wanted_BTV = expected["logits_BTV"]
    if logits_BTV.shape != wanted_BTV.shape or logits_BTV.dtype != wanted_BTV.dtype:
        raise CheckFailed(
            f"logits are {logits_BTV.dtype} {tuple(logits_BTV.shape)}, expected "
            f"{wanted_BTV.dtype} {tuple(wanted_BTV.shape)}"
        )
    difference_BTV = (logits_BTV.double() - wanted_BTV.double()).abs()
    return {
        "equal": torch.equal(logits_BTV, wanted_BTV),
        "num": logits_BTV.numel(),
        "num_different": int((logits_BTV != wanted_BTV).sum()),
        "max_difference": float(difference_BTV.max()),
    }


def main(arguments: list[str]) -> None:
    """Print the comparison as JSON."""
    out_dir, probe, threads, trust = arguments
    torch.set_num_threads(int(threads))
    result = compare(Path(out_dir), Path(probe), trust_remote_code=trust == "1")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
