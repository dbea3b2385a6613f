"""Calibration on what the model writes itself: it is loaded whole, once, and let go again.

The windows are a part of the job: a job that continues has the same ones. They are written after
all that can be refused was, and before the first block.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from rotq.calibration.data import load_windows
from rotq.calibration.sampled import AT_A_TIME, SampledText, sample_text
from rotq.calibration.texts import SELF, is_own_text
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensors
from rotq.errors import RotqError
from rotq.job.context import Job
from rotq.job.part_names import OWN_TEXT
from rotq.memory import available_memory, release_memory
from rotq.models.limits import limits_of, vocabulary_of
from rotq.models.sizes import head_dim, num_value_heads
from rotq.models.skeleton import Skeleton
from rotq.recipe import Calibration
from rotq.report.lines import size


def writes_own_text(calibration: Calibration) -> bool:
    """Whether any of the texts is the model's own."""
    return any(is_own_text(text.source) for text in calibration.texts)


def with_own_text(job: Job, *, trust_remote_code: bool) -> Job:
    """The job with the windows that the model writes in place of what stood for them.

    Raises:
        RotqError: the model cannot be loaded, or cannot write.
    """
    calibration = job.recipe.calibration
    if not writes_own_text(calibration):
        return job

    def write(first: tuple[int, ...], num_windows: int, length: int, seed: int) -> SampledText:
        if not job.finished(OWN_TEXT):
            job.ranks.once(lambda: _write(job, first, num_windows, length, seed, trust_remote_code))
        return SampledText.of(read_tensors(job.folder.part(OWN_TEXT))["ids_BT"])

    windows = load_windows(
        calibration,
        load_tokenizer(job.source.path, trust_remote_code=trust_remote_code),
        limits_of(job.skeleton.model),
        write=write,
    )
    release_memory()
    return replace(job, windows=windows)


def _write(
    job: Job,
    first: tuple[int, ...],
    num_windows: int,
    length: int,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Make the part, and record what decided it."""
    job.progress.message(f"the model writes {num_windows} windows of {length} tokens")
    started = time.monotonic()
    place = None if job.device.type == "cpu" else str(job.device)
    model = load_model(
        job.source.path, dtype=job.dtype, device_map=place, trust_remote_code=trust_remote_code
    )
    text = sample_text(model, first, num_windows=num_windows, length=length, seed=seed)
    del model
    release_memory()
    save_tensors(job.folder.part(OWN_TEXT), {"ids_BT": text.ids_BT})
    job.folder.record(
        OWN_TEXT,
        {
            "seed": seed,
            "tokens": text.ids_BT.numel(),
            "first": list(first),
            "sha256": text.sha256,
            "seconds": round(time.monotonic() - started, 1),
        },
    )


def writing_memory(skeleton: Skeleton, calibration: Calibration, dtype: torch.dtype) -> int:
    """Bytes of the whole model, its cache and its logits while it writes; 0 where it does not."""
    if not writes_own_text(calibration):
        return 0
    config = skeleton.config
    weights = sum(parameter.numel() for parameter in skeleton.model.parameters())
    rows = min(AT_A_TIME, calibration.num_samples)
    per_token = 2 * skeleton.num_blocks * num_value_heads(config) * head_dim(config)
    cache = rows * calibration.seq_len * per_token
    logits = 4 * 4 * rows * vocabulary_of(skeleton.model)
    return (weights + cache) * dtype.itemsize + logits


def check_room(
    skeleton: Skeleton, calibration: Calibration, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a model that is too large to be loaded whole.

    Raises:
        RotqError: names what it needs and what is free.
    """
    needed = writing_memory(skeleton, calibration, dtype)
    if not needed:
        return
    free = available_memory()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    if free is not None and needed > free:
        raise RotqError(
            f"calibration text {SELF}: the model writes it in one piece, which takes "
            f"{size(needed)} where {size(free)} are free; name a text"
        )
