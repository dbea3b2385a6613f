"""Which override of the recipe serves which layer.

Python's engine of regular expressions knows no limit, and some patterns take years for one name.
They are searched in a process of their own, which is ended when it takes too long.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from rotq.recipe import Override

LIMIT_SECONDS = 10.0
"""For all patterns on all names; what people write takes milliseconds."""

_SEARCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    found = [index for index, name in enumerate(names) if re.search(pattern, name)]
    print(json.dumps(found), flush=True)
"""


def choose_overrides(
    overrides: Sequence[Override], layers: Sequence[str], others: Sequence[str] = ()
) -> dict[str, Override]:
    """The first override that matches, by layer; layers that none matches are left out.

    Args:
        overrides: Of the recipe.
        layers: Full names of those that can be quantized.
        others: Of what has a weight that is never quantized: to keep such is no mistake.

    Raises:
        ValueError: an override matches nothing, or its pattern takes too long.
    """
    if not overrides:
        return {}
    names = [*layers, *others]
    chosen: dict[str, Override] = {}
    patterns = [override.match for override in overrides]
    for index, found in enumerate(search(patterns, names)):
        override = overrides[index]
        served = [names[place] for place in found if override.keep or place < len(layers)]
        if not served:
            example = f"; they are named as {layers[0]}" if layers else ""
            raise ValueError(
                f"weights.overrides[{index}]: match {override.match!r} matches no layer that is "
                f"quantized{example}"
            )
        for name in served:
            chosen.setdefault(name, override)
    return chosen


def idle_overrides(overrides: Sequence[Override], chosen: Mapping[str, Override]) -> Iterator[str]:
    """A note for each override whose layers are all served by earlier ones."""
    used = {id(override) for override in chosen.values()}
    for index, override in enumerate(overrides):
        if id(override) not in used:
            yield (
                f"weights.overrides[{index}]: match {override.match!r} changes nothing: earlier "
                "overrides serve its layers"
            )


def search(patterns: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """For each regular expression the indices of the names that it is found in.

    Raises:
        ValueError: it takes longer than ``LIMIT_SECONDS``; names the pattern.
    """
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _SEARCH]
    given = json.dumps([patterns, names]).encode()
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, timeout=LIMIT_SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        slow = (error.stdout or b"").count(b"\n")
        raise ValueError(
            f"weights.overrides[{slow}]: match {patterns[slow]!r} takes more than "
            f"{LIMIT_SECONDS:g} s on the names of the layers; write it without repeats in repeats"
        ) from None
    return [json.loads(line) for line in done.stdout.splitlines()]
