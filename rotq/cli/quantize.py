"""``rotq quantize``: a model and a recipe in, a packed checkpoint out."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.eval_text import EvalText
from rotq.cli.failures import ignore_signals
from rotq.cli.loading import find, say, say_device
from rotq.cli.options import (
    FilePath,
    ModelName,
    Words,
    device_option,
    model_options,
    output_options,
    processes_option,
)
from rotq.cli.recipe_options import recipe_options
from rotq.errors import Stopped
from rotq.recipe import Recipe, write_yaml

if TYPE_CHECKING:
    from rotq.checkpoint.location import Location
    from rotq.report import JobReport, Progress


@click.command()
@click.argument("model", required=False, type=ModelName())
@recipe_options
@click.option("-o", "--output", type=FilePath(), help="Folder that will hold the checkpoint.")
@click.option("--print-config", is_flag=True, help="Print the resolved recipe and stop.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print layers, bits, memory, disk, and the time that a short measurement predicts; no "
    "weight is read, and what the job would refuse is refused.",
)
@click.option(
    "--resume",
    type=click.Choice(["auto", "required", "never"]),
    default="auto",
    show_default=True,
    help="Continue from OUTPUT.partial: where it fits, or else fail, or never.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an OUTPUT that rotq wrote, or an empty one, once the new one is complete.",
)
@processes_option(
    "Share the job among processes on this machine, a GPU or some of the cores each; "
    "several machines: accelerate launch -m rotq quantize ..."
)
@device_option
@model_options
@click.option(
    "--eval-text", type=Words(), metavar="FILE|ID", help="Evaluate before and after on this text."
)
@click.option(
    "--eval-windows",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Windows of 1024 tokens of --eval-text; 0 takes all.",
)
@click.option(
    "--profile",
    type=FilePath(),
    metavar="FILE",
    help="Write a trace of the job's phases for chrome://tracing or Perfetto, and print what each "
    "took.",
)
@output_options
def quantize(
    model: str | None,
    recipe: Recipe,
    recipe_file: Path | None,
    output: Path | None,
    print_config: bool,
    dry_run: bool,
    eval_text: str | None,
    eval_windows: int,
    profile: Path | None,
    num_processes: int,
    as_json: bool,
    **job: Any,
) -> None:
    """Quantize MODEL: a Hugging Face folder, a GGUF file, or ORG/NAME[@REVISION] of the hub.

    \b
    rotq quantize models/llama -c w3 -o out/llama-w3
    rotq quantize Qwen/Qwen3-8B -c w3 -o out/qwen-w3
    rotq quantize models/llama -c my.yaml --set weights.bits=4 --dry-run
    """
    if print_config:
        click.echo(write_yaml(recipe.to_dict()), nl=False)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'")
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o'")
    if profile is not None and dry_run:
        raise click.UsageError("--profile records a job, and --dry-run runs none")
    found = find(model)
    scored = None
    if eval_text is not None:
        common = {name: job[name] for name in ("device", "dtype", "trust_remote_code")}
        bos = recipe.calibration.bos
        scored = EvalText(model=found, text=eval_text, windows=eval_windows, bos=bos, **common)
    if dry_run:
        job["processes"] = num_processes
        _dry_run(found, recipe, output, scored, recipe_file, as_json=as_json, **job)
        return
    assert output is not None, "refused above"
    job["inputs"] = _inputs(recipe_file, eval_text)
    from rotq.processes import joined

    reads = job["inputs"] | {"the model": found.path, "the output": output}
    with joined(num_processes, sys.argv[1:]) as ranks:
        if not ranks.leads:
            _run(found, recipe, output, None, ranks=ranks, **job)
            return
        with _profiled(profile, reads):
            report = _run(found, recipe, output, scored, ranks=ranks, **job)
            if scored is not None:
                report = scored.after(report, output)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    from rotq.report.tables import job_table

    click.echo(job_table(report, output), nl=False)


def _dry_run(
    model: Location,
    recipe: Recipe,
    output: Path | None,
    scored: EvalText | None,
    recipe_file: Path | None,
    *,
    as_json: bool,
    resume: str,
    overwrite: bool,
    **options: Any,
) -> None:
    """Refuse what the job would refuse before its work, and show what it would cost."""
    from rotq.quantize.estimate import estimate
    from rotq.quantize.setup import chosen_device
    from rotq.report.tables import estimate_table

    if output is not None:
        from rotq.job.opening import find_place, job_inputs

        text = scored.text if scored is not None else None
        inputs = job_inputs(model.path, recipe, _inputs(recipe_file, text))
        find_place(output, resume=resume, overwrite=overwrite, inputs=inputs)
    with _usage():
        found = estimate(model, recipe, **options)
    if scored is not None:
        scored.check()
    if model.hub is not None:
        say([model.hub.account()])
    say_device(options["device"], str(chosen_device(options["device"], recipe)))
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        click.echo(estimate_table(found), nl=False)


def _inputs(recipe_file: Path | None, eval_text: str | None) -> dict[str, Path]:
    """What the command reads besides the model and its calibration text."""
    from rotq.disk.destination import named_file

    found = {
        "the recipe": recipe_file,
        "the evaluation text": None if eval_text is None else named_file(eval_text),
    }
    return {words: path for words, path in found.items() if path is not None}


@contextlib.contextmanager
def _profiled(file: Path | None, inputs: dict[str, Path]) -> Iterator[None]:
    """Record the phases of what runs inside, also where it fails; the table goes to stderr."""
    if file is None:
        yield
        return
    from rotq.phases import Recording
    from rotq.report.profile import profile_table, trace_file, write_trace

    path, recording = trace_file(file, inputs), Recording()
    try:
        with recording.listening("other"):
            yield
    finally:
        write_trace(recording, path)
        say([profile_table(recording)])


def _run(
    model: Location, recipe: Recipe, output: Path, scored: EvalText | None, **job: Any
) -> JobReport:
    from rotq.quantize.pipeline import quantize_model

    try:
        if scored is not None and not model.is_complete:
            scored.check()  # before the weights are fetched
        with _usage(), _interruptible(), _progress() as progress:
            settled = None if scored is None else functools.partial(_score, scored, progress)
            return quantize_model(model, recipe, output, progress=progress, settled=settled, **job)
    except KeyboardInterrupt:  # before or after the part of the job that keeps its blocks
        raise Stopped("stopped; the same command continues") from None


def _score(scored: EvalText, progress: Progress, dense: Path, is_new: bool) -> None:
    """Before the first block: the text is as it must be, and what the model itself has on it."""
    scored.check(dense)
    if is_new:
        progress.message(scored.before(dense))


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
    until the job has ended. A SIGINT that the shell has ignored stays ignored. Signals that
    come while the interpreter of a stopped process ends are ignored: its exit code stays.
    """

    over = False

    def stop(number: int, frame: object) -> None:
        if over:
            return
        atexit.unregister(ignore_signals)
        atexit.register(ignore_signals)
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        over = True  # before any call: a signal in the middle would leave the timer running
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
