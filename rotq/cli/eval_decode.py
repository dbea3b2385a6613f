"""``rotq eval decode``: what packed caches cost an ESM-2 that is decoded token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.calibrate_kv import named_specs
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
    from rotq.kv.presets import KVSpec

_PLAIN = ("dense", "int8")
"""Caches that are no presets."""


@click.command("decode")
@click.argument("model", type=ModelName())
@click.option(
    "--kv",
    "names",
    required=True,
    metavar="CACHE[,CACHE...]",
    help="Presets of packed caches, int8, and dense, which all are compared with.",
)
@proteins_option(required=False)
@click.option(
    "--calibration",
    type=FilePath(),
    help="Proteins that packed caches are calibrated on; others than those that are scored.",
)
@click.option(
    "--num-samples",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Calibration proteins, from the start of the file.",
)
@click.option(
    "--calibration-length",
    type=click.IntRange(min=16),
    default=126,
    show_default=True,
    help="Residues from the start of each; shorter ones are passed over.",
)
@click.option(
    "--sequences",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Of each group, from its start; 0 takes all.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Residues; of a longer sequence the first ones are taken.",
)
@device_option
@model_options
@output_options
def eval_decode(
    model: str,
    names: str,
    fasta: Path | None,
    calibration: Path | None,
    num_samples: int,
    calibration_length: int,
    sequences: int,
    max_length: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """What packed caches cost MODEL, an ESM-2 that is run as a decoder, as TurboESM does.

    For each cache and group of proteins (rotq's own four, or those that headers of --fasta name as
    group=X): cosine of logits with those of the dense cache, ratio of perplexities of the visible
    token, bytes at the end of the longest sequence. The paper's cosines stand beside their groups.

    \b
    rotq eval decode models/esm2 --kv k3v3,turboesm,int8,dense --calibration uniref.fasta
    rotq eval decode models/esm2 --kv k3v3 --fasta heldout.fasta --calibration uniref.fasta
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    packed = [name for name in wanted if name not in _PLAIN]
    specs = named_specs(",".join(packed)) if packed else []
    if calibration is None and any(spec.needs_calibration for spec in specs):
        raise click.UsageError("--kv: these caches are calibrated; give --calibration")
    choose(device, in_double=f"--kv {packed[0]}" if packed else "")
    groups = _groups(fasta, sequences, max_length)
    known = [] if calibration is None else _taken(calibration, num_samples, calibration_length)
    place = find(model)
    _check(place, groups, trust_remote_code=trust_remote_code)
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    rows = _measure(place, groups, specs, wanted, known, options)
    if as_json:
        click.echo(json.dumps({"groups": rows}))
        return
    from rotq.evaluation.decoding import PAPER_COSINES
    from rotq.report.protein_tables import decoding_table

    click.echo(decoding_table(rows, PAPER_COSINES), nl=False)


def _groups(fasta: Path | None, sequences: int, max_length: int) -> dict[str, list[str]]:
    """Sequences by group, as far as they are scored."""
    from rotq.calibration.sequences import read_proteins
    from rotq.evaluation.groups import grouped, load_groups

    if fasta is None:
        found = load_groups()
    else:
        proteins = read_proteins(fasta)
        say([f"{fasta}: {proteins.describe()}"] if proteins.oddities() else [])
        found = grouped(proteins.records, fasta.name)
    return {name: _cut(records, sequences, max_length) for name, records in found.items()}


def _cut(records: list[Record], number: int, length: int) -> list[str]:
    return [record.sequence[:length] for record in records[: number or None]]


def _taken(calibration: Path, number: int, length: int) -> list[str]:
    """Pieces of one length.

    Raises:
        RotqError: no protein is long enough.
    """
    from rotq.calibration.sequences import read_proteins

    records = read_proteins(calibration).records
    found = [r.sequence[:length] for r in records if len(r.sequence) >= length][:number]
    if not found:
        raise RotqError(f"{calibration}: no protein has {length} residues; --calibration-length")
    return found


def _check(place: Location, groups: dict[str, list[str]], *, trust_remote_code: bool) -> None:
    """Refuse what is no ESM-2, before it is loaded.

    Raises:
        RotqError: another model, or a sequence of one residue.
    """
    from rotq.checkpoint.configuration import load_config
    from rotq.models.families.esm import check_decodes

    if place.is_gguf:
        raise RotqError(f"{place} is no ESM-2 with rotary positions")
    check_decodes(str(place), load_config(place.path, trust_remote_code=trust_remote_code))
    short = [name for name, found in groups.items() if min(map(len, found)) < 2]
    if short:
        raise RotqError(f"{short[0]}: a sequence of one residue; nothing is decoded")


def _measure(
    place: Location,
    groups: dict[str, list[str]],
    specs: list[KVSpec],
    wanted: list[str],
    known: list[str],
    options: dict[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """One row for each cache, by group."""
    import torch

    from rotq.calibration.residues import ResidueCodec
    from rotq.evaluation.decoding import baselines, evaluate_decoding, packed_caches

    model, tokenizer = load(place, **options)
    codec = ResidueCodec(tokenizer)
    ids_BT = torch.tensor([codec.encode(sequence) for sequence in known]) if known else None
    notes: list[str] = []
    makers = packed_caches(model, specs, ids_BT, on_note=notes.append)
    makers |= baselines(model.config.num_hidden_layers)
    say(f"warning: {note}" for note in dict.fromkeys(notes))
    caches = {name: makers[name] for name in wanted if name != "dense"}
    progress = show("group")
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, (name, sequences) in enumerate(groups.items(), start=1):
        found = evaluate_decoding(model, sequences, codec, caches)
        rows[name] = [row.to_dict() for row in found]
        if progress is not None:
            progress(number, len(groups))
    return rows
