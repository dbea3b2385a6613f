"""``rotq embed``: embeddings of proteins, in the basis of the model that was quantized."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.loading import choose, find, load, say, show
from rotq.cli.options import (
    FilePath,
    ModelName,
    device_option,
    model_options,
    output_options,
    proteins_option,
)
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.calibration.fasta import Record
    from rotq.checkpoint.location import Location
    from rotq.evaluation.embedding_files import Gathering
    from rotq.evaluation.embeddings import EmbeddingProtocol, Pooling

GROUP = 64
"""Proteins that are kept together before the next are embedded."""


@click.command("embed")
@click.argument("checkpoint", type=ModelName())
@proteins_option(required=True)
@click.option(
    "-o",
    "--output",
    type=FilePath(),
    required=True,
    help="File .npz or .h5: an array for each protein, by its name.",
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "residue"]),
    default="mean",
    show_default=True,
    help="One vector for each protein, or one for each residue.",
)
@click.option(
    "--layer",
    type=int,
    default=-1,
    show_default=True,
    help="Hidden states as transformers counts them: 0 before the first block, -1 behind the final "
    "norm.",
)
@click.option(
    "--reference",
    type=ModelName(),
    help="Original model; the last layer of a rotated checkpoint needs the gain of its final norm.",
)
@device_option
@model_options
@output_options
def embed_command(
    checkpoint: str,
    fasta: Path,
    output: Path,
    pooling: Pooling,
    layer: int,
    reference: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Embeddings of proteins by CHECKPOINT, in the original model's basis.

    Special tokens and padding are left out. A run that was stopped goes on where it was.

    \b
    rotq embed out/esm-w4 --fasta proteins.fasta -o proteins.npz
    rotq embed out/esm-w4 --fasta proteins.fasta -o residues.h5 --pooling residue --layer -2
    """
    from rotq.checkpoint.configuration import load_config
    from rotq.evaluation.basis import is_rotated
    from rotq.evaluation.embedding_files import Gathering, output_file
    from rotq.evaluation.embeddings import EmbeddingProtocol, check_layer

    choose(device)
    records = _records(fasta)
    places = [find(name) for name in (checkpoint, reference) if name is not None]
    config = load_config(places[0].path, trust_remote_code=trust_remote_code)
    blocks = config.get_text_config().num_hidden_layers
    check_layer(layer, blocks)
    layer = -1 if layer == blocks else layer  # the same one, counted from the other end
    if is_rotated(places[0].path) and layer == -1 and reference is None:
        raise RotqError(
            f"{checkpoint} is rotated, and the gain of its final norm is in the head: the last "
            "layer needs --reference, the original model"
        )
    file = output_file(output, {"the model": places[0].path, "the proteins": fasta})
    protocol = EmbeddingProtocol(layer=layer, pooling=pooling)
    gathering = Gathering(file, _key(places, records, protocol, dtype))
    _check(places, records, trust_remote_code=trust_remote_code)
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    _embed(places, records, protocol, gathering, options)
    facts = {
        "file": str(output),
        "proteins": len(records),
        "residues": sum(len(record.sequence) for record in records),
        **asdict(protocol),
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(f"{output}: {facts['proteins']} proteins, {facts['residues']} residues, {pooling}")


def _records(fasta: Path) -> Sequence[Record]:
    from rotq.calibration.sequences import read_proteins
    from rotq.evaluation.embedding_files import check_names

    proteins = read_proteins(fasta)
    say([f"{fasta}: {proteins.describe()}"] if proteins.oddities() else [])
    check_names(proteins.records)
    return proteins.records


def _key(
    places: Sequence[Location],
    records: Sequence[Record],
    protocol: EmbeddingProtocol,
    dtype: str,
) -> dict[str, Any]:
    """What the embeddings depend on."""
    text = "\n".join(f"{record.name} {record.sequence}" for record in records)
    return {
        "models": [place.stamp() for place in places],
        "proteins": hashlib.sha256(text.encode()).hexdigest(),
        "dtype": dtype,
        **asdict(protocol),
    }


def _check(
    places: Sequence[Location],
    records: Sequence[Record],
    *,
    trust_remote_code: bool,
) -> None:
    """Refuse what no model of these can do, before one is loaded."""
    from rotq.calibration.residues import ResidueCodec
    from rotq.checkpoint.limits import read_limits
    from rotq.checkpoint.load import load_tokenizer
    from rotq.evaluation.embeddings import check_lengths

    limits = read_limits(places[0], trust_remote_code=trust_remote_code)
    codec = ResidueCodec(load_tokenizer(places[0], trust_remote_code=trust_remote_code))
    check_lengths(records, limits.positions, codec.num_special)


def _embed(
    places: Sequence[Location],
    records: Sequence[Record],
    protocol: EmbeddingProtocol,
    gathering: Gathering,
    options: dict[str, Any],
) -> None:
    """Embed what an earlier run has not, and write the file."""
    from rotq.calibration.residues import ResidueCodec
    from rotq.evaluation.basis import basis_of, inner_basis_of
    from rotq.evaluation.embeddings import embed

    groups = [records[start : start + GROUP] for start in range(0, len(records), GROUP)]
    progress = show("group")
    if any(not gathering.finished(number) for number in range(len(groups))):
        (model, tokenizer), *others = [load(place, in_integers=True, **options) for place in places]
        if others and protocol.layer == -1:
            basis = basis_of(places[0].path, model, others[0][0])
        else:
            basis = inner_basis_of(places[0].path, model, protocol.layer)
        codec = ResidueCodec(tokenizer)
        for number, some in enumerate(groups):
            if not gathering.finished(number):
                found = embed(model, codec, some, protocol, basis)
                gathering.add(number, {some[index].name: tensor for index, tensor in found})
            if progress is not None:
                progress(number + 1, len(groups))
    gathering.publish(records, len(groups))
