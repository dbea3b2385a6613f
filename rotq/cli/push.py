"""``rotq push``: a checkpoint that rotq has made, to the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rotq.cli.options import FilePath, Words, output_options


@click.command()
@click.argument("out", type=FilePath())
@click.argument("repo", type=Words(), metavar="ORG/NAME")
@click.option("--public", is_flag=True, help="For everybody to read; without it, private.")
@click.option("--message", type=Words(), help="Of the commit.")
@output_options
def push(out: Path, repo: str, public: bool, message: str | None, as_json: bool) -> None:
    """Upload OUT, a checkpoint that rotq quantize has made, to ORG/NAME on the hub.

    Files, card and provenance go in one commit. Anything that rotq did not write, or that was
    changed since, is refused. hf auth login or HF_TOKEN says who you are.

    \b
    rotq push out/llama-w3 my-name/llama-w3
    rotq push out/llama-w3 my-name/llama-w3 --public
    """
    from rotq.checkpoint.hub import HubName
    from rotq.checkpoint.push import push as upload

    if HubName.parse(repo) != HubName(repo=repo):
        raise click.UsageError(f"{repo} is no hub id ORG/NAME")
    done = upload(out, repo, public=public, message=message)
    if as_json:
        click.echo(json.dumps(done.to_dict()))
        return
    kind = "private" if done.private else "public"
    click.echo(
        f"{done.url} ({kind}): {done.files} files, {done.bytes / 1e6:.1f} MB, commit {done.commit}"
    )
