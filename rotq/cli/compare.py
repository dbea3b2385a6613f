"""``rotq compare``: several checkpoints of one model in one table."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rotq.cli.compared import Loading, Text, check_once, compare_all
from rotq.cli.loading import find
from rotq.cli.options import (
    FilePath,
    ModelName,
    Seed,
    bos_option,
    device_option,
    model_options,
    output_options,
    text_option,
    window_options,
)
from rotq.cli.pages import page_to_write, write_page


@click.command()
@click.argument("checkpoints", type=ModelName(), nargs=-1, required=True)
@click.option("--reference", type=ModelName(), required=True, help="The original model.")
@text_option
@window_options
@bos_option("auto")
@click.option(
    "--seed", type=Seed(), default=0, show_default=True, help="Of the draws behind intervals."
)
@click.option(
    "--html",
    type=FilePath(dir_okay=False),
    metavar="FILE",
    help="Also write the table and its figures as one page; replaces a page of rotq's alone.",
)
@device_option
@model_options
@output_options
def compare(
    checkpoints: tuple[str, ...],
    reference: str,
    text: str,
    windows: int,
    seq_len: int,
    bos: str,
    seed: int,
    html: Path | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Size, perplexity and divergence of CHECKPOINTS, and how sure their order is.

    All are scored on the same windows as the original. The logarithm of a perplexity over another
    comes with its 95 % interval: an interval that holds 0 says that the two are not told apart.
    The same command gives the same figures.

    \b
    rotq compare out/w3 out/w4 --reference models/llama --text test.txt
    rotq compare out/w3 out/w4 --reference models/llama --text test.txt --html w3-w4.html
    """
    from rotq.evaluation.perplexity import Protocol

    check_once(checkpoints)
    page = None if html is None else page_to_write(html, [*checkpoints, reference], text)
    found = compare_all(
        checkpoints,
        [find(name) for name in checkpoints],
        (reference, find(reference)),
        Text(
            source=text,
            protocol=Protocol(windows=windows, seq_len=seq_len),
            bos=bos,
            seed=seed,
        ),
        Loading(device=device, dtype=dtype, trust_remote_code=trust_remote_code),
    )
    if page is not None:
        from rotq.report.page import Page

        title = f"{len(checkpoints)} checkpoints of {reference}"
        write_page(page, Page(title=title, comparison=found.report, positions=found.positions))
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(json.dumps(found.report))
        return
    from rotq.report.compare_tables import compare_table

    click.echo(compare_table(found.report), nl=False)
