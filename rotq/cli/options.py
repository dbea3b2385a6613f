"""Options that commands share, and how a recipe is resolved: flag > file > default."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import rotq
from rotq.recipe import Recipe, load_recipe

Command = Callable[..., None]

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


def recipe_options(command: Command) -> Command:
    """Options that make up a recipe; the command gets it resolved, as ``recipe``."""

    @functools.wraps(command)
    def run(
        *args: Any,
        config: str | None,
        assignments: tuple[str, ...],
        calibration: str | None,
        num_samples: int | None,
        seq_len: int | None,
        seed: int | None,
        **kwargs: Any,
    ) -> None:
        flags = {
            "calibration.source": calibration,
            "calibration.num_samples": num_samples,
            "calibration.seq_len": seq_len,
            "calibration.seed": seed,
            "rotation.seed": seed,
        }
        given = {key: value for key, value in flags.items() if value is not None}
        command(*args, recipe=resolve_recipe(config, assignments, given), **kwargs)

    wrapped: Command = run
    for option in (
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set any key of the recipe, as solver.damping=0.02. May be repeated.",
        ),
        click.option("--seed", type=int, help="Of the calibration draw and of the rotation."),
        click.option(
            "--seq-len",
            type=int,
            help="Tokens per calibration window; no more than the model has positions.",
        ),
        click.option("--num-samples", type=int, help="Calibration windows."),
        click.option(
            "--calibration",
            metavar="FILE|ID|pydoc",
            help="Calibration text: .txt, .jsonl or .fasta file, ID[:CONFIG][:SPLIT] of the "
            "datasets library, or the text that ships with Python.",
        ),
        click.option(
            "-c",
            "--config",
            metavar="RECIPE",
            help="YAML file, or the bare name of a preset. Without it: the recipe's defaults.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def resolve_recipe(
    config: str | None, assignments: tuple[str, ...], flags: dict[str, Any]
) -> Recipe:
    """The recipe that a command line asks for.

    Args:
        config: File or preset name; None takes the defaults.
        assignments: ``KEY=VALUE`` strings; the last of equal keys wins.
        flags: Dotted key to value; they win over ``assignments``.

    Raises:
        click.UsageError: no such file or preset, unknown key, value out of range; one line.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--set {assignment}: expected KEY=VALUE")
        overrides[key.strip()] = value
    try:
        return load_recipe(find_recipe(config) if config else None, {**overrides, **flags})
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None


def find_recipe(config: str) -> Path:
    """The file of a recipe: a path, or the bare name of a preset.

    Raises:
        click.UsageError: neither; lists the presets.
    """
    path = Path(config)
    if path.is_file():
        return path
    folders = preset_folders()
    if path.name == config and not path.suffix:
        for folder in folders:
            if (folder / f"{config}.yaml").is_file():
                return folder / f"{config}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    raise click.UsageError(
        f"no recipe {config}: neither a file nor a preset; presets: {', '.join(known) or 'none'}"
    )


def preset_folders() -> list[Path]:
    """Where presets are looked for: ./configs, the source tree, what the wheel installed."""
    return [
        Path("configs"),
        Path(rotq.__file__).resolve().parents[1] / "configs",
        Path(sysconfig.get_path("data")) / "share" / "rotq" / "configs",
    ]
