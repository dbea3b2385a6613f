"""From YAML and dotted keys to a recipe, every key and type checked."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rotq.recipe.notation import read_mapping, read_yaml
from rotq.recipe.sections import Rotation, shown
from rotq.recipe.training import Transform
from rotq.recipe.whole import Recipe

_EXACT = 2**53
"""Floats up to here hold every integer."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """A value that wins over the file's."""

    key: str
    """Dotted, as ``solver.damping``."""
    value: Any
    origin: str = ""
    """How the user gave it, for messages, as ``--num-samples 0``."""

    @classmethod
    def parse(cls, key: str, text: str, origin: str = "") -> Given:
        """From a value that is written in YAML.

        Raises:
            ValueError: it is not; the line begins with ``origin``.
        """
        try:
            return cls(key=key, value=read_yaml(text), origin=origin)
        except ValueError as error:
            raise ValueError(f"{origin or key}: {error}") from None


def load_recipe(path: Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """Resolve a recipe: overrides > file > defaults.

    Args:
        path: YAML file; None takes the defaults.
        overrides: Dotted key to value, for example ``{"solver.damping": 0.02}``. Strings are read
            as YAML.

    Raises:
        ValueError: unreadable YAML, unknown key, wrong type or value out of range; one line.
    """
    given = [
        Given.parse(key, value) if isinstance(value, str) else Given(key=key, value=value)
        for key, value in overrides.items()
    ]
    return resolve(path, given)


def resolve(path: Path | None, given: Sequence[Given]) -> Recipe:
    """As ``load_recipe``; of two values for one key the later wins.

    An error begins with the file or with the origin of the value that brought it.
    """
    values = {} if path is None else read_mapping(path)
    try:
        return _build_with(values, given)
    except ValueError as error:
        origin = _culprit(path, values, given, str(error))
        raise ValueError(f"{origin}: {error}" if origin else str(error)) from None


def load_bases(path: Path) -> tuple[Rotation, Transform]:
    """The sections of a checkpoint's recipe that say its bases; others may be an older rotq's.

    Raises:
        ValueError: as ``load_recipe``; the line begins with the file.
    """
    whole = read_mapping(path)
    sections = {name: whole.get(name, {}) for name in ("rotation", "transform")}
    sections["output"] = {"format": "rotq"}  # which can express whatever the bases are
    try:
        found = from_dict(sections)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found.rotation, found.transform


def from_dict(values: dict[str, Any]) -> Recipe:
    """Build a recipe; unknown keys and wrong types raise ValueError with the key's full name."""
    return typing.cast(Recipe, _build(Recipe, values, ""))


def _culprit(
    path: Path | None, values: dict[str, Any], given: Sequence[Given], message: str
) -> str:
    """Where the value came from that brings the message: the file, or the first of ``given``."""
    origins = [str(path or ""), *(item.origin for item in given)]
    for number, origin in enumerate(origins):
        try:
            _build_with(values, given[:number])
        except ValueError as error:
            if str(error) == message:
                return origin
    raise AssertionError("all that is given brought the message before")


def _build_with(values: dict[str, Any], given: Sequence[Given]) -> Recipe:
    for item in given:
        values = _put(values, item.key, item.value)
    return from_dict(values)


def _put(values: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy with one value more; in place it would change what YAML's aliases share too."""
    section, dot, name = dotted.partition(".")
    if not dot:
        return {**values, section: value}
    held = values.get(section, {})
    if not isinstance(held, dict):
        raise ValueError(f"{section}.: expected a mapping, got {shown(held)}")
    return {**values, section: {**held, name: value}}


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix or 'recipe'}: expected a mapping, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{shown_key(key)}; {_hint(key, hints, prefix)}")
        arguments[key] = _convert(hints[key], value, f"{prefix}{key}")
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in arguments:
            raise ValueError(f"{prefix}{field.name} is missing")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def shown_key(key: object) -> str:
    """A key of any type, for a message."""
    return shown(key).strip("'") if isinstance(key, str) else shown(key)


def _hint(key: object, hints: Mapping[str, Any], prefix: str) -> str:
    within = [f"{prefix}{name}.{key}" for name, hint in hints.items() if _has_field(hint, key)]
    if within:
        return f"did you mean {' or '.join(within)}?"
    near = difflib.get_close_matches(str(key)[:80], hints, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(hints))}"


def _has_field(hint: Any, name: object) -> bool:
    fields = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
    return any(field.name == name for field in fields)


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{key}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _choose(arguments, value, key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: expected a list, got {shown(value)}")
        return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{key}: {shown(value)} is not a finite number")
    if hint is float and number:
        return float(value)
    if hint is int and number and value == int(value) and abs(value) <= _EXACT:
        return int(value)  # 1e3
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{key}: expected {hint.__name__}, got {shown(value)}")
    if isinstance(value, str) and not value.isascii():
        _check_text(value, key)
    return value


def _check_text(value: str, key: str) -> None:
    """Refuse half of a surrogate pair, which YAML can spell and no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key}: {shown(value)} is no text that UTF-8 can hold") from None


def _choose(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and "none" in choices:
        return "none"
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{key}: {shown(value)} is not one of {', '.join(map(str, choices))}")
    return choices[choices.index(value)]
