"""Targets of a checkpoint, where vLLM calls layers otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping


def in_vllm(target: str, substrings: Mapping[str, str | None]) -> str:
    """A pattern of layers' names with what vLLM exchanges in them exchanged.

    vLLM does this for full names only. Anything but a pattern comes back as it is.

    Args:
        target: Of ``config_groups``; ``re:...conv\\.in_proj$`` is a pattern.
        substrings: From a part of a tensor's name in the files to what vLLM has instead; None for
            tensors that it leaves out.
    """
    if not target.startswith("re:"):
        return target
    for old, new in substrings.items():
        if new is not None:
            target = target.replace(re.escape(old), re.escape(new))
    return target
