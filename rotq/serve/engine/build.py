"""From a model and settings to an engine: how the cache's bytes are divided."""

from __future__ import annotations

from typing import Any

from rotq.errors import RotqError, told
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.pool.dense import DensePool
from rotq.kv.pool.packed import PackedPool
from rotq.kv.pool.pool import PAGE_SIZE, Pool
from rotq.models.attention.online import rounds_heads
from rotq.serve.engine.engine import Engine
from rotq.serve.engine.model_runner import ModelRunner, rows_that_agree
from rotq.serve.engine.observer import Observer
from rotq.serve.engine.page_allocator import PageAllocator
from rotq.serve.engine.trial import Trial
from rotq.serve.engine.warm_up import warm_up
from rotq.serve.settings import Settings

ROWS_CPU, ROWS_GPU = 8, 32
"""Of a decode step: a CPU pays for every row, a GPU hardly for the first few dozen."""

CHUNK_CPU, CHUNK_GPU = 64, 2048
"""Tokens of a prompt in one pass: a GPU reads all weights for each pass, a CPU computes longer."""

_SPARE_SINKS = 4
"""One in so many more sinks than sequences run, for prompts that are kept."""


def build_engine(
    model: Any,
    calibration: KVCalibration | None,
    settings: Settings,
    *,
    observer: Observer | None = None,
    rows: int | None = None,
) -> Engine:
    """An engine that has not been started.

    Args:
        model: A causal language model of transformers, in eval mode on one device.
        calibration: Of the packed cache; None for a dense one.
        settings: Limits.
        observer: Of the engine.
        rows: Of a decode step; None for what suits the device.

    Raises:
        RotqError: the model cannot be served, or not in so few bytes.
    """
    with told(f"{model.config.model_type}: the model cannot be served"):
        return _build(model, calibration, settings, observer, rows)


def _build(
    model: Any,
    calibration: KVCalibration | None,
    settings: Settings,
    observer: Observer | None,
    rows: int | None,
) -> Engine:
    chunk_pages = _chunk_pages(model, settings)
    trial = Trial(model)
    cost = DensePool.cost(model) if calibration is None else PackedPool.cost(model, calibration)
    sinks = 0 if calibration is None else calibration.sinks
    num_sinks = settings.max_batch + -(-settings.max_batch // _SPARE_SINKS) if sinks else 0
    num_pages = (settings.kv_memory - (num_sinks + (sinks > 0)) * cost.sinks) // cost.page
    if num_pages < 1:
        least = cost.page + (num_sinks + 1) * cost.sinks
        raise RotqError(
            f"{settings.kv_memory} bytes hold no page of {PAGE_SIZE} tokens beside the whole "
            f"tokens of {settings.max_batch} sequences; at least {least} are needed"
        )
    longest = min(_longest(model, settings), sinks + num_pages * PAGE_SIZE)
    table_width = max(1, -(-(longest - sinks) // PAGE_SIZE))
    pool: Pool
    if calibration is None:
        pool = DensePool(model, num_pages=num_pages, table_width=table_width)
    else:
        pool = PackedPool(
            model,
            calibration,
            num_pages=num_pages,
            num_sinks=num_sinks,
            table_width=table_width,
        )
    wanted = rows or min(settings.max_batch, ROWS_GPU if model.device.type == "cuda" else ROWS_CPU)
    rows = rows_that_agree(model, wanted)
    runner = ModelRunner(model, pool, rows=rows, chunk_pages=chunk_pages)
    if calibration is not None:
        # a packed cache rounds in place of the model, and not what is in the same pass
        trial.run(runner, longest, fresh=not rounds_heads(model), stored=False)
    else:
        trial.run(runner, longest, fresh=True, stored=True)
    warm_seconds = warm_up(runner, longest)
    allocator = PageAllocator(
        num_pages=num_pages,
        num_sinks=num_sinks,
        page_size=PAGE_SIZE,
        sinks=sinks,
        chunk_pages=chunk_pages,
    )
    return Engine(
        runner,
        allocator,
        cost,
        longest=longest,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        observer=observer,
        warm_seconds=warm_seconds,
    )


def _chunk_pages(model: Any, settings: Settings) -> int:
    """Pages that one pass over a prompt fills."""
    suitable = CHUNK_GPU if model.device.type == "cuda" else CHUNK_CPU
    return (settings.prefill_chunk or suitable) // PAGE_SIZE


def _longest(model: Any, settings: Settings) -> int:
    """Tokens of a sequence by the model's positions and the settings."""
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None) or settings.max_length
    if settings.max_length > (positions or settings.max_length):
        raise RotqError(
            f"{settings.max_length} tokens are more than the {positions} that "
            f"{config.model_type} was made for"
        )
    return settings.max_length or positions or 1 << 20
