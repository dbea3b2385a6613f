"""Options that make up a recipe, and how it is resolved: flag > file > default."""

from __future__ import annotations

import functools
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import rotq
from rotq.cli.hints import nearest
from rotq.cli.options import Command, Seed, Words, bos_option
from rotq.recipe import Given, Recipe, resolve


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
            metavar="FILE|ID|pydoc|self",
            help="Calibration text: .txt, .jsonl or .fasta file, ID[:CONFIG][:SPLIT] of the "
            "datasets library, the text that ships with Python, or what the model itself writes. "
            "Several get equal shares.",
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
    """The file of a recipe: a path, or the bare name of a preset; ``papers/NAME`` is one too.

    Raises:
        click.UsageError: neither; lists the presets.
    """
    path = Path(os.path.expanduser(config))
    if os.path.isfile(path):
        return path
    folders = preset_folders()
    if config in (path.name, f"papers/{path.name}") and not path.suffix:
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
