"""What was said is found where the cache holds it, and drift is that of decoding for real."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from kv_oracle import calibration_of, oracle_cache
from tiny_models import VOCAB, random_ids, tiny_model

from rotq.errors import RotqError
from rotq.evaluation.haystacks import DEPTHS, Prompt, make_prompts
from rotq.evaluation.kv_tasks import UNQUANTIZED, find_answers, measure_drift
from rotq.evaluation.quantized_history import KVScheme, scheme_of

MODEL = tiny_model("llama", dtype=torch.float32)
IDS_N = random_ids(1, 400)[0]


class Letters:
    """Token ids are the bytes of a text."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def scheme(**changes: Any) -> KVScheme:
    return replace(scheme_of(calibration_of(MODEL)), **changes)


@pytest.mark.parametrize("task", ["passkey", "needle"])
def test_a_prompt_says_its_answer_once_more_and_at_its_depth(task: str) -> None:
    hay_N = torch.full((900,), 126)
    prompts = make_prompts(task, Letters(), hay_N, seq_len=700, number=2, seed=3)
    assert [prompt.depth for prompt in prompts] == [d for d in DEPTHS for _ in range(2)]
    places = []
    for prompt in prompts:
        text, answer = (bytes(x.tolist()).decode() for x in (prompt.ids_T, prompt.answer_A))
        assert len(prompt.ids_T) == 700
        assert text.endswith(answer)
        assert answer.strip() in text[: -len(answer)]
        question = text[: -len(answer)].rpartition("\n")[2]
        said = question.removeprefix("What is the pass key? ").replace("T", "T", 1)
        places.append(text.index(said + answer) / len(text))
    assert places[0] < 0.3 < places[5] < 0.7 < places[-1]
    assert places == sorted(places) or task == "needle"


def test_prompts_repeat_with_their_seed() -> None:
    made = [make_prompts("passkey", Letters(), IDS_N, seq_len=200, number=1) for _ in range(2)]
    assert all(torch.equal(a.ids_T, b.ids_T) for a, b in zip(*made, strict=True))
    other = make_prompts("passkey", Letters(), IDS_N, seq_len=200, number=1, seed=1)
    assert not torch.equal(made[0][0].ids_T, other[0].ids_T)


@pytest.mark.parametrize(("seq_len", "words"), [(60, "leave -"), (9000, "the text has 400")])
def test_a_haystack_that_cannot_be_is_refused(seq_len: int, words: str) -> None:
    with pytest.raises(RotqError, match=words):
        make_prompts("passkey", Letters(), IDS_N, seq_len=seq_len, number=1)


def own_prompts(length: int = 40) -> list[Prompt]:
    """Prompts whose answers are what the model itself says next."""
    found = []
    for number, depth in enumerate(DEPTHS):
        ids_T = random_ids(len(DEPTHS), length)[number]
        for _ in range(3):
            with torch.inference_mode():
                best = MODEL(ids_T[None], use_cache=False).logits[0, -1].argmax()
            ids_T = torch.cat((ids_T, best[None]))
        found.append(Prompt(depth=depth, ids_T=ids_T, answer_A=ids_T[-3:]))
    return found


def test_what_the_whole_cache_finds_another_one_may_not() -> None:
    prompts = own_prompts()
    whole = scheme(name="whole", recent=64)
    found = find_answers(MODEL, prompts, [scheme(), whole], task="passkey")
    assert [row.preset for row in found] == [UNQUANTIZED, "k3v3", "whole"]
    assert [found[0].found, found[2].found] == [1.0, 1.0]
    assert found[1].found < 1
    assert found[1].found == pytest.approx(sum(found[1].by_depth) / len(DEPTHS))
    wrong = [replace(p, answer_A=(p.answer_A + 1) % VOCAB) for p in prompts]
    assert find_answers(MODEL, wrong, [], task="passkey")[0].found == 0


def test_drift_is_that_of_decoding_token_by_token() -> None:
    calibration = calibration_of(MODEL)
    prompts_BT = random_ids(3, 12)
    found = measure_drift(MODEL, prompts_BT, [scheme_of(calibration)], new_tokens=20)[0]
    counts = []
    for ids_T in prompts_BT:
        written = [stepwise(cache, ids_T, 20) for cache in (None, oracle_cache(calibration))]
        same = [a == b for a, b in zip(*written, strict=True)]
        counts.append(same.index(False) if False in same else 20)
    assert (found.prompts, found.new_tokens, found.prompt_tokens) == (3, 20, 12)
    assert found.mean == pytest.approx(sum(counts) / 3)
    assert found.median == sorted(counts)[1]
    assert found.mean < 20
    whole = measure_drift(MODEL, prompts_BT, [scheme(recent=64)], new_tokens=20)[0]
    assert (whole.mean, whole.unchanged) == (20, 1.0)


def stepwise(cache: Any, ids_T: torch.Tensor, new_tokens: int) -> list[int]:
    """Greedy tokens, all read one by one; without a cache, all again each time."""
    with torch.inference_mode():
        if cache is not None:
            for t in range(len(ids_T)):
                logits = MODEL(ids_T[None, t : t + 1], past_key_values=cache).logits
        written: list[int] = []
        for _ in range(new_tokens):
            if cache is None:
                all_T = torch.cat((ids_T, torch.tensor(written, dtype=torch.int64)))
                logits = MODEL(all_T[None], use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
            if cache is not None:
                last = torch.tensor([written[-1:]])
                logits = MODEL(last, past_key_values=cache).logits
    return written
