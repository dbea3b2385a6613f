"""``rotq inspect``: what a checkpoint is, and whether its files are what was written."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rotq.cli.options import output_options


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Compare every file with its sha256; else exit 3.")
@output_options
def inspect(checkpoint: Path, verify: bool, as_json: bool) -> None:
    """Show size, bits, recipe, provenance and the layers of CHECKPOINT.

    \b
    rotq inspect out/llama-w3 --verify
    """
    from rotq.checkpoint.inspection import read_checkpoint, verify_files
    from rotq.report.tables import inspection_table

    found = read_checkpoint(checkpoint)
    verified = verify_files(found) if verify else None
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "verified_files": verified}))
        return
    click.echo(inspection_table(found.to_dict(), found.report, verified), nl=False)
