"""Decode proteins with an ESM-2 token by token, as TurboESM does, with several caches.

    python scripts/decode_esm.py out/tiny-plm/esm --calibration out/tiny-plm/calibration.fasta \
      --fasta out/tiny-plm/heldout.fasta

The network runs as a decoder (causal attention, own loop), the packed caches are calibrated on
pieces of the calibration sequences. One row for each cache: cosine of its logits with those of the
same loop and a dense fp32 cache, perplexity ratio of the visible token, bytes by allocation at the
end of the longest sequence.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from rotq.calibration.fasta import Record
from rotq.calibration.residues import ResidueCodec
from rotq.calibration.sequences import read_proteins
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.evaluation.decoding import DecodingEvaluation, baselines, evaluate_decoding
from rotq.evaluation.groups import load_groups
from rotq.kv.cache.esm import EsmPackedCache
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.presets import preset
from rotq.models.families.esm import as_decoder
from rotq.models.limits import limits_of

WINDOW = 126
"""Residues of a calibration window."""


def windows(records: list[Record], codec: ResidueCodec, number: int) -> torch.Tensor:
    """The first residues of the first sequences that are long enough, (B, T)."""
    found = [r.sequence[:WINDOW] for r in records if len(r.sequence) >= WINDOW][:number]
    return torch.tensor([codec.encode(sequence) for sequence in found])


def evaluate(
    model: Any, sequences: list[str], codec: ResidueCodec, ids_BT: torch.Tensor, names: list[str]
) -> list[DecodingEvaluation]:
    """All caches on one set of sequences."""
    limits_of(model).check(ids_BT)
    with as_decoder(model):
        found = {name: calibrate(model, ids_BT, preset(name)) for name in names}
    caches = {
        name: lambda constants=constants: EsmPackedCache(model, constants)
        for name, constants in found.items()
    }
    caches |= baselines(model.config.num_hidden_layers)
    return evaluate_decoding(model, sequences, codec, caches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--fasta", type=Path, help="without it: rotq's own groups")
    parser.add_argument("--kv", default="k3v3,k4v3,turboesm,turboquant")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    arguments = parser.parse_args()
    model, codec = load_model(arguments.model), ResidueCodec(load_tokenizer(arguments.model))
    ids_BT = windows(list(read_proteins(arguments.calibration).records), codec, arguments.windows)
    groups = load_groups()
    if arguments.fasta:
        groups = {arguments.fasta.name: list(read_proteins(arguments.fasta).records)}
    for group, records in groups.items():
        sequences = [r.sequence[: arguments.max_length] for r in records[: arguments.sequences]]
        for row in evaluate(model, sequences, codec, ids_BT, arguments.kv.split(",")):
            print(json.dumps({"group": group, **row.to_dict()}), flush=True)


if __name__ == "__main__":
    main()
