"""Files of protein models as those who made them lay them out.

    fair-esm            esm2_*.pt, esm1b_*.pt, esm1v_*.pt      see ``fair_esm``
    EvolutionaryScale   esmc_*.pth                             see ``esmc_weights``
    Salesforce          a folder of ProGen2                    see ``progen``

Files are pickles; of what a pickle can hold, tensors, plain values and argparse's Namespace are
read, and nothing is run.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rotq.checkpoint.esmc_weights import is_esmc, read_esmc
from rotq.checkpoint.fair_esm import is_fair_esm, read_fair_esm
from rotq.checkpoint.files import read_json
from rotq.checkpoint.progen import read_progen
from rotq.checkpoint.published import Published
from rotq.checkpoint.source import read_tensors
from rotq.errors import RotqError


def read_published(path: Path) -> tuple[Published, list[str]]:
    """Read a model's own file.

    Returns:
        The model, and what is to be said about it, a line each.

    Raises:
        RotqError: it cannot be read, holds code, or is laid out in no way that rotq knows.
    """
    if path.is_dir():
        return _read_folder(path), []
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


def _read_folder(path: Path) -> Published:
    config = read_json(path / "config.json")
    if config.get("model_type") != "progen":
        raise RotqError(f"{path} holds a {config.get('model_type')}, no ProGen2")
    files = [path / "model.safetensors", path / "pytorch_model.bin"]
    file = next((file for file in files if file.is_file()), None)
    tokenizer = path / "tokenizer.json"
    if file is None or not tokenizer.is_file():
        missing = tokenizer if file is not None else files[0]
        raise RotqError(f"{path} has no {missing.name}")
    stored = read_tensors(file) if file.suffix == ".safetensors" else _load(file)
    try:
        found = read_progen(config, stored)
    except (KeyError, RuntimeError) as error:
        raise RotqError(f"{path}: not as ProGen2 is written: {error!r}") from None
    except RotqError as error:
        raise RotqError(f"{path}: {error}") from None
    return replace(found, tokenizer=tokenizer.read_text(encoding="utf-8"))


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
