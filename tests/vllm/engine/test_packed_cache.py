"""Keys and values in packed blocks against ``PackedCache`` in passes of the same cuts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from vllm_engines import Answer, ask, engine, prompts_of

from rotq.kv import PackedCache
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.presets import preset
from rotq.vllm.settings import load_kv

BLOCK = 64
NEAR = 1e-5
"""Of log probabilities, absolute and relative, up to the first code that flips."""
FLIPPED = 0.01
"""From there on: a sum's last bit decides between two levels."""


@pytest.fixture(scope="module")
def model(dense_checkpoint: Callable[..., Path]) -> Path:
    return dense_checkpoint()


@pytest.fixture(scope="module")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Constants with everything: means that turn, query metrics, searched codes."""
    loaded = loaded_from(model)
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(1, 512, (4, 128), generator=generator)
    path = tmp_path_factory.mktemp("kv") / "kv.safetensors"
    calibrate(loaded, ids_BT, preset("k3v3")).save(path)
    return path


def loaded_from(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def by_packed_cache(path: Path, kv: str, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log probabilities (tokens, vocabulary) that lead to each of the tokens."""
    loaded = loaded_from(path)
    cache = PackedCache(loaded, load_kv(kv, loaded.config))
    length = len(prompt)
    ends = [*range(BLOCK, length, BLOCK), *range(length, length + len(tokens))]
    ids, at, found = prompt + tokens, 0, []
    for end in ends:
        found.append(loaded(torch.tensor([ids[at:end]]), past_key_values=cache).logits[0])
        at = end
    return torch.cat(found)[length - 1 :].float().log_softmax(-1)


def assert_equal_to_packed_cache(
    path: Path, kv: str, prompts: list[list[int]], answers: list[Answer]
) -> None:
    """Tokens are equal, and most answers to the last digits; in the others a code has flipped."""
    unflipped = 0
    for prompt, (tokens, found) in zip(prompts, answers, strict=True):
        log_p = by_packed_cache(path, kv, prompt, tokens)
        assert log_p.argmax(-1).tolist() == tokens
        expected = log_p.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=FLIPPED)
        unflipped += torch.allclose(torch.tensor(found), expected, rtol=NEAR, atol=NEAR)
    assert 2 * unflipped > len(prompts)


def packed(path: Path, kv: str | Path, **options: Any) -> Any:
    return engine(path, additional_config={"rotq_kv": str(kv)}, block_size=BLOCK, **options)


@pytest.mark.parametrize("constants", ["k3v3", "calibrated"])
def test_prompts_alone_again_and_together(
    constants: str, model: Path, request: pytest.FixtureRequest
) -> None:
    kv = constants if constants == "k3v3" else str(request.getfixturevalue(constants))
    prompts = prompts_of(3, 70, 150, 1000)
    with packed(model, kv) as llm:
        alone = [ask(llm, [prompt])[0] for prompt in prompts]
        assert llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        again = [ask(llm, [prompt])[0] for prompt in prompts]
        together = ask(llm, prompts)
    assert_equal_to_packed_cache(model, kv, prompts, alone)
    # what was found in the cache gives the first answer, bit for bit
    assert again == alone
    # in company matrix products have other numbers of rows
    assert_equal_to_packed_cache(model, kv, prompts, together)


def test_a_beginning_is_found(model: Path) -> None:
    (prompt,) = prompts_of(150)
    with packed(model, "k3v3") as llm:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        asked = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        counts = [
            llm.generate([TokensPrompt(prompt_token_ids=given)], asked, use_tqdm=False)[
                0
            ].num_cached_tokens
            for given in (prompt, prompt, prompt[:100] + [7] * 50)
        ]
    assert counts == [0, 128, 64]


def test_an_answer_is_not_found_as_a_prompt(model: Path) -> None:
    """Its tokens were run one by one, a prompt's are run by blocks."""
    (prompt,) = prompts_of(100)
    with packed(model, "k3v3") as llm:
        ((tokens, _),) = ask(llm, [prompt], tokens=100)
        (found,) = ask(llm, [prompt + tokens])
    with packed(model, "k3v3") as llm:
        (expected,) = ask(llm, [prompt + tokens])
    assert found == expected


def test_what_is_run_again_is_run_as_it_was(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that loses its blocks in the middle of its answer, and what was found in them."""
    from rotq.vllm.scheduler import BlockScheduler

    schedule, steps = BlockScheduler.schedule, 0

    def forgetful(scheduler: Any, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 40:
            assert scheduler.running[0].num_output_tokens > 30
            scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(scheduler, *args)

    (prompt,) = prompts_of(100)
    with packed(model, "k3v3") as llm:
        expected = ask(llm, [prompt], tokens=60)
        llm.reset_prefix_cache()
        monkeypatch.setattr(BlockScheduler, "schedule", forgetful)
        found = ask(llm, [prompt], tokens=60)
    # the prompt, its answer, and the first part of that again
    assert steps > 90
    assert found == expected


def test_requests_that_give_their_blocks_to_others(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt, preempted = Scheduler._preempt_request, []

    def counted(scheduler: Any, request: Any, *args: Any, **more: Any) -> None:
        preempted.append(request.num_output_tokens)
        preempt(scheduler, request, *args, **more)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    prompts = prompts_of(100, 70, 90)
    with packed(model, "k3v3", num_gpu_blocks_override=8, max_model_len=256) as llm:
        together = ask(llm, prompts, tokens=80)
    assert max(preempted) > 10
    for prompt, (tokens, found) in zip(prompts, together, strict=True):
        log_p = by_packed_cache(model, "k3v3", prompt, tokens)
        assert log_p.argmax(-1).tolist() == tokens
        # in long answers several codes flip; run as prompts they would be ten times as far off
        expected = log_p.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=5 * FLIPPED)


def test_prompts_that_share_a_budget(model: Path) -> None:
    """The scheduler's cuts are moved to the ends of blocks."""
    prompts = prompts_of(150, 90, 333)
    with packed(model, "k3v3", max_num_batched_tokens=100, enable_prefix_caching=False) as llm:
        together = ask(llm, prompts)
    assert_equal_to_packed_cache(model, "k3v3", prompts, together)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_sliding_windows(
    enable_prefix_caching: bool, dense_checkpoint: Callable[..., Path]
) -> None:
    path = dense_checkpoint("mistral-wide")
    prompts = prompts_of(70, 150, 333)
    with packed(path, "k3v3", enable_prefix_caching=enable_prefix_caching) as llm:
        alone = [ask(llm, [prompt])[0] for prompt in prompts]
        again = [ask(llm, [prompt])[0] for prompt in prompts]
    assert again == alone
    assert_equal_to_packed_cache(path, "k3v3", prompts, alone)


def test_room(model: Path) -> None:
    """Tokens that the same memory holds, by vLLM's own count."""
    tokens = {}
    for name, options in (("whole", {}), ("packed", {"additional_config": {"rotq_kv": "k3v3"}})):
        with engine(model, block_size=128, **options) as llm:
            cache = llm.llm_engine.vllm_config.cache_config
            tokens[name] = cache.num_gpu_blocks * cache.block_size
    assert tokens["packed"] > 7.7 * tokens["whole"]
