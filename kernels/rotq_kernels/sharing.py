"""Native calls that torch's threads share: all of them give up the interpreter's lock."""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def share(run: Callable[..., None], units: int, *arguments: Any, worth_it: bool) -> None:
    """Call ``run((0, units), *arguments)``, or one run of units on each of torch's threads.

    Args:
        run: Native code whose units do not know of each other.
        units: Of all.
        *arguments: The others of ``run``.
        worth_it: Whether there is more to do than handing it out takes, about 0.1 ms.
    """
    threads = min(torch.get_num_threads(), units)
    if threads < 2 or not worth_it:
        run((0, units), *arguments)
        return
    edges = [units * n // threads for n in range(threads + 1)]
    calls = [_threads(threads).submit(run, part, *arguments) for part in itertools.pairwise(edges)]
    for call in calls:
        call.result()


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="rotq-native")
