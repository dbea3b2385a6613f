"""``rotq eval pll``: pseudo-perplexity of a masked language model of proteins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.loading import check_masked, find, load, placed_on, say, show
from rotq.cli.options import (
    ModelName,
    device_map_option,
    device_option,
    model_options,
    output_options,
    proteins_option,
)
from rotq.devices import AUTO

if TYPE_CHECKING:
    from rotq.calibration.fasta import Record
    from rotq.checkpoint.location import Location
    from rotq.evaluation.pseudo_perplexity import PLLProtocol


@click.command("pll")
@click.argument("checkpoint", type=ModelName())
@proteins_option(required=False)
@click.option(
    "--groups",
    is_flag=True,
    help="Score rotq's own four groups: short peptides, transmembrane helices, active sites, "
    "disordered regions.",
)
@click.option("--reference", type=ModelName(), help="Original model to compare with.")
@click.option(
    "--sequences",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Taken from the start of the file; 0 takes all.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Residues; longer sequences are cut, and so are those that the model's positions do not "
    "suffice for.",
)
@click.option(
    "--positions",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Residues masked in each sequence, drawn at random; 0 takes all.",
)
@click.option(
    "--representations",
    is_flag=True,
    help="Compare last hidden states and contact maps with the reference's too.",
)
@device_option
@device_map_option
@model_options
@output_options
def eval_pll(
    checkpoint: str,
    fasta: Path | None,
    groups: bool,
    reference: str | None,
    sequences: int,
    max_length: int,
    positions: int,
    representations: bool,
    device: str,
    placed: str | None,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Pseudo-perplexity and masked-token accuracy of CHECKPOINT on proteins.

    Each residue is masked in turn and its probability taken; next to it stands the figure of one
    pass without a mask. Special tokens, padding and ambiguous residues are not scored.

    \b
    rotq eval pll out/esm-w4 --fasta heldout.fasta --reference models/esm
    rotq eval pll out/esm-w4 --groups --reference models/esm --representations
    """
    if (fasta is None) == (not groups):
        raise click.UsageError("give either --fasta or --groups")
    if representations and reference is None:
        raise click.UsageError("--representations compares with --reference, which is missing")
    from rotq.evaluation.pseudo_perplexity import PLLProtocol

    placed_on(device, placed)
    found = measure_pll(
        find(checkpoint),
        _records(fasta),
        PLLProtocol(sequences=sequences, max_length=max_length, positions=positions),
        reference=None if reference is None else find(reference),
        representations=representations,
        device=device,
        placed=placed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        click.echo(json.dumps(found))
        return
    from rotq.report.protein_tables import pll_table

    click.echo(pll_table(found), nl=False)


def measure_pll(
    checkpoint: Location,
    groups: dict[str, list[Record]],
    protocol: PLLProtocol,
    *,
    reference: Location | None = None,
    representations: bool = False,
    device: str = AUTO,
    placed: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Load a checkpoint and its reference, and score both on each group of sequences.

    Raises:
        RotqError: a model cannot be read, fills in no masks, or does not read residues.
    """
    from rotq.calibration.limits import Limits
    from rotq.calibration.residues import ResidueCodec
    from rotq.evaluation.basis import basis_of, is_rotated
    from rotq.evaluation.pseudo_perplexity import evaluate_pll
    from rotq.evaluation.representations import compare_representations
    from rotq.models.limits import limits_of

    models, codecs, limits = [], [], Limits()
    named = [model for model in (checkpoint, reference) if model is not None]
    for place in named:
        check_masked(place, trust_remote_code=trust_remote_code)
    if representations:
        is_rotated(checkpoint.path)  # one that was trained is refused
    for place in named:
        model, tokenizer = load(
            place,
            device=device,
            placed=placed,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            in_integers=True,
        )
        models.append(model)
        codecs.append(ResidueCodec(tokenizer))
        limits = limits.within(limits_of(model))
    asked, special = protocol, codecs[0].num_special
    protocol = asked.within(limits, special)
    if any(protocol.cut(records) != asked.cut(records) for records in groups.values()):
        say([limits.note(asked.max_length, protocol.max_length, "residues", special=special)])
    found: dict[str, dict[str, Any]] = {}
    for name, records in groups.items():
        scored = evaluate_pll(
            models[0],
            records,
            codecs[0],
            protocol=protocol,
            reference=models[1] if reference is not None else None,
            on_batch=show(f"{name}: pass"),
        )
        found[name] = scored.to_dict()
        if representations:
            agreement = compare_representations(
                models[0],
                models[1],
                protocol.cut(records),
                codecs[0],
                basis=basis_of(checkpoint.path, models[0], models[1]),
            )
            found[name] |= agreement.to_dict()
    return found


def _records(fasta: Path | None) -> dict[str, list[Record]]:
    from rotq.calibration.sequences import read_proteins
    from rotq.evaluation.groups import load_groups

    if fasta is None:
        return load_groups()
    proteins = read_proteins(fasta)
    if proteins.oddities():
        say([f"{fasta}: {proteins.describe()}"])
    return {fasta.name: list(proteins.records)}
