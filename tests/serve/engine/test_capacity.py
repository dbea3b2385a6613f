"""With the same bytes, how many tokens a packed and a whole cache hold at once, by filling them."""

import torch
import transformers
from tiny_served import Listener, generation, running_engine

PROMPT, ANSWER = 536, 41
"""576 tokens stored, for the last token is not: nine pages of a whole cache, to the last place."""
PAGES = 27
"""Of the whole cache: three sequences fill it."""


def model_of(head_dim: int) -> object:
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=640,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.float16).eval()


def fill(model: object, kv: str, budget: int, sequences: int) -> tuple[int, int]:
    """Most tokens that were in the cache at once, and the bytes that it has allocated."""
    most = 0
    with running_engine(model, kv, kv_memory=budget, max_batch=16) as engine:
        listeners = [Listener() for _ in range(sequences)]

        def watch(listener: Listener) -> object:
            def emit(event: object) -> None:
                nonlocal most
                most = max(most, engine.state().tokens)
                listener(event)  # type: ignore[arg-type]

            return emit

        for index, listener in enumerate(listeners):
            prompt = [2 + (index * 31 + 7 * i) % 256 for i in range(PROMPT)]
            assert engine.submit([generation(prompt, ANSWER, watch(listener))])  # type: ignore[arg-type]
        assert all(listener.wait(120).finish == "length" for listener in listeners)
        return most, engine.state().cache_bytes_total


def test_at_least_four_and_a_half_times_the_tokens() -> None:
    model = model_of(64)
    # tokens of a page, keys and values, heads, width, bytes
    budget = PAGES * 64 * 2 * 2 * 64 * 2
    whole, whole_bytes = fill(model, "dense", budget, 4)
    packed, packed_bytes = fill(model, "k3v3", budget, 15)
    assert max(whole_bytes, packed_bytes) <= budget
    # nothing of the whole cache lies waste
    assert whole >= 3 * 570
    assert packed / whole >= 4.5, f"{packed} tokens against {whole}"
