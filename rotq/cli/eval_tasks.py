"""``rotq eval tasks``: downstream tasks, through lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rotq.cli.kv_option import kv_options, named_scheme
from rotq.cli.loading import check_causal, check_one_place, find, load, placed_on, shared_by
from rotq.cli.options import (
    FilePath,
    ModelName,
    Words,
    device_map_option,
    device_option,
    model_options,
    output_options,
    processes_option,
)


@click.command("tasks")
@click.argument("model", type=ModelName())
@click.option(
    "--tasks",
    "names",
    type=Words(),
    required=True,
    metavar="TASK[,TASK...]",
    help="Of lm-eval, or files of --task-files.",
)
@click.option(
    "--task-files",
    type=FilePath(exists=True, file_okay=False),
    metavar="DIR",
    help="Folder with TASK.jsonl (query, choices, gold; or context, continuation), which need no "
    "hub, and with lm-eval's own YAML definitions.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Rows of each task; all without it.")
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), help="Examples before a row; else the task's own."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Rows of a forward pass.",
)
@kv_options
@device_option
@device_map_option
@processes_option(
    "Share the questions among processes, each with a model and a GPU or cores of its own; "
    "several machines: accelerate launch -m rotq eval tasks ..."
)
@model_options
@output_options
def eval_tasks(
    model: str,
    names: str,
    task_files: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    kv: str | None,
    kv_calibration: Path | None,
    device: str,
    placed: str | None,
    num_processes: int,
    dtype: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Score MODEL on tasks, with standard errors; figures are lm-eval's own.

    MODEL is anything that rotq loads: dense, compressed-tensors, rotq or GGUF. With --kv, keys and
    values are packed, and every earlier token is read from its codes. pip install 'rotq[tasks]'

    \b
    rotq eval tasks out/llama-w3 --tasks arc_easy,piqa,lambada_openai --limit 200
    rotq eval tasks out/llama-w3 --tasks arc_easy --task-files data/ --kv k3v3
    """
    from rotq.evaluation.task_files import harness_version, load_tasks
    from rotq.evaluation.tasks import score_tasks

    packed = named_scheme(kv, kv_calibration)
    check_one_place(num_processes, placed)
    placed_on(device, placed)
    wanted = list(dict.fromkeys(filter(None, (name.strip() for name in names.split(",")))))
    library = f"lm-eval {harness_version()}"
    place = find(model)
    check_causal(place, trust_remote_code=trust_remote_code)
    try:
        tasks = load_tasks(wanted, task_files)
    except ValueError as error:
        raise click.UsageError(f"--tasks: {error}") from None
    with shared_by(num_processes) as ranks:
        loaded, tokenizer = load(
            place,
            device=ranks.device(device),
            placed=placed,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        history = None if packed is None else packed.attention(loaded, tokenizer)
        scores = score_tasks(
            loaded,
            tokenizer,
            tasks,
            limit=limit,
            shots=num_fewshot,
            batch_size=batch_size,
            history=history,
            calibration=None if packed is None else packed.calibration,
            ranks=ranks,
        )
    if not ranks.leads:
        return
    found: dict[str, Any] = {"model": model, "library": library, "limit": limit}
    found |= {} if packed is None else {"kv": packed.facts()}
    found["tasks"] = [score.to_dict() for score in scores]
    if as_json:
        click.echo(json.dumps(found))
        return
    from rotq.report.task_tables import task_table

    click.echo(task_table(found), nl=False)
