"""``rotq inspect``: what a checkpoint is, and whether its files are what was written."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rotq.cli.loading import say_commit
from rotq.cli.options import FilePath, ModelName, output_options
from rotq.errors import RotqError, told


@click.command()
@click.argument("checkpoint", type=ModelName())
@click.option("--verify", is_flag=True, help="Compare every file with its sha256; else exit 3.")
@click.option(
    "--plots",
    type=FilePath(file_okay=False),
    metavar="DIR",
    help="Write flatness.png: how even the layers' inputs are, before and after the rotations.",
)
@output_options
def inspect(checkpoint: str, verify: bool, plots: Path | None, as_json: bool) -> None:
    """Show size, bits, recipe, provenance and the layers of CHECKPOINT.

    \b
    rotq inspect out/llama-w3 --verify
    rotq inspect out/llama-a4 --plots figures/
    """
    from rotq.checkpoint.inspection import read_checkpoint, verify_files
    from rotq.report.tables import inspection_table

    found = read_checkpoint(checkpoint)
    say_commit(found.hub)
    verified = verify_files(found) if verify else None
    if plots is not None:
        from rotq.report.plots import plot_flatness

        if found.report is None or not found.report.flatness:
            raise RotqError(f"{checkpoint} reports no flatness, so there is nothing to plot")
        with told(f"{checkpoint}: the flatness in its report cannot be drawn"):
            written = plot_flatness(found.report.flatness, plots)
        click.echo(f"wrote {written}", err=True)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "verified_files": verified}))
        return
    with told(f"{checkpoint}: its files are not as rotq writes them"):
        table = inspection_table(found.to_dict(), found.report, verified)
    click.echo(table, nl=False)
