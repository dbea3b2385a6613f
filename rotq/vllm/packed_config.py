"""A configuration of vLLM's, prepared for a packed cache, or refused.

This is done once, before any process of the engine starts: what the cache cannot do is said before
the model is loaded.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from rotq.checkpoint.scheme import read_scheme
from rotq.errors import RotqError
from rotq.kv.cache.support import check_calibrated, windows
from rotq.vllm.settings import load_kv, read_settings

BLOCK_SIZE = 128
"""Tokens of a block where the user does not say; the first whole tokens of a sequence have room in
each block, so larger ones hold more, and shorter prompts share none of them."""

MULTIPLE = 64
"""Tokens that a block's size is a multiple of."""

SCHEDULERS = {
    False: "rotq.vllm.scheduler.BlockScheduler",
    True: "rotq.vllm.scheduler.AsyncBlockScheduler",
}
"""By whether it schedules ahead."""


def prepare(config: Any) -> None:
    """Set a ``VllmConfig`` up for ``rotq_kv``, if it asks for that; may be repeated.

    Raises:
        RotqError: it asks for something else, too, that a packed cache does not do; or the preset
            or file of constants is not the model's.
    """
    settings = read_settings(config.additional_config)
    backend = config.attention_config.backend
    if settings.kv is None:
        if backend == AttentionBackendEnum.CUSTOM:
            raise RotqError(
                "--attention-backend CUSTOM is rotq's packed cache, and wants to know which: "
                '--additional-config \'{"rotq_kv": "k3v3"}\', or a file of rotq calibrate-kv'
            )
        _refuse_rounded_heads(config.model_config)
        return
    if config.model_config is None:
        return
    _refuse(config)
    whole = config.model_config.hf_config
    check_calibrated(whole, load_kv(settings.kv, whole))
    windows(whole.get_text_config(decoder=True))
    config.attention_config.backend = AttentionBackendEnum.CUSTOM
    _set_block_size(config.cache_config)
    _set_scheduler(config)


def _refuse(config: Any) -> None:
    """What is refused whatever the model."""
    parallel, backend = config.parallel_config, config.attention_config.backend
    wrong = {
        f"--attention-backend {getattr(backend, 'name', backend)}": backend
        not in (None, AttentionBackendEnum.CUSTOM),
        "a backend for each kind of attention": config.attention_config.backend_per_kind,
        f"--kv-cache-dtype {config.cache_config.cache_dtype}": config.cache_config.cache_dtype
        != "auto",
        "speculative decoding": config.speculative_config is not None,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "a model with latent attention (MLA)": config.model_config.use_mla,
        "an encoder": config.model_config.is_encoder_decoder,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise RotqError(f"rotq_kv does not go together with {name}")


def _refuse_rounded_heads(model: Any) -> None:
    """Of a checkpoint; a rotation of heads alone changes no score."""
    quantization = getattr(model and model.hf_config, "quantization_config", None) or {}
    if quantization.get("quant_method") == "rotq" and read_scheme(quantization).heads.grid:
        raise RotqError(
            "the checkpoint rounds keys and values, which vLLM's cache does not; pack them "
            'instead with --additional-config \'{"rotq_kv": "k3v3"}\', or quantize without '
            "kv_cache.bits"
        )


def _set_block_size(cache: Any) -> None:
    if not cache.user_specified_block_size:
        cache.block_size = BLOCK_SIZE
    if cache.block_size % MULTIPLE:
        raise RotqError(f"rotq_kv: --block-size {cache.block_size} is no multiple of {MULTIPLE}")


def _set_scheduler(config: Any) -> None:
    """One that cuts prompts where blocks end, and room for it to do so."""
    scheduler, block = config.scheduler_config, config.cache_config.block_size
    wanted = SCHEDULERS[bool(scheduler.async_scheduling)]
    if scheduler.scheduler_cls not in (None, *SCHEDULERS.values()):
        raise RotqError(
            f"rotq_kv: prompts must be cut where blocks end, which --scheduler-cls "
            f"{scheduler.scheduler_cls} does not promise; leave it out, or name {wanted}"
        )
    scheduler.scheduler_cls = wanted
    least = block + scheduler.max_num_seqs
    if scheduler.enable_chunked_prefill and scheduler.max_num_batched_tokens < least:
        raise RotqError(
            f"rotq_kv: passes of prompts are whole blocks of {block} tokens beside up to "
            f"{scheduler.max_num_seqs} sequences; --max-num-batched-tokens must be at least "
            f"{least}, got {scheduler.max_num_batched_tokens}"
        )
    if 0 < scheduler.long_prefill_token_threshold < block:
        raise RotqError(
            f"rotq_kv: --long-prefill-token-threshold must be 0 or at least a block, {block}"
        )
