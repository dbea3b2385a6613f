"""Regular expressions of others, searched within a time.

Python's engine knows no limit, and some patterns take years for one name. They are searched in a
process of their own, which is ended when it takes too long.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

LIMIT_SECONDS = 5.0
"""For all patterns on all names; what people write takes milliseconds."""

_SEARCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    found = [index for index, name in enumerate(names) if re.search(pattern, name)]
    print(json.dumps(found), flush=True)
"""


class PatternTooSlow(ValueError):  # noqa: N818
    """A pattern takes too long on names as they are."""

    def __init__(self, pattern: str, index: int) -> None:
        super().__init__(
            f"{pattern!r} takes more than {LIMIT_SECONDS:g} s on the names of the layers; "
            "write it without repeats in repeats"
        )
        self.index = index


def search(patterns: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """For each regular expression, which compiles, the indices of the names it is found in.

    Raises:
        PatternTooSlow: with the index of the pattern.
    """
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _SEARCH]
    given = json.dumps([patterns, names]).encode()
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, timeout=LIMIT_SECONDS, check=True
        )
    except subprocess.TimeoutExpired as error:
        index = (error.stdout or b"").count(b"\n")
        raise PatternTooSlow(patterns[index], index) from None
    return [json.loads(line) for line in done.stdout.splitlines()]
