"""How the packed tokens of a sequence are shared among programs.

A program takes a run of tokens of one KV head. All programs of a grid have runs of one length, so a
sequence has as many as it is long, and those beyond its end return at once. What length is best
follows from shapes alone: of the runs that leave no program more than LONGEST_RUN, the one with
which the last wave of programs ends first.
"""

from functools import cache

SHORTEST_RUN = 256
"""Fewer packed tokens are not worth a program of their own."""

LONGEST_RUN = 1024
"""More would let a long sequence among short ones, or rows of padding, keep few programs busy."""

MOST_SPLITS = 256

RESIDENT = {8: 4, 16: 3}
"""Programs of the decode kernel that an SM holds, by its query rows (kernels/COMPILE.md)."""


@cache
def choose_run(tokens: int, heads: int, num_sm: int, rows: int, tile: int) -> int:
    """Tokens of a run, a multiple of ``tile``.

    Args:
        tokens: Packed tokens of the longest sequence that there is room for.
        heads: KV heads of all sequences.
        num_sm: Of the GPU.
        rows: Query rows of the kernel's tile.
        tile: Tokens of the kernel's tile.
    """
    slots = RESIDENT[rows] * num_sm
    best, least = run_of(tokens, 1, tile), None
    for splits in range(1, MOST_SPLITS + 1):
        run = run_of(tokens, splits, tile)
        if splits > 1 and run < SHORTEST_RUN:
            break
        if run > LONGEST_RUN and -(-tokens // LONGEST_RUN) <= MOST_SPLITS:
            continue
        ends = makespan(tokens, heads, run, slots)
        if least is None or ends < least:
            best, least = run, ends
    return best


def makespan(tokens: int, heads: int, run: int, slots: int) -> int:
    """Tokens that pass before the last program ends, of sequences of one length."""
    waves = -(-heads * -(-tokens // run) // slots)
    return waves * run


def run_of(tokens: int, splits: int, tile: int) -> int:
    """Tokens of a run of so many splits."""
    return max(1, -(-tokens // (splits * tile))) * tile
