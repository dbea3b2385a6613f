"""``rotq eval ppl``: perplexity, and divergence from a reference model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.groups import Group
from rotq.cli.kv_option import PackedKV, kv_options, named_scheme
from rotq.cli.loading import (
    check_causal,
    check_one_place,
    device_map,
    find,
    placed_on,
    run_dtype,
    say,
    say_computed,
    say_device,
    shared_by,
    show,
)
from rotq.cli.options import (
    ModelName,
    bos_option,
    device_map_option,
    device_option,
    model_options,
    output_options,
    processes_option,
    text_option,
    window_options,
)

if TYPE_CHECKING:
    from torch import Tensor

    from rotq.calibration.limits import Limits
    from rotq.calibration.texts import Text
    from rotq.checkpoint.location import Location
    from rotq.checkpoint.location import ModelName as Named
    from rotq.evaluation.perplexity import Evaluation, Protocol
    from rotq.ranks import Ranks


@click.group("eval", cls=Group, no_args_is_help=False)
def eval_group() -> None:
    """Measure a checkpoint."""


@eval_group.command()
@click.argument("checkpoint", type=ModelName())
@text_option
@window_options
@click.option(
    "--stride",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens between window starts, each token scored once; 0: windows do not overlap.",
)
@bos_option("auto")
@click.option("--reference", type=ModelName(), help="Original model, for KL and top-1.")
@kv_options
@device_option
@device_map_option
@processes_option(
    "Share the windows among processes, each with a model and a GPU or cores of its own; "
    "several machines: accelerate launch -m rotq eval ppl ..."
)
@model_options
@output_options
def ppl(
    checkpoint: str,
    text: str,
    windows: int,
    seq_len: int,
    stride: int,
    bos: str,
    reference: str | None,
    kv: str | None,
    kv_calibration: Path | None,
    device: str,
    placed: str | None,
    num_processes: int,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Perplexity of CHECKPOINT on a text: dense, compressed-tensors, rotq or GGUF.

    With --kv, keys and values are packed too: every earlier token is read from its codes, as in
    rotq eval kv. --reference keeps its cache whole, so that KL is of weights and cache at once.

    \b
    rotq eval ppl out/llama-w3 --text test.txt --reference models/llama
    rotq eval ppl out/llama-w3 --text test.txt --windows 0 --seq-len 2048 --stride 512
    rotq eval ppl out/llama-w3 --kv k3v3 --text test.txt --reference models/llama
    """
    if stride >= seq_len:
        raise click.UsageError(f"--stride {stride} is not below --seq-len {seq_len}")
    packed = named_scheme(kv, kv_calibration)
    check_one_place(num_processes, placed)
    from rotq.evaluation.perplexity import Protocol

    protocol = Protocol(windows=windows, seq_len=seq_len, stride=stride)
    with shared_by(num_processes) as ranks:
        chosen = placed_on(ranks.device(device), placed)
        found = measure(
            find(checkpoint),
            text,
            protocol,
            bos=bos,
            reference=None if reference is None else find(reference),
            packed=packed,
            device_map=device_map(chosen),
            before=lambda: say_device(device if placed is None else placed, chosen),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            ranks=ranks,
        )
    if not ranks.leads:
        return
    values = found.to_dict() | ({} if packed is None else {"kv": packed.facts()})
    if as_json:
        click.echo(json.dumps(values))
        return
    from rotq.report.tables import evaluation_table

    click.echo(evaluation_table(values), nl=False)


def scored_tokens(
    models: Sequence[Location], text: str, protocol: Protocol, *, bos: str, trust_remote_code: bool
) -> tuple[Tensor, Protocol]:
    """Token ids of a text for the first of some models, and the protocol within the limits of all.

    Raises:
        RotqError: a model predicts no next token, the tokenizer or the text cannot be read, the
            text is short, or it holds a token that a model does not know.
    """
    from rotq.calibration.limits import Limits
    from rotq.calibration.texts import read_text
    from rotq.calibration.tokenized import first_tokens, tokenize
    from rotq.checkpoint.limits import read_limits
    from rotq.checkpoint.load import load_tokenizer

    limits = Limits()
    for model in models:
        check_causal(model, trust_remote_code=trust_remote_code)
        limits = limits.within(read_limits(model, trust_remote_code=trust_remote_code))
    content = read_text(text, split="test")
    tokenizer = load_tokenizer(models[0], trust_remote_code=trust_remote_code)
    ids_N = tokenize(content, tokenizer)
    begun = replace(protocol, first=first_tokens(content, tokenizer, bos))
    return ids_N, checked_protocol(begun, limits, content, ids_N)


def measure(
    checkpoint: Named,
    text: str,
    protocol: Protocol,
    *,
    bos: str = "auto",
    reference: Named | None,
    packed: PackedKV | None = None,
    device_map: str | None,
    dtype: str,
    trust_remote_code: bool,
    before: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Load a checkpoint and its reference, and score both on a text.

    Args:
        bos: What windows begin with: "auto", "yes" or "no".
        packed: The checkpoint's keys and values are, where it is given; not the reference's.
        device_map: As for ``load_model``.
        before: Called when nothing is left to refuse.
        ranks: The processes that call this with the same arguments, and share the windows;
            alone where left out.

    Raises:
        RotqError: the checkpoint, the reference or the text cannot be read, or the text is short.
    """
    from rotq.checkpoint.gguf import read_once
    from rotq.checkpoint.load import load_model, load_tokenizer
    from rotq.checkpoint.location import locate
    from rotq.evaluation.perplexity import evaluate
    from rotq.ranks import ALONE

    found = [locate(model) for model in (checkpoint, reference) if model is not None]
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with read_once(*(model.path for model in found)):
        # what is refused or cut is so before a model is loaded
        ids_N, within = scored_tokens(found, text, protocol, bos=bos, **options)
        before()
        models = [
            load_model(model, dtype=run_dtype(dtype), device_map=device_map, **options)
            for model in found
        ]
    say_computed(dtype, *zip(found, models, strict=True))
    attention = None
    if packed is not None:
        tokenizer = load_tokenizer(found[0], **options)
        attention = packed.attention(models[0], tokenizer)
    return evaluate(
        models[0],
        ids_N,
        protocol=within,
        reference=models[1] if reference is not None else None,
        attention=attention,
        on_window=show("window"),
        ranks=ranks or ALONE,
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
