"""Files of protein models as those who made them lay them out.

    fair-esm            esm2_*.pt, esm1b_*.pt, esm1v_*.pt      see ``fair_esm``
    EvolutionaryScale   esmc_*.pth                             see ``esmc_weights``

Files are pickles; of what a pickle can hold, tensors, plain values and argparse's Namespace are
read, and nothing is run.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rotq.checkpoint.esmc_weights import is_esmc, read_esmc
from rotq.checkpoint.fair_esm import is_fair_esm, read_fair_esm
from rotq.checkpoint.published import Published
from rotq.errors import RotqError


def read_published(path: Path) -> tuple[Published, list[str]]:
    """Read a model's own file.

    Returns:
        The model, and what is to be said about it, a line each.

    Raises:
        RotqError: it cannot be read, holds code, or is laid out in no way that rotq knows.
    """
    stored = _load(path)
    try:
        if is_fair_esm(stored):
            beside = path.with_name(f"{path.stem}-contact-regression.pt")
            contacts = _load(beside) if beside.is_file() else None
            note = f"{beside.name} is not beside it: without a contact head"
            return read_fair_esm(stored, contacts), [] if contacts else [note]
        if is_esmc(stored):
            return read_esmc(stored), []
    except RotqError as error:
        raise RotqError(f"{path}: {error}") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise RotqError(f"{path}: not as fair-esm or ESM-C write it: {error!r}") from None
    raise RotqError(f"{path} is laid out neither as fair-esm's models nor as ESM-C's")


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RotqError(f"cannot read {path}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise RotqError(f"{path} is no file of tensors, or holds code: {first}") from None
    if not isinstance(stored, Mapping):
        raise RotqError(f"{path} holds a {type(stored).__name__}, no named tensors")
    return stored
