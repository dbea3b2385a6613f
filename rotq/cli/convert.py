"""``rotq convert``: a protein model's own file as a folder that every command reads."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rotq.cli.loading import say
from rotq.cli.options import FilePath, output_options


@click.command()
@click.argument("file", type=FilePath(exists=True))
@click.option(
    "-o", "--output", type=FilePath(), required=True, help="Folder for the model; new or empty."
)
@output_options
def convert(file: Path, output: Path, as_json: bool) -> None:
    """Write FILE, a model in its makers' own layout, as transformers reads it.

    ESM-2, ESM-1b and ESM-1v of fair-esm (.pt, with NAME-contact-regression.pt beside it), ESM-C of
    EvolutionaryScale (.pth), a folder of ProGen2. No code of theirs is run; the result is read
    back.

    \b
    rotq convert esm2_t33_650M_UR50D.pt -o models/esm2-650m
    rotq quantize models/esm2-650m -c w4 -o out/esm2-w4 --calibration proteins.fasta
    """
    from rotq.checkpoint.published import write_published
    from rotq.checkpoint.publishers import read_published
    from rotq.disk.destination import resolve_output
    from rotq.disk.filling import new_folder

    path = resolve_output(output, {"the model": file})
    model, notes = read_published(file)
    say(f"{file}: {note}" for note in notes)
    with new_folder(path, named=output) as folder:
        write_published(model, folder)
    facts = {
        "output": str(output),
        "architecture": model.config["architectures"][0],
        "layers": model.config.get("num_hidden_layers", model.config.get("n_layer")),
        "width": model.config.get("hidden_size", model.config.get("n_embd")),
        "parameters": model.num_parameters,
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(
        f"{output}: {facts['architecture']}, {facts['layers']} layers of {facts['width']}, "
        f"{model.num_parameters / 1e6:.1f} M parameters"
    )
