"""Options that commands share, and the types of their values."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from rotq.devices import check_device_name
from rotq.recipe.sections import check_seed

Command = Callable[..., None]


class FilePath(click.Path):
    """A path as ``pathlib`` has it, with ``~`` as a shell has it (none does in ``--output=~/x``).

    An empty one, which would be the current folder, is refused.
    """

    def __init__(self, *, path_type: type[Any] = Path, **options: Any) -> None:
        super().__init__(path_type=path_type, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("it is empty", param, ctx)
        _check_name(self, str(value), param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class ModelName(FilePath):
    """A folder, a .gguf file or a hub id, as it was typed: ``./org/name`` is no id."""

    def __init__(self) -> None:
        super().__init__(path_type=str)


class Device(click.types.StringParamType):
    """The name of a device, by its spelling: whether it is there a command asks itself."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            check_device_name(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class Words(click.types.StringParamType):
    """A text that is not empty, as it is where a variable of the shell is not set."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("it is empty", param, ctx)
        _check_name(self, str(value), param, ctx)
        return str(value)


def _check_name(
    kind: click.ParamType[Any], value: str, param: click.Parameter | None, ctx: click.Context | None
) -> None:
    """Refuse what neither a recipe nor a tokenizer's library can name."""
    try:
        value.encode()
    except UnicodeEncodeError:
        kind.fail(f"{value} is not UTF-8; rename it, or give a link to it", param, ctx)


class Seed(click.types.IntParamType):
    """What torch's generators can be seeded with."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        seed = int(super().convert(value, param, ctx))
        try:
            check_seed(seed)
        except ValueError as error:
            self.fail(str(error).removeprefix("seed: "), param, ctx)
        return seed


_DEBUG_KEY = "rotq.debug"


def debug_wanted(ctx: click.Context) -> bool:
    """Whether ``--debug`` was given to the command that runs under ``ctx``."""
    return bool(ctx.meta.get(_DEBUG_KEY))


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_DEBUG_KEY] = value


def output_options(command: Command) -> Command:
    """``--json`` as ``as_json``, and ``--debug``, which ``debug_wanted`` asks for."""
    for option in (
        click.option(
            "--debug",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_remember_debug,
            help="Show the traceback of an error.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    ):
        command = option(command)
    return command


def text_option(command: Command) -> Command:
    """``--text``, what a causal model is scored on."""
    return click.option(
        "--text",
        type=Words(),
        required=True,
        metavar="FILE|ID",
        help="Text, JSON lines or FASTA; pydoc-test; or a datasets id.",
    )(command)


def proteins_option(*, required: bool) -> Callable[[Command], Command]:
    """``--fasta``, proteins in any form that ``calibration.sequences`` reads."""
    return click.option(
        "--fasta",
        type=FilePath(),
        required=required,
        metavar="FILE|-",
        help="Proteins: FASTA, A3M, PIR, a table with a column of sequences, or one on each line; "
        "packed or not; - is standard input.",
    )


def window_options(command: Command) -> Command:
    """``--windows`` and ``--seq-len``: which windows of the text."""
    for option in (
        click.option(
            "--seq-len",
            type=click.IntRange(min=2),
            default=1024,
            show_default=True,
            help="Tokens per window; no more than the model has positions.",
        ),
        click.option(
            "--windows",
            type=click.IntRange(min=0),
            default=16,
            show_default=True,
            help="Windows from the start of the text; 0 takes all.",
        ),
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """``--dtype`` and ``--trust-remote-code``, as ``load`` takes them."""
    for option in (
        click.option(
            "--trust-remote-code", is_flag=True, help="Run Python code that the model brings."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="Of the computation; auto is the checkpoint's, or float32 on a CPU that "
            "multiplies no such numbers.",
        ),
    ):
        command = option(command)
    return command


def device_option(command: Command) -> Command:
    """``--device``, as ``choose_device`` takes it."""
    return click.option(
        "--device",
        type=Device(),
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda|cuda:N|mps",
        help="Where the model runs; auto is the first GPU, else mps or the CPU.",
    )(command)


def processes_option(doing: str) -> Callable[[Command], Command]:
    """``--num-processes``, as ``joined`` takes it.

    Args:
        doing: What they do together, and how to name several machines, for the help.
    """
    return click.option(
        "--num-processes",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help=doing,
    )


def device_map_option(command: Command) -> Command:
    """``--device-map``, as ``placed_on`` takes it."""
    return click.option(
        "--device-map",
        "placed",
        type=Words(),
        help="In place of --device, for a model that no device holds: as accelerate takes it, auto "
        "spreads it over GPUs, memory and disk.",
    )(command)


def bos_option(default: str | None) -> Callable[[Command], Command]:
    """``--bos``: what windows of text begin with."""
    return click.option(
        "--bos",
        type=click.Choice(["auto", "yes", "no"]),
        default=default,
        show_default=default is not None,
        help="Begin windows with the special tokens that the tokenizer puts before a text (auto), "
        "with its BOS (yes), or with none.",
    )
