"""Options that commands share, and how a recipe is resolved: flag > file > default."""

from __future__ import annotations

import functools
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import rotq
from rotq.cli.hints import nearest
from rotq.devices import check_device_name
from rotq.recipe import Given, Recipe, resolve
from rotq.recipe.sections import check_seed

Command = Callable[..., None]


class FilePath(click.Path):
    """A path as ``pathlib`` has it, with ``~`` as a shell has it (none does in ``--output=~/x``).

    An empty one, which would be the current folder, is refused.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("it is empty", param, ctx)
        _check_name(self, str(value), param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class ModelName(click.Path):
    """A folder, a .gguf file or a hub id, as it was typed: ``./org/name`` is no id.

    But for ``~``, as in ``FilePath``.
    """

    def __init__(self) -> None:
        super().__init__(path_type=str)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("it is empty", param, ctx)
        _check_name(self, str(value), param, ctx)
        return super().convert(os.path.expanduser(str(value)), param, ctx)


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
            help="Of the computation; auto is the checkpoint's.",
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


def recipe_options(command: Command) -> Command:
    """Options that make up a recipe; the command gets it as ``recipe`` and ``recipe_file``."""

    @functools.wraps(command)
    def run(
        *args: Any,
        config: str | None,
        assignments: tuple[str, ...],
        calibration: tuple[str, ...],
        num_samples: int | None,
        seq_len: int | None,
        seed: int | None,
        bos: str | None,
        **kwargs: Any,
    ) -> None:
        flags = [
            Given(key=key, value=value, origin=f"{flag} {value}")
            for key, flag, value in (
                ("calibration.num_samples", "--num-samples", num_samples),
                ("calibration.seq_len", "--seq-len", seq_len),
                ("calibration.seed", "--seed", seed),
                ("rotation.seed", "--seed", seed),
                ("calibration.bos", "--bos", bos),
            )
            if value is not None
        ]
        recipe = resolve_recipe(config, assignments, [*_texts(calibration), *flags])
        file = find_recipe(config) if config else None
        command(*args, recipe=recipe, recipe_file=file, **kwargs)

    wrapped: Command = run
    for option in (
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set any key of the recipe, as solver.damping=0.02. May be repeated.",
        ),
        click.option("--seed", type=Seed(), help="Of the calibration draw and of the rotation."),
        bos_option(None),
        click.option(
            "--seq-len",
            type=int,
            help="Tokens per calibration window; no more than the model has positions.",
        ),
        click.option("--num-samples", type=int, help="Calibration windows."),
        click.option(
            "--calibration",
            type=Words(),
            multiple=True,
            metavar="FILE|ID|pydoc",
            help="Calibration text: .txt, .jsonl or .fasta file, ID[:CONFIG][:SPLIT] of the "
            "datasets library, or the text that ships with Python. Several get equal shares.",
        ),
        click.option(
            "-c",
            "--config",
            type=Words(),
            metavar="RECIPE",
            help="YAML file, or the bare name of a preset. Without it: the recipe's defaults.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def _texts(sources: Sequence[str]) -> list[Given]:
    """``--calibration``, once or several times; in place of all that the recipe names."""
    if not sources:
        return []
    origin = " ".join(f"--calibration {source}" for source in sources)
    mix = [{"source": source} for source in sources] if len(sources) > 1 else []
    return [
        Given(key="calibration.source", value=sources[0], origin=origin),
        Given(key="calibration.mix", value=mix, origin=origin),
    ]


def resolve_recipe(
    config: str | None, assignments: tuple[str, ...], flags: Sequence[Given]
) -> Recipe:
    """The recipe that a command line asks for.

    Args:
        config: File or preset name; None takes the defaults.
        assignments: ``KEY=VALUE`` strings; the last of equal keys wins.
        flags: They win over ``assignments``.

    Raises:
        click.UsageError: no such file or preset, unknown key, value out of range; one line.
    """
    try:
        given = [*map(_assigned, assignments), *flags]
        return resolve(None if config is None else find_recipe(config), given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _assigned(assignment: str) -> Given:
    origin = f"--set {assignment}" if len(assignment) <= 60 else f"--set {assignment[:60]}..."
    key, equals, value = assignment.partition("=")
    if not equals or not key.strip():
        raise click.UsageError(f"{origin}: expected KEY=VALUE")
    return Given.parse(key.strip(), value, origin)


def find_recipe(config: str) -> Path:
    """The file of a recipe: a path, or the bare name of a preset.

    Raises:
        click.UsageError: neither; lists the presets.
    """
    path = Path(os.path.expanduser(config))
    if os.path.isfile(path):
        return path
    folders = preset_folders()
    if path.name == config and not path.suffix:
        for folder in folders:
            if os.path.isfile(folder / f"{config}.yaml"):
                return folder / f"{config}.yaml"
    if os.path.isdir(path):
        raise click.UsageError(f"no recipe {config}: it is a folder")
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    near = nearest(path.stem, known)
    raise click.UsageError(
        f"no recipe {config}: neither a file nor a preset; presets: {', '.join(known) or 'none'}"
        + (f"; did you mean {near}?" if near else "")
    )


def preset_folders() -> list[Path]:
    """Where presets are looked for: ./configs, the source tree, what the wheel installed."""
    return [
        Path("configs"),
        Path(rotq.__file__).resolve().parents[1] / "configs",
        Path(sysconfig.get_path("data")) / "share" / "rotq" / "configs",
    ]
