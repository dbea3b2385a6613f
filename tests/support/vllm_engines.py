"""Engines of vLLM in the process of the tests, on tiny checkpoints; vLLM is imported when used."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_models import CONFIGS

from rotq.checkpoint.load import load_model

Answer = tuple[list[int], list[float]]
"""Tokens and their log probabilities."""

WIDE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
"""Heads of a width that vLLM's own attention has."""

CONFIGS["llama-wide"] = ("LlamaConfig", WIDE)
CONFIGS["llama-wide-biases"] = (
    "LlamaConfig",
    {**WIDE, "attention_bias": True, "mlp_bias": True},
)
CONFIGS["llama-bytes"] = ("LlamaConfig", {**WIDE, "vocab_size": 258})
CONFIGS["llama-uneven"] = ("LlamaConfig", {**WIDE, "intermediate_size": 320})
CONFIGS["mistral-wide"] = ("MistralConfig", {**WIDE, "sliding_window": 100})
_MOE = {**WIDE, "num_experts_per_tok": 2}
CONFIGS["qwen3-moe-wide"] = (
    "Qwen3MoeConfig",
    {**_MOE, "num_experts": 4, "moe_intermediate_size": 128},
)
CONFIGS["qwen3-moe-narrow"] = (
    "Qwen3MoeConfig",
    {**_MOE, "num_experts": 4, "moe_intermediate_size": 40},
)
CONFIGS["mixtral-wide"] = ("MixtralConfig", {**_MOE, "num_local_experts": 4})
CONFIGS["olmoe-wide"] = ("OlmoeConfig", {**_MOE, "num_experts": 4})


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """vLLM on a checkpoint without a tokenizer."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "dtype": "float32",
        "max_model_len": 1200,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    held = [LLM(model=str(model), **(settings | options))]
    try:
        yield held[0]
    finally:
        # what a failed test keeps alive must not end the next engine's groups
        held.pop().llm_engine.engine_core.shutdown()
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(
    llm: Any, prompts: list[list[int]], tokens: int = 12, lora_request: Any = None
) -> list[Answer]:
    """Greedy answers to prompts that are sent together."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    asked = SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=1, detokenize=False, ignore_eos=True
    )
    given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    found = []
    for request in llm.generate(given, asked, use_tqdm=False, lora_request=lora_request):
        answer = request.outputs[0]
        pairs = zip(answer.token_ids, answer.logprobs, strict=True)
        found.append((list(answer.token_ids), [each[token].logprob for token, each in pairs]))
    return found


def assert_equal_to_transformers(
    path: Path, prompts: list[list[int]], answers: list[Answer], near: float = 1e-4
) -> None:
    """All greedy tokens equal those of transformers on the same file, log p within ``near``."""
    assert_equal_to_model(load_model(path), prompts, answers, near)


@torch.no_grad()
def assert_equal_to_model(
    model: Any, prompts: list[list[int]], answers: list[Answer], near: float = 1e-4
) -> None:
    """The same of a model of transformers."""
    for prompt, (tokens, found) in zip(prompts, answers, strict=True):
        ids_1T = torch.tensor([prompt + tokens])
        log_p = model(ids_1T).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        assert log_p.argmax(-1).tolist() == tokens
        expected = log_p.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=near)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 512, (n,), generator=generator).tolist() for n in lengths]
