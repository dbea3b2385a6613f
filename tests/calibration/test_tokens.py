"""Whole texts to ids: what a tokenizer's files ask for besides does not act, and stays."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rotq.calibration.tokens import beginning, encode, panics_unprinted
from rotq.errors import RotqError

TEXT = "abab ab aba " * 40


def fast(model: Any, **options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def merging(**options: Any) -> models.BPE:
    vocab = {piece: number for number, piece in enumerate(["a", "b", "ab", "abab", "aba", "<s>"])}
    return models.BPE(vocab, [("a", "b"), ("ab", "a"), ("ab", "ab")], **options)


def test_truncation_and_padding_of_the_file_are_lifted(tmp_path: Path) -> None:
    fast(merging()).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    wanted = encode(AutoTokenizer.from_pretrained(tmp_path), TEXT)
    held = json.loads(file.read_text())
    held["truncation"] = {
        "direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 1
    }  # fmt: skip
    held["padding"] = {
        "strategy": {"Fixed": 500}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 5,
        "pad_type_id": 0, "pad_token": "<s>",
    }  # fmt: skip
    file.write_text(json.dumps(held))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    before = tokenizer.backend_tokenizer.to_str()
    assert encode(tokenizer, TEXT) == wanted
    assert len(wanted) == 120
    # whoever saves the tokenizer saves what it was
    assert tokenizer.backend_tokenizer.to_str() == before


def test_no_merge_is_dropped_by_chance() -> None:
    tokenizer = fast(merging(dropout=0.5))
    before = tokenizer.backend_tokenizer.to_str()
    found = {tuple(encode(tokenizer, TEXT)) for _ in range(5)}
    assert found == {tuple(encode(fast(merging()), TEXT))}
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer(TEXT)["input_ids"] != tokenizer(TEXT)["input_ids"]


def test_special_tokens_in_a_text_are_split_where_the_tokenizer_says_so() -> None:
    for split, wanted in ((False, [0, 5, 1]), (True, [2])):
        tokenizer = fast(merging(), bos_token="<s>", split_special_tokens=split)
        assert encode(tokenizer, "a<s>b") == wanted
        assert tokenizer("a<s>b", add_special_tokens=False)["input_ids"] == wanted


def test_special_tokens_around_a_text_only_where_asked_for() -> None:
    tokenizer = fast(merging(), bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 5)]
    )
    assert encode(tokenizer, "ab") == [2]
    assert encode(tokenizer, "ab", special=True) == [5, 2]


def panicking(folder: Path) -> Any:
    """A tokenizer whose regular expression gives up on many letters in a row."""
    tokenizer = fast(merging())
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_panic_is_one_line_that_names_the_tokenizer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = panicking(tmp_path)
    with (
        pytest.raises(RotqError, match=f"the tokenizer of {tmp_path} fails: Onig: .*retry-limit"),
        panics_unprinted(),
    ):
        encode(tokenizer, "a" * 60 + "b")
    assert capfd.readouterr().err == ""
    assert encode(tokenizer, "ab") == [2]  # it still serves


def test_other_lines_on_stderr_are_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with panics_unprinted():
        os.write(2, b"a warning of native code\n")
    assert capfd.readouterr().err == "a warning of native code\n"
    with pytest.raises(ZeroDivisionError), panics_unprinted():
        os.write(2, b"a warning before an error\n") // 0
    assert capfd.readouterr().err == "a warning before an error\n"


@pytest.mark.parametrize("error", [KeyError("token"), TypeError("two\nlines")])
def test_a_tokenizer_of_its_own_code_that_fails(error: Exception) -> None:
    class Own:
        def __call__(self, text: str, **_: Any) -> Any:
            raise error

    with pytest.raises(RotqError, match="the tokenizer of Own fails: ") as found:
        encode(Own(), "text")
    assert "\n" not in str(found.value)


def test_who_interrupts_is_heard() -> None:
    class Interrupted:
        def __call__(self, text: str, **_: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), panics_unprinted():
        encode(Interrupted(), "text")


def templated(single: str, **options: Any) -> PreTrainedTokenizerFast:
    """Puts special tokens around a text as the template says."""
    tokenizer = fast(merging(), **options)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 5)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("single", "first"), [("<s> $A", (5,)), ("<s> <s> $A <s>", (5, 5)), ("$A <s>", ()), ("$A", ())]
)
def test_a_text_begins_with_what_the_tokenizer_puts_before_it(
    single: str, first: tuple[int, ...]
) -> None:
    tokenizer = templated(single)
    assert beginning(tokenizer) == first
    assert beginning(tokenizer, "no") == ()


def test_bos_is_wanted_though_the_tokenizer_adds_none() -> None:
    assert beginning(templated("$A", bos_token="<s>"), "yes") == (5,)
    with pytest.raises(RotqError, match="has no BOS token"):
        beginning(templated("<s> $A"), "yes")
