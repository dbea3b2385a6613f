"""How commands load models: one loader, the checks before it, and progress on a terminal.

Everything heavy is imported in the functions: ``rotq -h`` loads no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from rotq.devices import AUTO
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.checkpoint.hub import HubModel
    from rotq.checkpoint.location import Location
    from rotq.kv.presets import KVSpec
    from rotq.ranks import Ranks


@contextmanager
def shared_by(number: int) -> Iterator[Ranks]:
    """This process among ``number`` of the same command; all but the leader say nothing.

    Raises:
        RotqError: see ``joined``.
    """
    from rotq.processes import joined

    with joined(number, sys.argv[1:]) as ranks, ExitStack() as silence:
        if not ranks.leads:
            nowhere = silence.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        yield ranks


def check_one_place(number: int, placed: str | None) -> None:
    """Refuse to spread one model over devices where each of several processes loads one.

    Raises:
        click.UsageError: both are asked for.
    """
    from rotq.processes import launched

    if placed is not None and (number > 1 or launched(os.environ)):
        raise click.UsageError("--device-map spreads one model; several processes load one each")


def find(model: str) -> Location:
    """The checkpoint of a name, and a line that says which commit of the hub it is.

    Raises:
        RotqError: there is none, or see ``locate``.
    """
    from rotq.checkpoint.location import locate

    found = locate(model)
    say_commit(found.hub)
    return found


def say_commit(hub: HubModel | None) -> None:
    """A line for a checkpoint of the hub."""
    if hub is not None:
        why = f", from the cache: {hub.unreached}" if hub.unreached else ""
        say([f"{hub.name}: commit {hub.commit}{why}"])


def choose(device: str, *, in_double: str = "") -> str:
    """Where a command computes, as torch spells it with its number.

    Raises:
        RotqError: this machine has no such device, or see ``choose_device``.
    """
    from rotq.devices import choose_device

    return str(choose_device(device, in_double=in_double))


def placed_on(device: str, placed: str | None) -> str:
    """Where a command computes: ``--device``, or else what ``--device-map`` says.

    Raises:
        click.UsageError: both are given.
        RotqError: this machine has no such device, or accelerate no such way.
    """
    if placed is None:
        return choose(device)
    if device != AUTO:
        raise click.UsageError("give either --device or --device-map")
    check_device_map(placed)
    return placed


def check_device_map(name: str) -> None:
    """Refuse, before anything is read, a place for the model that this machine does not have.

    Raises:
        RotqError: neither a device, nor a way to spread a model that accelerate knows.
    """
    from rotq.devices import usable_device

    if name in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        known = usable_device(name).type != "meta"
    except RotqError:
        known = False
    if not known:
        raise RotqError(
            f"--device-map {name}: neither a device of this machine that torch can use nor auto"
        )


def load(
    model: Location,
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    placed: str | None = None,
    in_double: str = "",
    in_integers: bool = False,
) -> tuple[Any, Any]:
    """A model and its tokenizer; the tokenizer first, as it fails sooner.

    Args:
        model: From ``find``.
        device: As the command was given it; a line says which one ``auto`` is, or where the parts
            of a model are that was spread.
        dtype: Of the computation; ``auto`` is what ``load_model`` calls ``fast``.
        trust_remote_code: Run the code that the model brings.
        placed: As for ``placed_on``.
        in_double: As for ``choose_device``.
        in_integers: Multiply codes as integers on a CPU that can, see ``multiply_integers``.

    Raises:
        RotqError: one of them cannot be read, or this machine has no such device.
    """
    from rotq.checkpoint.gguf import read_once
    from rotq.checkpoint.load import load_model, load_tokenizer
    from rotq.layers.quant_linear import multiply_integers

    chosen = choose(device, in_double=in_double) if placed is None else placed
    with read_once(model.path):
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        if placed is None:
            say_device(device, chosen)
        loaded = load_model(
            model,
            dtype=run_dtype(dtype),
            device_map=device_map(chosen),
            trust_remote_code=trust_remote_code,
        )
    say_computed(dtype, (model, loaded))
    if placed is not None:
        say([f"device map {placed}: {_places(loaded)}"])
    if in_integers and multiply_integers(loaded):
        say(
            [
                "this CPU multiplies no 8-bit integers: layers whose inputs are rounded to 8 bits "
                "take their weights dense"
            ]
        )
    return loaded, tokenizer


def _places(model: Any) -> str:
    """Where accelerate has put the parts of a model."""
    found = getattr(model, "hf_device_map", {}).values() or [model.device]
    names = (f"cuda:{place}" if isinstance(place, int) else str(place) for place in found)
    return ", ".join(dict.fromkeys(names))


def load_to_serve(
    model: str, caches: Iterable[KVSpec | None], *, device: str, dtype: str, trust_remote_code: bool
) -> tuple[Location, Any, Any]:
    """Where a model is, the model and its tokenizer, for a server or what measures one.

    Args:
        caches: None is dense; those that are packed need fp64.

    Raises:
        RotqError: it predicts no next token, or see ``find`` and ``load``.
    """
    packed = next((f"--kv {spec.name}" for spec in caches if spec is not None), "")
    choose(device, in_double=packed)
    place = find(model)
    check_causal(place, trust_remote_code=trust_remote_code)
    loaded, tokenizer = load(
        place,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        in_double=packed,
    )
    return place, loaded, tokenizer


def say_device(asked: str, chosen: str) -> None:
    """A line for the device that was not named, and for what it leaves to the CPU."""
    without = "; what needs fp64 is computed on the CPU" if chosen.startswith("mps") else ""
    say([f"device: {chosen}{without}"] if asked == AUTO or without else [])


def run_dtype(asked: str) -> str:
    """What ``load_model`` is given for ``--dtype``."""
    return "fast" if asked == AUTO else asked


def say_computed(
    asked: str, *models: tuple[Location, Any], told: Iterable[str] = ()
) -> frozenset[str]:
    """A line where one runs in another dtype than its checkpoint's, or in a slow one; each once.

    Args:
        told: Lines that were said before, and are not again.

    Returns:
        All that were said.
    """
    from rotq.checkpoint.configuration import declared_dtype
    from rotq.devices import slow_products

    lines = dict.fromkeys(told)
    for place, loaded in models:
        declared = loaded.dtype if asked != AUTO else declared_dtype(place.path) or loaded.dtype
        lines |= dict.fromkeys(slow_products(declared, loaded.dtype, loaded.device))
    say(line for line in lines if line not in told)
    return frozenset(lines)


def device_map(chosen: str) -> str | None:
    """As transformers takes a device; None for the CPU, which needs no hooks of accelerate's."""
    return None if chosen == "cpu" else chosen


def check_causal(model: Location, *, trust_remote_code: bool) -> None:
    """Refuse a model that predicts no next token, by its configuration.

    Raises:
        RotqError: it fills in masks.
    """
    if fills_masks(model, trust_remote_code=trust_remote_code):
        raise RotqError(f"{model} is a masked language model; score it with rotq eval pll")


def check_masked(model: Location, *, trust_remote_code: bool) -> None:
    """Refuse a model that fills in no masks, by its configuration.

    Raises:
        RotqError: it predicts the next token.
    """
    if not fills_masks(model, trust_remote_code=trust_remote_code):
        raise RotqError(f"{model} is no masked language model; use rotq eval ppl")


def fills_masks(model: Location, *, trust_remote_code: bool) -> bool:
    """Whether a model fills in masked tokens, by its configuration; else it predicts the next."""
    from rotq.checkpoint.configuration import load_config
    from rotq.models.task import is_masked

    if model.is_gguf:
        return False
    return is_masked(load_config(model.path, trust_remote_code=trust_remote_code))


def say(notes: Iterable[str]) -> None:
    """Lines on stderr, for what is done otherwise than was asked; empty ones are left out."""
    for note in filter(None, notes):
        click.echo(note, err=True)


def show(label: str) -> Callable[[int, int], None] | None:
    """A line of progress that is told ``done, total``; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    return lambda done, total: click.echo(f"\r{label} {done}/{total}", nl=done == total, err=True)
