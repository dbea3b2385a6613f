"""Where rotq keeps what it can make again: a folder of the user's, which may be deleted."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/rotq``, or ``~/.cache/rotq``; it need not be there.

    As the XDG Base Directory Specification has it: a variable that is empty or no absolute path
    counts as not set.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "rotq"
