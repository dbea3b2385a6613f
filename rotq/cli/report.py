"""``rotq report``: checkpoints as one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.compared import Comparison, Loading, Text, check_once, compare_all, job_report
from rotq.cli.kv_option import PackedKV, kv_options, named_scheme
from rotq.cli.loading import find
from rotq.cli.options import (
    FilePath,
    ModelName,
    Seed,
    Words,
    bos_option,
    device_option,
    model_options,
    output_options,
    window_options,
)
from rotq.cli.pages import page_to_write, write_page

if TYPE_CHECKING:
    from torch import Tensor

    from rotq.checkpoint.location import Location
    from rotq.evaluation.perplexity import Protocol

_PROMPT_TOKENS = 48


@click.command("report")
@click.argument("checkpoints", type=ModelName(), nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=FilePath(dir_okay=False),
    required=True,
    help="Page to write; one that exists is replaced if rotq wrote it.",
)
@click.option("--reference", type=ModelName(), help="The original model; with --text, for quality.")
@click.option("--text", type=Words(), metavar="FILE|ID", help="As in rotq eval ppl.")
@window_options
@bos_option("auto")
@click.option(
    "--new-tokens",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Of the sample that each model writes behind the start of the text; 0 leaves it out.",
)
@click.option(
    "--seed", type=Seed(), default=0, show_default=True, help="Of the draws behind intervals."
)
@kv_options
@device_option
@model_options
@output_options
def report_command(
    checkpoints: tuple[str, ...],
    output: Path,
    reference: str | None,
    text: str | None,
    windows: int,
    seq_len: int,
    bos: str,
    new_tokens: int,
    seed: int,
    kv: str | None,
    kv_calibration: Path | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Draw CHECKPOINTS as one HTML page that needs nothing else: no network, no script.

    From their own reports: what was done, error and bits of each layer, flatness. With --reference
    and --text also what rotq compare measures, KL over positions, and a text side by side; with
    --kv also the error of each layer's attention on a packed cache.

    \b
    rotq report out/w3 -o w3.html
    rotq report out/w3 out/w4 -o page.html --reference models/llama --text test.txt --kv k3v3
    """
    from rotq.report.page import Page, Sample

    check_once(checkpoints)
    if (reference is None) != (text is None):
        raise click.UsageError("--reference and --text go together")
    packed = named_scheme(kv, kv_calibration)
    if packed is not None and reference is None:
        raise click.UsageError("--kv needs --reference and --text")
    read = [*checkpoints, *([] if reference is None else [reference])]
    path = page_to_write(output, read, text)
    places = [find(name) for name in checkpoints]
    jobs = {name: job_report(place) for name, place in zip(checkpoints, places, strict=True)}
    measured, found = _Measured(packed, new_tokens), Comparison()
    if reference is not None and text is not None:
        from rotq.evaluation.perplexity import Protocol

        protocol = Protocol(windows=windows, seq_len=seq_len)
        original = find(reference)
        measured.tokenizer_of(original, trust_remote_code=trust_remote_code)
        found = compare_all(
            checkpoints,
            places,
            (reference, original),
            Text(source=text, protocol=protocol, bos=bos, seed=seed),
            Loading(device=device, dtype=dtype, trust_remote_code=trust_remote_code),
            watched=measured,
        )
    page = Page(
        title=f"rotq: {', '.join(checkpoints)}",
        jobs=jobs,
        comparison=found.report or None,
        positions=found.positions,
        kv=measured.kv_errors,
        kv_preset=kv or "",
        sample=Sample(prompt=measured.prompt, texts=measured.texts) if measured.texts else None,
    )
    size = write_page(path, page)
    facts = {"output": str(output), "bytes": size, "checkpoints": list(checkpoints)}
    click.echo(json.dumps(facts) if as_json else f"{output}: {size / 1e3:.0f} kB")


class _Measured:
    """What is taken of each model while it is loaded, beside its scores."""

    def __init__(self, packed: PackedKV | None, new_tokens: int) -> None:
        self.packed, self.new_tokens = packed, new_tokens
        self.kv_errors: dict[str, list[float]] = {}
        self.texts: dict[str, str] = {}
        self.prompt = ""
        self._tokenizer: Any = None

    def tokenizer_of(self, model: Location, *, trust_remote_code: bool) -> None:
        from rotq.checkpoint.load import load_tokenizer

        self._tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)

    def __call__(self, name: str, model: Any, ids_N: Tensor, protocol: Protocol) -> None:
        from rotq.evaluation.continuation import continuation
        from rotq.evaluation.kv import evaluate_kv

        if self.new_tokens:
            prompt_T = protocol.cut(ids_N)[0][: min(_PROMPT_TOKENS, protocol.seq_len // 2)]
            self.prompt = str(self._tokenizer.decode(prompt_T.tolist(), skip_special_tokens=True))
            self.texts[name] = continuation(
                model, self._tokenizer, prompt_T, tokens=self.new_tokens
            )
        if self.packed is not None:
            self.packed.attention(model, self._tokenizer)
            assert self.packed.scheme is not None
            [found] = evaluate_kv(model, ids_N, [self.packed.scheme], protocol=protocol)
            self.kv_errors[name] = found.attention_error
