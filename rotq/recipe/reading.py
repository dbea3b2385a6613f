"""From YAML and dotted keys to a recipe, every key and type checked."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from rotq.recipe.whole import Recipe


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """Resolve a recipe: overrides > file > defaults.

    Args:
        path: YAML file; None takes the defaults.
        overrides: Dotted key to value, for example ``{"solver.damping": 0.02}``. Strings are read
            as YAML scalars.

    Raises:
        ValueError: unreadable YAML, unknown key, wrong type or value out of range; one line.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a recipe is a mapping, got {type(values).__name__}")
    for key, value in overrides.items():
        _set(values, key, yaml.safe_load(value) if isinstance(value, str) else value)
    try:
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from None


def from_dict(values: dict[str, Any]) -> Recipe:
    """Build a recipe; unknown keys and wrong types raise ValueError with the key's full name."""
    return typing.cast(Recipe, _build(Recipe, values, ""))


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{dotted}: {section} is not a section")
    values[last] = value


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix or 'recipe'}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = (
                f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(hints))}"
            )
            raise ValueError(f"unknown key {full}; {hint}")
        arguments[key] = _convert(hints[key], value, full)
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{prefix or 'recipe'}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{key}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value is None and "none" in arguments:
            value = "none"
        if value not in arguments or isinstance(value, bool):
            raise ValueError(f"{key}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{key}: expected {hint.__name__}, got {value!r}")
    return value
