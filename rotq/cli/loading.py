"""How commands load models: one loader, the checks before it, and progress on a terminal.

Everything heavy is imported in the functions: ``rotq -h`` loads no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from rotq.errors import RotqError


def load(
    path: Path, *, dtype: str, trust_remote_code: bool, device_map: str | None = None
) -> tuple[Any, Any]:
    """A model and its tokenizer; the tokenizer first, as it fails sooner.

    Args:
        path: As for ``load_model``.
        dtype: Of the computation; ``auto`` is the checkpoint's.
        trust_remote_code: Run the code that the model brings.
        device_map: As accelerate takes it; None for the CPU.

    Raises:
        RotqError: one of them cannot be read.
    """
    from rotq.checkpoint.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model = load_model(
        path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )
    return model, tokenizer


def load_on(path: Path, device: str, *, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """As ``load``, on ``cpu`` or ``cuda``.

    Raises:
        RotqError: this machine has no such device, or see ``load``.
    """
    from rotq.devices import usable_device

    usable_device(device)
    return load(
        path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device_map=None if device == "cpu" else device,
    )


def check_device_map(name: str | None) -> None:
    """Refuse, before anything is read, a place for the model that this machine does not have.

    Raises:
        RotqError: neither a device, nor a way to spread a model that accelerate knows.
    """
    from rotq.devices import usable_device

    if name in (None, "auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        known = usable_device(name).type != "meta"
    except RotqError:
        known = False
    if not known:
        raise RotqError(
            f"--device-map {name}: neither a device of this machine that torch can use nor auto"
        )


def check_causal(path: Path, *, trust_remote_code: bool) -> None:
    """Refuse a model that predicts no next token, by its configuration.

    Raises:
        RotqError: it fills in masks.
    """
    from rotq.checkpoint.configuration import load_config
    from rotq.checkpoint.gguf import find_gguf
    from rotq.models.task import is_masked

    if not path.exists() or find_gguf(path) is not None:
        return
    if is_masked(load_config(path, trust_remote_code=trust_remote_code)):
        raise RotqError(f"{path} is a masked language model; score it with rotq eval pll")


def say(notes: Iterable[str]) -> None:
    """Lines on stderr, for what is done otherwise than was asked; empty ones are left out."""
    for note in filter(None, notes):
        click.echo(note, err=True)


def show(label: str) -> Callable[[int, int], None] | None:
    """A line of progress that is told ``done, total``; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    return lambda done, total: click.echo(f"\r{label} {done}/{total}", nl=done == total, err=True)
