"""``rotq serve-kv``: an OpenAI-compatible server on the packed cache."""

from __future__ import annotations

import atexit
import ipaddress
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from rotq.cli.failures import ignore_signals
from rotq.cli.kv_bits import kv_bits_option
from rotq.cli.loading import load_to_serve
from rotq.cli.options import ModelName, debug_wanted, model_options, output_options
from rotq.cli.serve_options import (
    checked_settings,
    find_calibration,
    named_caches,
    require_packages,
    serving_options,
)
from rotq.errors import RotqError

KEY_VARIABLE = "ROTQ_API_KEY"


@click.command("serve-kv")
@click.argument("model", type=ModelName())
@click.option(
    "--kv",
    "name",
    default="k3v3",
    show_default=True,
    metavar="PRESET|dense",
    help="Scheme of the cache; dense is the model's own precision.",
)
@kv_bits_option("name")
@serving_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes any that is free.",
)
@click.option("--model-name", help="As clients call it; if left out, the folder's name or hub id.")
@click.option(
    "--max-queue",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Sequences that wait; beyond it 429.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens of a sequence; 0 takes what the model and the cache allow.",
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds of a request, queueing included.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that running requests get after SIGTERM.",
)
@model_options
@output_options
def serve_kv(
    model: str,
    name: str,
    kv_calibration: Path | None,
    kv_memory: str,
    sinks: int | None,
    device: str,
    host: str,
    port: int,
    model_name: str | None,
    as_json: bool,
    dtype: str,
    trust_remote_code: bool,
    **limits: Any,
) -> None:
    """Serve MODEL with OpenAI's API, its KV cache packed into a fixed number of bytes.

    Prints one line when it takes requests: the address and what is served; with --json as an
    object. If the environment has ROTQ_API_KEY, clients must send it as their API key. SIGTERM
    lets what runs end, then exits with 0.

    \b
    rotq serve-kv models/llama --kv-calibration llama-kv.safetensors --kv-memory 4GiB
    rotq serve-kv out/llama-w3 --kv k4v3 --port 8080
    """
    require_packages("fastapi", "uvicorn", "prometheus_client")
    spec, *others = named_caches(name, kv_calibration, sinks)
    if others:
        raise click.UsageError(f"--kv {name}: a server has one scheme")
    settings = checked_settings(kv_memory=kv_memory, **limits)
    key = _key()
    local = _is_loopback(host)
    if not local and key is None:
        click.echo(f"warning: {host} is open to others and {KEY_VARIABLE} is not set", err=True)
    place, loaded, tokenizer = load_to_serve(
        model, [spec], device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    calibration = find_calibration(loaded, tokenizer, spec, kv_calibration)

    from rotq.serve.run import build_server, run

    served = build_server(
        loaded,
        tokenizer,
        calibration,
        settings,
        name=model_name or place.title,
        api_key=key,
        local=local,
        on_error=_reporter(debug_wanted(click.get_current_context())),
    )

    def ready(port: int) -> None:
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        click.echo(_ready_line(address, served.facts, as_json))

    # until it runs the server itself answers signals
    atexit.register(ignore_signals)
    run(served, host, port, settings, on_ready=ready)


def _key() -> str | None:
    """The key that clients must send; None if the environment has none.

    Raises:
        click.UsageError: it is there, and nobody could send it: empty, or with spaces at its ends.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key.strip() or key != key.strip() or not key.isprintable():
        what = "has spaces or line ends that no client can send" if key.strip() else "is empty"
        raise click.UsageError(
            f"{KEY_VARIABLE} {what}; set a key, or unset it to serve without one"
        )
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _ready_line(address: str, facts: dict[str, Any], as_json: bool) -> str:
    if as_json:
        return json.dumps({"address": address, **facts})
    warm, refused = facts["warm_up_seconds"], facts["cuda_graph_refused"]
    return (
        f"{facts['model']} at {address} - cache {facts['kv']}, "
        f"{facts['page_bits_per_element']:.3f} bits per element, "
        f"{facts['capacity_tokens']} tokens, {facts['max_batch']} sequences in passes of "
        f"{facts['rows']}"
        + ("" if warm is None else f", kernels compiled in {warm:.0f} s")
        + (", steps in a CUDA graph" if facts["cuda_graph"] else "")
        + ("" if refused is None else f", steps in no CUDA graph: {refused}")
    )


def _reporter(debug: bool) -> Callable[[Exception], None]:
    def report(error: Exception) -> None:
        name = "" if isinstance(error, RotqError) else f"{type(error).__name__}: "
        line = " ".join(f"{name}{error}".split())
        click.echo(f"rotq: error: {line}", err=True)
        if debug:
            traceback.print_exception(error)

    return report
