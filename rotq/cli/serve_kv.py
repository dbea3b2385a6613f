"""``rotq serve-kv``: an OpenAI-compatible server on the packed cache."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.kv import named_specs
from rotq.cli.options import Command, debug_wanted, model_options, output_options
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.kv.calibration_file import KVCalibration
    from rotq.serve.settings import Settings

KEY_VARIABLE = "ROTQ_API_KEY"


def serving_options(command: Command) -> Command:
    """Of the cache and the batch: what ``serve-kv`` and ``bench serve`` share."""
    for option in (
        click.option(
            "--device",
            type=click.Choice(["cpu", "cuda"]),
            default="cpu",
            show_default=True,
            help="Where the model runs.",
        ),
        click.option(
            "--max-batch",
            type=click.IntRange(1, 4096),
            default=32,
            show_default=True,
            help="Sequences that run together.",
        ),
        click.option(
            "--kv-memory",
            default="1GiB",
            show_default=True,
            metavar="SIZE",
            help="Bytes of the cache, allocated at start: 512MiB, 4GB, ...",
        ),
        click.option(
            "--kv-calibration",
            type=click.Path(path_type=Path),
            help="File of rotq calibrate-kv; without it, constants that need no data.",
        ),
    ):
        command = option(command)
    return command


@click.command("serve-kv")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--kv",
    "name",
    default="k3v3",
    show_default=True,
    metavar="PRESET|dense",
    help="Scheme of the cache; dense is the model's own precision.",
)
@serving_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes any that is free.",
)
@click.option("--model-name", help="As clients call it; the folder's name if left out.")
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
    model: Path,
    name: str,
    kv_calibration: Path | None,
    kv_memory: str,
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
    settings = checked_settings(kv_memory=kv_memory, **limits)
    key = os.environ.get(KEY_VARIABLE) or None
    local = _is_loopback(host)
    if not local and key is None:
        click.echo(f"warning: {host} is open to others and {KEY_VARIABLE} is not set", err=True)
    loaded, tokenizer = load_on(model, device, dtype=dtype, trust_remote_code=trust_remote_code)
    calibration = find_calibration(loaded, name, kv_calibration)

    from rotq.serve.run import assemble, run

    served = assemble(
        loaded,
        tokenizer,
        calibration,
        settings,
        name=model_name or model.absolute().name,
        api_key=key,
        local=local,
        on_error=_reporter(debug_wanted(click.get_current_context())),
    )

    def ready(port: int) -> None:
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        click.echo(_ready_line(address, served.facts, as_json))

    run(served, host, port, settings, on_ready=ready)


def find_calibration(model: Any, name: str, file: Path | None) -> KVCalibration | None:
    """Constants of a scheme for a model, and a line where they are not calibrated; None for dense.

    Raises:
        RotqError: the file does not serve the scheme, or the model has nothing to pack.
    """
    from rotq.kv.calibrate import data_oblivious
    from rotq.kv.calibration_file import load_calibration
    from rotq.serve.settings import DENSE

    if name == DENSE:
        if file is not None:
            raise click.UsageError("--kv dense has no calibration")
        return None
    spec, *others = named_specs(name)
    if others:
        raise click.UsageError(f"--kv {name}: a server has one scheme")
    if file is not None:
        held = load_calibration(file, model.config)
        if not held.serves(spec):
            raise RotqError(f"{file} was fitted for {held.spec.name} and does not serve {name}")
        return held.under(spec)
    try:
        found = data_oblivious(model.config, spec)
    except ValueError as error:
        raise RotqError(f"{error}; give --kv-calibration") from None
    except RotqError as error:
        raise RotqError(f"{error}; --kv dense serves it unpacked") from None
    if spec.needs_calibration:
        click.echo(
            f"{name}: no --kv-calibration, so constants that need no data ({found.spec.name}); "
            "rotq calibrate-kv makes better ones",
            err=True,
        )
    return found


def load_on(path: Path, device: str, *, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model on a device, and its tokenizer."""
    import torch

    from rotq.checkpoint.load import load_model, load_tokenizer

    if device == "cuda" and not torch.cuda.is_available():
        raise RotqError("--device cuda: this machine has none that torch can use")
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model = load_model(
        path,
        dtype=dtype,
        device_map=None if device == "cpu" else device,
        trust_remote_code=trust_remote_code,
    )
    return model, tokenizer


def checked_settings(*, kv_memory: str, **limits: Any) -> Settings:
    """click.UsageError where a limit is out of range."""
    from rotq.serve.settings import Settings, parse_size

    try:
        return Settings(kv_memory=parse_size(kv_memory), **limits)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def require_packages(*names: str) -> None:
    """RotqError where one is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RotqError(f"{', '.join(missing)} is not installed: pip install 'rotq[serve]'")


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
    return (
        f"{facts['model']} at {address} - cache {facts['kv']}, "
        f"{facts['page_bits_per_element']:.3f} bits per element, "
        f"{facts['capacity_tokens']} tokens, {facts['max_batch']} sequences in passes of "
        f"{facts['rows']}"
    )


def _reporter(debug: bool) -> Callable[[Exception], None]:
    def report(error: Exception) -> None:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        click.echo(f"rotq: error: {line}", err=True)
        if debug:
            traceback.print_exception(error)

    return report
