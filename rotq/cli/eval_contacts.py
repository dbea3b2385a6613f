"""``rotq eval contacts``: contacts that a protein model sees, against structures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.loading import check_masked, choose, find, load, say, show
from rotq.cli.options import (
    FilePath,
    ModelName,
    Words,
    device_option,
    model_options,
    output_options,
    proteins_option,
)
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.checkpoint.location import Location
    from rotq.evaluation.contact_maps import Readout
    from rotq.evaluation.structures import Structure


@click.command("contacts")
@click.argument("checkpoint", type=ModelName())
@click.option(
    "--structure",
    "structures",
    type=FilePath(),
    multiple=True,
    help="mmCIF or PDB file, packed or not, or a folder of them; may be repeated. Needs gemmi "
    "(extra structures).",
)
@click.option(
    "--chain", type=Words(), help="Of the structures; the first that is a protein unless said."
)
@click.option(
    "--contacts",
    type=FilePath(),
    help="Contacts of one protein: lines 'i j', residues from 1, as in CASP's RR files.",
)
@proteins_option(required=False)
@click.option("--reference", type=ModelName(), help="Original model to compare with.")
@click.option(
    "--readout",
    type=click.Choice(["head", "average"]),
    default="head",
    show_default=True,
    help="How contacts are read from attention maps: by the contact head that ESM-2 and ESM-1b "
    "bring, or by their mean, which any masked model has.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=8),
    default=1022,
    show_default=True,
    help="Residues; longer proteins are left out, and so are those that the model's positions do "
    "not suffice for.",
)
@device_option
@model_options
@output_options
def eval_contacts(
    checkpoint: str,
    structures: tuple[Path, ...],
    chain: str | None,
    contacts: Path | None,
    fasta: Path | None,
    reference: str | None,
    readout: Readout,
    max_length: int,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Precision of the contacts that CHECKPOINT's attention maps show.

    P@L and P@L/5 at short, medium and long range against structures or a list of contacts; with
    --reference also its precision, and how far both models' maps agree. Proteins of --fasta alone
    are compared with --reference only.

    \b
    rotq eval contacts out/esm-w4 --structure 1ubq.cif --reference models/esm
    rotq eval contacts out/esm-w4 --contacts native.rr --fasta target.fasta
    """
    if not structures and contacts is None and (fasta is None or reference is None):
        raise click.UsageError("give --structure or --contacts, or --fasta with --reference")
    if contacts is not None and structures:
        raise click.UsageError("give either --structure or --contacts")
    if structures and fasta is not None:
        raise click.UsageError("--structure has its sequence; --fasta is for --contacts, or alone")
    if chain is not None and not structures:
        raise click.UsageError("--chain is of a --structure")
    choose(device)
    proteins = _proteins(structures, chain, contacts, fasta)
    places = [find(name) for name in (checkpoint, reference) if name is not None]
    for place in places:
        check_masked(place, trust_remote_code=trust_remote_code)
    proteins = _fitting(places, proteins, max_length, trust_remote_code=trust_remote_code)
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    report = _measure(places, proteins, readout, options)
    if as_json:
        click.echo(json.dumps(report))
        return
    from rotq.report.protein_tables import contacts_table

    click.echo(contacts_table(report), nl=False)


_Proteins = dict[str, tuple[str, "Structure | None"]]
"""By name: sequence, and what is known of the structure."""


def _proteins(
    structures: tuple[Path, ...], chain: str | None, contacts: Path | None, fasta: Path | None
) -> _Proteins:
    """What is to be looked at.

    Raises:
        RotqError: a file cannot be read, a folder has no structure, or a name stands twice.
    """
    from rotq.calibration.sequences import read_proteins
    from rotq.evaluation.structures import is_structure, read_contacts, read_structure

    records = [] if fasta is None else list(read_proteins(fasta).records)
    if contacts is not None:
        found = [read_contacts(contacts, records[0].sequence if records else None)]
    elif structures:
        files: list[Path] = []
        for path in structures:
            inside = sorted(filter(is_structure, path.iterdir())) if path.is_dir() else [path]
            if not inside:
                raise RotqError(f"{path} holds no structure")
            files += inside
        found = [read_structure(file, chain=chain) for file in files]
    else:
        return _by_name([(record.name, (record.sequence, None)) for record in records])
    return _by_name([(each.name, (each.sequence, each)) for each in found])


def _by_name(found: list[tuple[str, tuple[str, Structure | None]]]) -> _Proteins:
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RotqError(f"two proteins are called {twice}; results are told apart by names")
    return dict(found)


def _fitting(
    places: list[Location], proteins: _Proteins, max_length: int, *, trust_remote_code: bool
) -> _Proteins:
    """Those that every model takes, and a line for the others.

    Raises:
        RotqError: none is left.
    """
    from rotq.calibration.limits import Limits
    from rotq.calibration.residues import ResidueCodec
    from rotq.checkpoint.limits import read_limits
    from rotq.checkpoint.load import load_tokenizer

    limits = Limits()
    for place in places:
        limits = limits.within(read_limits(place, trust_remote_code=trust_remote_code))
    codec = ResidueCodec(load_tokenizer(places[0], trust_remote_code=trust_remote_code))
    longest = limits.cut(max_length, special=codec.num_special)
    kept = {name: found for name, found in proteins.items() if len(found[0]) <= longest}
    left_out = ", ".join(name for name in proteins if name not in kept)
    if not kept:
        raise RotqError(f"every protein is longer than {longest} residues: {left_out}")
    say([f"left out, longer than {longest} residues: {left_out}" if left_out else ""])
    return kept


def _measure(
    places: list[Location], proteins: _Proteins, readout: Readout, options: dict[str, Any]
) -> dict[str, Any]:
    """Figures of each protein and their means."""
    from rotq.calibration.residues import ResidueCodec
    from rotq.evaluation.contact_maps import check_readout, contact_map
    from rotq.evaluation.contacts import contact_figures, mean_figures

    loaded = []
    for place in places:
        model, tokenizer = load(place, **options)
        check_readout(model, readout)
        loaded.append((model, ResidueCodec(tokenizer)))
    progress = show("protein")
    found: dict[str, dict[str, Any]] = {}
    for number, (name, (sequence, structure)) in enumerate(proteins.items(), start=1):
        maps = [contact_map(model, codec, sequence, readout) for model, codec in loaded]
        found[name] = contact_figures(maps, structure)
        if progress is not None:
            progress(number, len(proteins))
    lengths = {name: len(sequence) for name, (sequence, _) in proteins.items()}
    return {
        "readout": readout,
        "proteins": {name: {"length": lengths[name], **found[name]} for name in found},
        "mean": mean_figures(found),
    }
