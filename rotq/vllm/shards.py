"""Whether parts of a packed layer begin and end where its words and groups do.

vLLM places the parts of a fused layer, and what a rank holds, at ``rows * bits // 32``: where that
is no whole number, it would be wrong words, or an assertion that names nothing.

Rows are out features, columns in features.
"""

from __future__ import annotations

from collections.abc import Sequence

from rotq.errors import RotqError

WORD = 32
"""Bits."""


def check_shards(
    name: str,
    bits: int,
    *,
    rows: Sequence[int],
    columns: int,
    all_columns: int | None,
    group_size: int,
    has_zeros: bool,
) -> None:
    """Refuse parts that cannot be placed.

    Args:
        name: Of the layer.
        bits: Of a code.
        rows: Of each part that is fused into the layer, on one rank.
        columns: On one rank.
        all_columns: On all ranks; None looks at the columns however many ranks there are.
        group_size: Columns that share a scale; -1 for all.
        has_zeros: Whether zero points are stored, which are packed along the rows.

    Raises:
        RotqError: names the layer, and what does not divide.
    """
    if columns != all_columns:
        if columns * bits % WORD:
            raise RotqError(
                f"{name}: {columns} columns of {bits} bits on each rank are no whole words of "
                f"{WORD} bits; use fewer ranks"
            )
        if group_size != -1 and columns % group_size:
            raise RotqError(
                f"{name}: groups of {group_size} do not divide the {columns} columns of a rank; "
                "use fewer ranks, or a smaller group size"
            )
    if has_zeros and len(rows) > 1:
        for part in rows:
            if part * bits % WORD:
                raise RotqError(
                    f"{name}: its parts have {', '.join(map(str, rows))} rows on each rank, and "
                    f"{part} zero points of {bits} bits are no whole words of {WORD} bits; use "
                    "fewer ranks, or a symmetric grid"
                )
