"""``rotq eval kv``: what a packed KV cache costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.calibrate_kv import calibration_options, calibrator
from rotq.cli.eval import checked_protocol
from rotq.cli.kv_bits import kv_bits_option
from rotq.cli.kv_schemes import NamedSchemes
from rotq.cli.loading import find, load, placed_on, show
from rotq.cli.options import (
    FilePath,
    ModelName,
    Words,
    device_map_option,
    device_option,
    model_options,
    output_options,
    window_options,
)
from rotq.errors import RotqError

if TYPE_CHECKING:
    from torch import Tensor

    from rotq.evaluation.perplexity import Protocol
    from rotq.evaluation.quantized_history import KVScheme

TEXT = "text"
"""The task of scoring a text."""


@click.command("kv")
@click.argument("model", type=ModelName())
@click.option(
    "--kv",
    "names",
    metavar="SCHEME[,SCHEME...]",
    help="Presets to measure, and schemes of others: kivi-2, -3, -4, kvarn-k4v2, -k3v3, -k2v2, "
    "oscar-int2, vllm-tq3, -tq4.",
)
@kv_bits_option("names", beside=True)
@click.option(
    "--kv-calibration",
    type=FilePath(),
    metavar="FILE|none",
    help="File of rotq calibrate-kv, or none for constants that need no data; without it, schemes "
    "are calibrated now, and the result is kept in the user's cache folder.",
)
@click.option("--text", type=Words(), required=True, metavar="FILE|ID", help="As in rotq eval ppl.")
@window_options
@click.option("--sinks", type=click.IntRange(min=0), help="First tokens kept whole.")
@click.option("--recent", type=click.IntRange(min=0), help="Last tokens kept whole.")
@click.option(
    "--chunk",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Tokens of a forward pass, which see each other whole; 1 is decoding.",
)
@click.option(
    "--task",
    type=click.Choice([TEXT, "passkey", "needle", "drift"]),
    default=TEXT,
    show_default=True,
    help="Score the text; or find five digits or a sentence in it, with --windows prompts of "
    "--seq-len tokens at each of 5 depths; or write on behind --windows prompts of half of "
    "--seq-len, and count the tokens before the first that differs.",
)
@calibration_options(num_samples=4, seq_len=512)
@device_option
@device_map_option
@model_options
@output_options
def eval_kv(
    model: str,
    names: str | None,
    kv_calibration: Path | None,
    text: str,
    windows: int,
    seq_len: int,
    as_json: bool,
    device: str,
    placed: str | None,
    dtype: str,
    trust_remote_code: bool,
    sinks: int | None,
    recent: int | None,
    chunk: int,
    task: str,
    **options: Any,
) -> None:
    """What a packed KV cache costs MODEL on a text: one line of figures for each scheme.

    Every earlier token is quantized, as in decoding token by token. --json prints one object for
    each scheme, a line each.

    \b
    rotq eval kv models/llama --kv k3v3 --kv-calibration llama-kv.safetensors --text test.txt
    rotq eval kv models/llama --kv k3v3,kvarn-k3v3,turboquant --text test.txt --windows 4
    rotq eval kv models/llama --kv k3v3 --text test.txt --task passkey --seq-len 8192 --windows 1
    """
    from rotq.calibration.texts import read_text
    from rotq.calibration.tokenized import first_tokens, tokenize
    from rotq.evaluation.kv import evaluate_kv
    from rotq.evaluation.perplexity import Protocol
    from rotq.models.limits import limits_of

    if names is None:
        raise click.UsageError("Missing option '--kv' or '--kv-bits'.")
    named = NamedSchemes.parse(names, sinks, recent)
    placed_on(device, placed)
    content = read_text(text, split="test")
    loaded, tokenizer = load(
        find(model),
        device=device,
        placed=placed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    ids_N = tokenize(content, tokenizer)
    # what is refused or cut is so before calibration
    first = first_tokens(content, tokenizer, options["bos"])
    asked = Protocol(windows=windows, seq_len=seq_len, first=first)
    fitting = calibrator(loaded, tokenizer, **options)
    if task != TEXT:
        trial = _Trial(task=task, tokenizer=tokenizer, ids_N=ids_N, asked=asked, chunk=chunk)
        prompts = trial.prompts(loaded)
        schemes = named.find(loaded, kv_calibration, fitting)
        _print(trial.run(loaded, prompts, schemes), as_json)
        return
    protocol = checked_protocol(asked, limits_of(loaded), content, ids_N)
    schemes = named.find(loaded, kv_calibration, fitting)
    on_window = show("window")
    found = evaluate_kv(loaded, ids_N, schemes, protocol=protocol, chunk=chunk, on_window=on_window)
    _print(found, as_json)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A task that is no scoring of a text."""

    task: str
    tokenizer: Any
    ids_N: Tensor
    asked: Protocol
    """Windows are prompts, at each depth for what is to be found."""
    chunk: int

    @property
    def half(self) -> int:
        """Tokens of a prompt that is written on behind."""
        return max(2, self.asked.seq_len // 2)

    def prompts(self, model: Any) -> Any:
        """What is asked; refuses what cannot be done, before calibration."""
        from rotq.evaluation.haystacks import make_prompts
        from rotq.evaluation.kv_tasks import DRIFT
        from rotq.models.limits import limits_of

        if self.chunk != 1:
            raise click.UsageError(f"--task {self.task} is decoding; --chunk is for --task text")
        if not self.asked.windows:
            raise click.UsageError(f"--task {self.task}: --windows 0 is no number of prompts")
        if limits_of(model).cut(self.asked.seq_len, least=2) < self.asked.seq_len:
            raise RotqError(f"the model has fewer positions than --seq-len {self.asked.seq_len}")
        number, length = self.asked.windows, self.asked.seq_len
        if self.task == DRIFT:
            return replace(self.asked, seq_len=self.half).cut(self.ids_N)
        return make_prompts(self.task, self.tokenizer, self.ids_N, seq_len=length, number=number)

    def run(self, model: Any, prompts: Any, schemes: list[KVScheme]) -> list[Any]:
        """A row for each cache."""
        from rotq.evaluation.kv_tasks import DRIFT, find_answers, measure_drift

        on_prompt = show("prompt")
        if self.task == DRIFT:
            new_tokens = self.asked.seq_len - self.half
            return measure_drift(
                model, prompts, schemes, new_tokens=new_tokens, on_prompt=on_prompt
            )
        return find_answers(model, prompts, schemes, task=self.task, on_prompt=on_prompt)


def _print(found: list[Any], as_json: bool) -> None:
    rows = [evaluation.to_dict() for evaluation in found]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    from rotq.report.kv_tables import evaluation_table, task_table

    table = task_table(rows) if "task" in rows[0] else evaluation_table(rows)
    click.echo(table, nl=False)
