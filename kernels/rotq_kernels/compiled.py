"""numba's compiler, which keeps what it compiled on the disk: seconds a machine, not a process.

numba numbers the entries of a function's cache. Two processes that compile two kinds of a function
at the same time may take the same number, and a later one would run the code of one kind for the
other. So an entry has a file of its own here, named by types of arguments, constants of the
closure and the processor; with it are numba's version and a digest of the source file.

Parts of a kept function are forced inline. A call of one would be a call of another machine code in
the process that compiled it, which has compiled the part on its own, too, than in one that has the
entry alone; where sums may be regrouped the two differ. It would also make numba count an id of the
process among the constants.

Only modules of loops import this, and they are imported where numba is installed. What they take
from other modules they hold as constants of a closure, since a change of those files is not seen.
"""

import contextlib
import hashlib
import pickle
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

SUMS = {"reassoc", "contract", "nsz"}
"""``fastmath`` by which sums may be regrouped; infinities and NaNs stay what they are."""


def kept(**options: Any) -> Callable[[Any], Any]:
    """Compile a function when it is first called, or take it from the disk.

    It runs without the interpreter's lock. Entries lie in ``__pycache__`` beside the source where
    that can be written, else in the user's cache, or in ``NUMBA_CACHE_DIR`` where that is set.
    Where none can be written, each process compiles.

    Args:
        **options: Of ``numba.njit``.
    """

    def decorate(function: Any) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        with contextlib.suppress(RuntimeError):  # no folder can be written
            dispatcher._cache = _Cache(function)
        return dispatcher

    return decorate


def inlined(**options: Any) -> Callable[[Any], Any]:
    """Compile a part of kept functions into them, so that their constants are its own."""
    decorate: Callable[[Any], Any] = numba.njit(nogil=True, forceinline=True, **options)
    return decorate


class _Cache(FunctionCache):  # type: ignore[misc]
    """Of one function."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _Entries(
            self._cache_path, self._impl.filename_base, locator.get_source_stamp()
        )


class _Entries(IndexDataCacheFile):  # type: ignore[misc]
    """Files of one function, one for each kind, instead of numbers and a list of them."""

    def save(self, key: Any, data: Any) -> None:
        """Written aside and renamed, over that of an older source file; a full disk costs it."""
        with contextlib.suppress(OSError):
            self._save_data(self._name(key), (self._version, self._source_stamp, data))

    def load(self, key: Any) -> Any:
        """None where there is none of this source file, or none that can be read."""
        try:
            version, stamp, data = self._load_data(self._name(key))
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        return data if (version, stamp) == (self._version, self._source_stamp) else None

    def _name(self, key: Any) -> str:
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        return f"{self._index_name.removesuffix('.nbi')}.{digest}.nbc"
