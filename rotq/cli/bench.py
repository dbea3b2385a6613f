"""``rotq bench``: speed and memory."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rotq.cli.groups import Group
from rotq.cli.loading import load_to_serve
from rotq.cli.options import ModelName, Seed, model_options, output_options
from rotq.cli.serve_options import checked_settings, find_calibration, named_caches, serving_options


@click.group("bench", cls=Group, no_args_is_help=False)
def bench_group() -> None:
    """Measure speed and memory."""


@bench_group.command("serve")
@click.argument("model", type=ModelName())
@click.option(
    "--kv",
    "names",
    default="k3v3,dense",
    show_default=True,
    metavar="PRESET|dense[,...]",
    help="Caches to measure, one after the other.",
)
@click.option(
    "--requests", type=click.IntRange(min=1), default=32, show_default=True, help="In all."
)
@click.option(
    "--clients",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Requests under way at once.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Of the longest prompt; the shortest has half of them.",
)
@click.option(
    "--output-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Of every answer.",
)
@click.option("--seed", type=Seed(), default=0, show_default=True, help="Of the prompts.")
@serving_options
@model_options
@output_options
def bench_serve(
    model: str,
    names: str,
    requests: int,
    clients: int,
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
    kv_calibration: Path | None,
    kv_memory: str,
    sinks: int | None,
    max_batch: int,
    prefill_chunk: int,
    device: str,
    as_json: bool,
    dtype: str,
    trust_remote_code: bool,
) -> None:
    """Throughput, latencies and cache bytes of rotq serve-kv's engine, for several caches.

    Every cache gets the same requests and the same memory. --json prints one object for each
    cache, a line each.

    \b
    rotq bench serve models/llama --kv k3v3,dense --kv-memory 64MiB --clients 32
    """
    settings = checked_settings(
        kv_memory=kv_memory,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
        max_queue=clients,
    )
    specs = named_caches(names, kv_calibration, sinks)
    _, loaded, tokenizer = load_to_serve(
        model, specs, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )

    from rotq.serve.bench import Load, measure

    caches = [find_calibration(loaded, tokenizer, spec, kv_calibration) for spec in specs]
    load = Load(
        requests=requests,
        clients=clients,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=seed,
    )
    found = []
    for calibration in caches:
        found.append(measure(loaded, calibration, settings, load, tokenizer.decode).to_dict())
        if as_json:
            click.echo(json.dumps(found[-1]))
    if not as_json:
        from rotq.report.serve_tables import bench_table

        click.echo(bench_table(found), nl=False)
