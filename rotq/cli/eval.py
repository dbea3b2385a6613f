"""``rotq eval ppl``: perplexity, and divergence from a reference model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rotq.cli.groups import Group
from rotq.cli.loading import check_causal, check_device_map, say, show
from rotq.cli.options import FilePath, Words, bos_option, model_options, output_options

if TYPE_CHECKING:
    from torch import Tensor

    from rotq.calibration.limits import Limits
    from rotq.calibration.texts import Text
    from rotq.evaluation.perplexity import Evaluation, Protocol


@click.group("eval", cls=Group, no_args_is_help=False)
def eval_group() -> None:
    """Measure a checkpoint."""


@eval_group.command()
@click.argument("checkpoint", type=FilePath())
@click.option(
    "--text",
    type=Words(),
    required=True,
    metavar="FILE|ID",
    help="Text, JSON lines or FASTA; pydoc-test; or a datasets id.",
)
@click.option(
    "--windows",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Windows from the start of the text; 0 takes all.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Tokens per window; no more than the model has positions.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens between window starts, each token scored once; 0: windows do not overlap.",
)
@bos_option("auto")
@click.option("--reference", type=FilePath(), help="Original model, for KL and top-1.")
@click.option(
    "--device-map",
    type=Words(),
    help="As accelerate takes it: auto, cuda, cpu. Without it: the CPU.",
)
@model_options
@output_options
def ppl(
    checkpoint: Path,
    text: str,
    windows: int,
    seq_len: int,
    stride: int,
    bos: str,
    reference: Path | None,
    device_map: str | None,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Perplexity of CHECKPOINT on a text: dense, compressed-tensors, rotq or GGUF.

    \b
    rotq eval ppl out/llama-w3 --text test.txt --reference models/llama
    rotq eval ppl out/llama-w3 --text test.txt --windows 0 --seq-len 2048 --stride 512
    """
    if stride >= seq_len:
        raise click.UsageError(f"--stride {stride} is not below --seq-len {seq_len}")
    check_device_map(device_map)
    from rotq.evaluation.perplexity import Protocol

    found = measure(
        checkpoint,
        text,
        Protocol(windows=windows, seq_len=seq_len, stride=stride),
        bos=bos,
        reference=reference,
        device_map=device_map,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    from rotq.report.tables import evaluation_table

    click.echo(evaluation_table(found.to_dict()), nl=False)


def scored_tokens(
    paths: Sequence[Path], text: str, protocol: Protocol, *, bos: str, trust_remote_code: bool
) -> tuple[Tensor, Protocol]:
    """Token ids of a text for the first of some models, and the protocol within the limits of all.

    Raises:
        RotqError: a model predicts no next token, the tokenizer or the text cannot be read, the
            text is short, or it holds a token that a model does not know.
    """
    from rotq.calibration.data import first_tokens, tokenize
    from rotq.calibration.limits import Limits
    from rotq.calibration.texts import read_text
    from rotq.checkpoint.limits import read_limits
    from rotq.checkpoint.load import load_tokenizer

    limits = Limits()
    for path in paths:
        check_causal(path, trust_remote_code=trust_remote_code)
        if path.exists():  # else its loader says so
            limits = limits.within(read_limits(path, trust_remote_code=trust_remote_code))
    content = read_text(text, split="test")
    tokenizer = load_tokenizer(paths[0], trust_remote_code=trust_remote_code)
    ids_N = tokenize(content, tokenizer)
    begun = replace(protocol, first=first_tokens(content, tokenizer, bos))
    return ids_N, checked_protocol(begun, limits, content, ids_N)


def measure(
    checkpoint: Path,
    text: str,
    protocol: Protocol,
    *,
    bos: str,
    reference: Path | None,
    device_map: str | None,
    dtype: str,
    trust_remote_code: bool,
) -> Evaluation:
    """Load a checkpoint and its reference, and score both on a text.

    Args:
        bos: What windows begin with: "auto", "yes" or "no".

    Raises:
        RotqError: the checkpoint, the reference or the text cannot be read, or the text is short.
    """
    from rotq.checkpoint.load import load_model
    from rotq.evaluation.perplexity import evaluate

    paths = [path for path in (checkpoint, reference) if path is not None]
    # what is refused or cut is so before a model is loaded
    ids_N, within = scored_tokens(
        paths, text, protocol, bos=bos, trust_remote_code=trust_remote_code
    )
    models = [
        load_model(path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
        for path in paths
    ]
    return evaluate(
        models[0],
        ids_N,
        protocol=within,
        reference=models[1] if reference is not None else None,
        on_window=show("window"),
    )


def checked_protocol(protocol: Protocol, limits: Limits, text: Text, ids_N: Tensor) -> Protocol:
    """The protocol within a model's limits, and a line for what is odd.

    Args:
        protocol: As it was asked for.
        limits: Of the model, or of both.
        text: That is scored.
        ids_N: Its tokens.

    Raises:
        RotqError: the text is too short, or holds a token that the model does not know.
    """
    within = protocol.within(limits)
    limits.check(within.cut(ids_N), text.source)
    say((text.note, limits.note(protocol.seq_len, within.seq_len)))
    return within
