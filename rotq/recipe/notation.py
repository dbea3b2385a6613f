"""Recipes as YAML text: bounded before anything is built of them, numbers as people write them.

YAML 1.1, which PyYAML reads, takes 1e-2 for a word and 0100 for 64. Here both are the numbers that
they look like, and what is written quotes words that look like them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

LIMIT_BYTES = 1 << 20
"""Of a recipe; the largest that rotq writes have some kB."""
LIMIT_DEPTH = 32
LIMIT_NODES = 50_000
"""Scalars, lists and mappings, those counted again that an alias repeats."""

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = {
    _INT: r"[-+]?[0-9][0-9_]{0,30}|0x[0-9a-fA-F]{1,16}",
    _FLOAT: r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Reader(yaml.SafeLoader):
    """PyYAML's safe loader, but for numbers, and for a key that stands twice in a mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands twice in one mapping", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node

    def construct_yaml_int(self, node: Any) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 16 if text.startswith("0x") else 10)


class _Writer(yaml.SafeDumper):
    """PyYAML's safe dumper, with the same idea of numbers."""


_Reader.add_constructor(_INT, _Reader.construct_yaml_int)
for _kind in (_Reader, _Writer):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
        for first, resolvers in _kind.yaml_implicit_resolvers.items()
    }
    for _tag, _pattern in _NUMBERS.items():
        _kind.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))


def read_yaml(text: str | bytes) -> Any:
    """The value of one YAML document; None for an empty one.

    Raises:
        ValueError: not YAML, a key stands twice in a mapping, or it is larger than a recipe is;
            one line.
    """
    if len(text) > LIMIT_BYTES:
        raise ValueError(f"larger than {LIMIT_BYTES} bytes, so it is no recipe")
    try:
        _check_size(yaml.parse(text, Loader=_Reader))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {_reason(error)}") from None
    try:
        return yaml.load(text, Loader=_Reader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"not YAML: {_reason(error)}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # what PyYAML's constructors raise where a tag does not fit its value, as !!bool 3
        kind = type(error).__name__
        raise ValueError(f"not YAML: a value does not fit its tag ({kind})") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file.

    Raises:
        ValueError: unreadable, or see ``read_yaml``, or no mapping; one line that names the file.
    """
    try:
        with path.open("rb") as file:
            values = read_yaml(file.read(LIMIT_BYTES + 1))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path}: this is not a recipe; a recipe is a mapping, got {kind}")
    return values


def write_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, keys in their order; ``read_yaml`` gives them back."""
    text: str = yaml.dump(dict(values), Dumper=_Writer, sort_keys=False, allow_unicode=True)
    return text


def _check_size(events: Iterator[yaml.Event]) -> None:
    """Refuse by the parser's events, before aliases are unfolded and collections are nested."""
    finished: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = [(None, 0)]
    for event in events:
        size = 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
            finished |= {anchor: size} if anchor else {}
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            finished |= {event.anchor: size} if event.anchor else {}
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in finished:
                raise ValueError(f"the alias *{event.anchor} stands before or in what it repeats")
            size = finished[event.anchor]
        anchor, held = open_[-1]
        open_[-1] = (anchor, held + size)
        if len(open_) > LIMIT_DEPTH:
            raise ValueError(f"nested more than {LIMIT_DEPTH} deep, so it is no recipe")
        if held + size > LIMIT_NODES:
            raise ValueError(f"holds more than {LIMIT_NODES} values, so it is no recipe")


def _reason(error: yaml.YAMLError | ValueError) -> str:
    """The problem and its line, without the text around it."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark is not None else ""
    return " ".join(f"{getattr(error, 'problem', None) or error}{where}".split())
