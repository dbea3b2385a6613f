"""``rotq export``: a quantized checkpoint in the file of another engine."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rotq.cli.options import FilePath, ModelName, output_options


@click.command()
@click.argument("checkpoint", type=ModelName())
@click.option(
    "-o", "--output", type=FilePath(), required=True, help="Folder for the file; new or empty."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["gguf", "gptq"]),
    required=True,
    help="gguf for llama.cpp, gptq for whatever reads GPTQ's files.",
)
@click.option(
    "--type",
    "type_",
    type=click.Choice(["auto", "q4_0", "q4_1", "q8_0", "mxfp4", "bf16"]),
    default="auto",
    show_default=True,
    help="Of GGUF's packed tensors; auto is the smallest that holds each layer's codes.",
)
@output_options
def export(checkpoint: str, output: Path, kind: str, type_: str, as_json: bool) -> None:
    """Write CHECKPOINT, which rotq has quantized, for another engine.

    Codes are taken over as they are: nothing is quantized again. What a format cannot hold is
    refused, and the nearest that can is named.

    \b
    rotq export out/w4 --format gguf -o out/w4-gguf
    rotq export out/w4 --format gptq -o out/w4-gptq
    """
    from rotq.checkpoint.exporting import export_checkpoint
    from rotq.disk.destination import resolve_output
    from rotq.disk.filling import new_folder

    path = resolve_output(output, {"the checkpoint": Path(checkpoint)})
    with new_folder(path, named=output) as folder:
        facts = export_checkpoint(checkpoint, folder, kind, type_, name=output.name)
    facts = {"output": str(output), "format": kind, **facts}
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(f"{output}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
