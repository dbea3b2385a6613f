"""``rotq eval ppl``: perplexity, and divergence from a reference model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rotq.cli.loading import check_causal, show
from rotq.cli.options import model_options, output_options

if TYPE_CHECKING:
    from torch import Tensor

    from rotq.evaluation.perplexity import Evaluation, Protocol


@click.group("eval", no_args_is_help=False)
def eval_group() -> None:
    """Measure a checkpoint."""


@eval_group.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--text", required=True, metavar="FILE|ID", help="UTF-8 file, pydoc-test, or a datasets id."
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
    help="Tokens per window.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens between window starts, each token scored once; 0: windows do not overlap.",
)
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Original model, for KL and top-1."
)
@click.option("--device-map", help="As accelerate takes it: auto, cuda, cpu. Without it: the CPU.")
@model_options
@output_options
def ppl(
    checkpoint: Path,
    text: str,
    windows: int,
    seq_len: int,
    stride: int,
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
    from rotq.evaluation.perplexity import Protocol

    found = measure(
        checkpoint,
        text,
        Protocol(windows=windows, seq_len=seq_len, stride=stride),
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


def text_ids(checkpoint: Path, text: str, protocol: Protocol, *, trust_remote_code: bool) -> Tensor:
    """Token ids of a text, which has the windows that the protocol asks for.

    Raises:
        RotqError: the tokenizer or the text cannot be read, or the text is short.
    """
    from rotq.calibration.data import tokenize
    from rotq.calibration.texts import read_text
    from rotq.checkpoint.load import load_tokenizer

    content = read_text(text, split="test")
    ids_N = tokenize(content, load_tokenizer(checkpoint, trust_remote_code=trust_remote_code))
    protocol.cut(ids_N)
    return ids_N


def measure(
    checkpoint: Path,
    text: str,
    protocol: Protocol,
    *,
    reference: Path | None,
    device_map: str | None,
    dtype: str,
    trust_remote_code: bool,
) -> Evaluation:
    """Load a checkpoint and its reference, and score both on a text.

    Raises:
        RotqError: the checkpoint, the reference or the text cannot be read, or the text is short.
    """
    from rotq.checkpoint.load import load_model
    from rotq.evaluation.perplexity import evaluate

    for path in filter(None, (checkpoint, reference)):
        check_causal(path, trust_remote_code=trust_remote_code)
    # a text that is too short fails before a model is loaded
    ids_N = text_ids(checkpoint, text, protocol, trust_remote_code=trust_remote_code)
    models = [
        load_model(path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
        for path in (checkpoint, reference)
        if path is not None
    ]
    return evaluate(
        models[0],
        ids_N,
        protocol=protocol,
        reference=models[1] if reference is not None else None,
        on_window=show("window"),
    )
