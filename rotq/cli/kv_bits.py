"""``--kv-bits``: a cache by its bits, in place of a preset or beside others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from rotq.cli.options import Command


def kv_bits_option(parameter: str, *, beside: bool = False) -> Callable[[Command], Command]:
    """``--kv-bits``, which becomes the name of its scheme.

    Args:
        parameter: Of the command, which gets the name.
        beside: Whether other names may stand there too.
    """
    option = click.option(
        "--kv-bits",
        type=float,
        metavar="BITS",
        help="A scheme of so many bits per element, norms included: keys and values of each layer "
        "get the 2 to 4 that calibration finds best. The same as --kv kv2.5 for 2.5.",
    )

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*args: Any, kv_bits: float | None, **options: Any) -> None:
            if kv_bits is not None:
                others = _others(parameter, options)
                if others and not beside:
                    raise click.UsageError("--kv-bits and --kv are two schemes; leave one out")
                options[parameter] = ",".join([*others, _name(kv_bits)])
            command(*args, **options)

        return option(run)

    return decorate


def _others(parameter: str, options: dict[str, Any]) -> list[str]:
    """What ``--kv`` was given, if it was."""
    source = click.get_current_context().get_parameter_source(parameter)
    given = source is not ParameterSource.DEFAULT and options[parameter] is not None
    return [options[parameter]] if given else []


def _name(bits: float) -> str:
    from rotq.kv.presets import averaged

    try:
        return averaged(bits).name
    except ValueError:
        raise click.UsageError(f"--kv-bits {bits:g} is not between 2 and 8") from None
