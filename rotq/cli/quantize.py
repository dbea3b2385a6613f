"""``rotq quantize``: a model and a recipe in, a packed checkpoint out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import yaml

from rotq.cli.eval import measure
from rotq.cli.loading import check_causal
from rotq.cli.options import model_options, output_options, recipe_options
from rotq.errors import Stopped
from rotq.recipe import Recipe

if TYPE_CHECKING:
    from rotq.report import JobReport, Progress


@click.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@recipe_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder that will hold the checkpoint."
)
@click.option("--print-config", is_flag=True, help="Print the resolved recipe and stop.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print layers, bits, memory and disk; no weight is read, and what the job would refuse "
    "is refused.",
)
@click.option(
    "--resume",
    type=click.Choice(["auto", "required", "never"]),
    default="auto",
    show_default=True,
    help="Continue from OUTPUT.partial: where it fits, or else fail, or never.",
)
@click.option("--overwrite", is_flag=True, help="Replace an OUTPUT that exists.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where."
)
@model_options
@click.option("--eval-text", metavar="FILE|ID", help="Evaluate before and after on this text.")
@click.option(
    "--eval-windows",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Windows of 1024 tokens of --eval-text; 0 takes all.",
)
@output_options
def quantize(
    model: Path | None,
    recipe: Recipe,
    output: Path | None,
    print_config: bool,
    dry_run: bool,
    eval_text: str | None,
    eval_windows: int,
    as_json: bool,
    **job: Any,
) -> None:
    """Quantize MODEL, a Hugging Face folder or a folder with one GGUF file.

    \b
    rotq quantize models/llama -c w3 -o out/llama-w3
    rotq quantize models/llama -c my.yaml --set weights.bits=4 --dry-run
    """
    if print_config:
        click.echo(yaml.safe_dump(recipe.to_dict(), sort_keys=False), nl=False)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'")
    if dry_run:
        options = {name: job[name] for name in ("dtype", "trust_remote_code")}
        _dry_run(model, recipe, as_json=as_json, **options)
        return
    if output is None:
        raise click.UsageError("Missing option '-o'")
    if eval_text is not None:
        check_causal(model, trust_remote_code=job["trust_remote_code"])
    report = _run(model, recipe, output, **job)
    if eval_text is not None:
        report = _evaluate(report, model, output, eval_text, eval_windows, job)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    from rotq.report.tables import job_table

    click.echo(job_table(report, output), nl=False)


def _dry_run(model: Path, recipe: Recipe, *, as_json: bool, **options: Any) -> None:
    from rotq.quantize.estimate import estimate
    from rotq.report.tables import estimate_table

    with _usage():
        found = estimate(model, recipe, **options)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        click.echo(estimate_table(found), nl=False)


def _run(model: Path, recipe: Recipe, output: Path, **job: Any) -> JobReport:
    from rotq.quantize.pipeline import quantize_model

    try:
        with _usage(), _interruptible(), _progress() as progress:
            return quantize_model(model, recipe, output, progress=progress, **job)
    except KeyboardInterrupt:  # before or after the part of the job that keeps its blocks
        raise Stopped("stopped; the same command continues") from None


def _evaluate(
    report: JobReport, model: Path, output: Path, text: str, windows: int, job: dict[str, Any]
) -> JobReport:
    """Score the checkpoint against the source, and put the figures into its report.json."""
    from rotq.checkpoint.files import write_json
    from rotq.evaluation.perplexity import Protocol

    found = measure(
        output,
        text,
        Protocol(windows=windows),
        reference=model,
        device_map=None if job["device"] == "cpu" else job["device"],
        dtype=job["dtype"],
        trust_remote_code=job["trust_remote_code"],
    )
    report = dataclasses.replace(report, evaluation={"text": text, **found.to_dict()})
    write_json(output / "report.json", report.to_dict())
    return report


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """A recipe that does not fit the model is a usage error."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _progress() -> Progress:
    from rotq.report.progress import PlainProgress, RichProgress

    return RichProgress() if sys.stderr.isatty() else PlainProgress()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, as schedulers send it, stops the job the way Ctrl-C does.

    Python drops what a handler raises while a finalizer runs, so it is raised again every second
    until the job has ended. A SIGINT that the shell has ignored stays ignored.
    """

    def stop(number: int, frame: object) -> NoReturn:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
