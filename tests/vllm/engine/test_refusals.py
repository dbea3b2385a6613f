"""What is refused, in one line, before a model is loaded where that is possible."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import engine

from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid
from rotq.layers.online_heads import OnlineHeads

KV: dict[str, Any] = {"rotq_kv": "k3v3"}


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(4)


def configure(model: Path, **options: Any) -> Any:
    """What vLLM does before it starts an engine."""
    from vllm import EngineArgs

    given = {"skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 8}
    return EngineArgs(model=str(model), **(given | options)).create_engine_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"additional_config": {"rotq_vk": "k3v3"}}, "no rotq_vk; did you mean rotq_kv"),
        ({"additional_config": {"rotq_kv": "k3v33"}}, "no KV preset 'k3v33'"),
        ({"additional_config": {"rotq_kv": "gone.safetensors"}}, "no such file"),
        ({"attention_backend": "CUSTOM"}, "wants to know which"),
        ({"additional_config": KV, "attention_backend": "CPU_ATTN"}, "backend CPU_ATTN"),
        ({"additional_config": KV, "kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        (
            {
                "additional_config": KV,
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 2,
                },
            },
            "speculative decoding",
        ),
        ({"additional_config": KV, "block_size": 32}, "--block-size 32 is no multiple of 64"),
        (
            {"additional_config": KV, "max_num_batched_tokens": 100},
            "--max-num-batched-tokens must be at least 136, got 100",
        ),
        (
            {"additional_config": KV, "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "which --scheduler-cls .* does not promise",
        ),
    ],
)
def test_options(options: dict[str, Any], message: str, model: Path) -> None:
    with pytest.raises(Exception, match=message):
        configure(model, **options)


def test_a_packed_cache_is_set_up(model: Path) -> None:
    config = configure(model, additional_config=KV)
    assert config.attention_config.backend.name == "CUSTOM"
    assert config.cache_config.block_size == 128
    assert config.scheduler_config.scheduler_cls == "rotq.vllm.scheduler.BlockScheduler"


def test_without_one_nothing_changes(model: Path) -> None:
    config = configure(model)
    assert config.attention_config.backend is None
    assert config.scheduler_config.scheduler_cls is None


def test_rounded_keys_and_values(checkpoint: Callable[..., Path]) -> None:
    heads = OnlineHeads(rotated=True, grid=ActivationGrid(bits=4, symmetric=False))
    path = checkpoint(4, format="rotq", heads=heads)
    with (
        pytest.raises(RotqError, match="rounds keys and values, which vLLM's cache does not"),
        engine(path),
    ):
        pass
    with engine(path, additional_config=KV):
        pass


@pytest.mark.parametrize("outer", ["embed_tokens", "lm_head"])
def test_packed_embeddings_and_heads(outer: str) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    from rotq.checkpoint.scheme_writing import quantization_config
    from rotq.formats.integer import Grid
    from rotq.vllm.quantization import RotqConfig

    name = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}[outer]
    layers = {"model.layers.0.mlp.up_proj": Grid(bits=4, group_size=8, symmetric=True)}
    packed = {name: Grid(bits=6, group_size=8, symmetric=True)}
    kind = ParallelLMHead if outer == "lm_head" else VocabParallelEmbedding
    layer = kind.__new__(kind)
    for asked, refused in ((packed, True), ({}, False)):
        config = RotqConfig.from_config(
            {**quantization_config(layers, [], "rotq", outer=asked), "quant_method": "rotq"}
        )
        if refused:
            with pytest.raises(RotqError, match=f"{outer}: packed embeddings and heads are not"):
                config.get_quant_method(layer, name)
        else:
            config.get_quant_method(layer, name)
