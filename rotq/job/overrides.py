"""Which override of the recipe serves which layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rotq.patterns import PatternTooSlow, search
from rotq.recipe import Override


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
    try:
        matches = search([override.match for override in overrides], names)
    except PatternTooSlow as error:
        raise ValueError(f"weights.overrides[{error.index}]: match {error}") from None
    for index, found in enumerate(matches):
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
