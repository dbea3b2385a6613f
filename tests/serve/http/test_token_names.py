"""Names of tokens: all different, and their bytes where they are known."""

from typing import Any

import pytest
from asking import chat, post
from tiny_served import Running, byte_tokenizer, protein_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rotq.serve.http.token_names import TokenNames


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words with and without a space before them, letters, and a token for each byte."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in ("\u2581", "a", "A", "\u2581a", "b", "ab", "\u2581ab", ".", "\u2581.", "\u00e9"):
        vocabulary[word] = len(vocabulary)
    merges = [("a", "b"), ("\u2581", "ab"), ("\u2581", "a"), ("\u2581", ".")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[CLS]", "a", "ing", "##ing", "##a", ".", "!"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]")


def names_of(tokenizer: Any, extra: int = 3) -> tuple[TokenNames, int]:
    return TokenNames(tokenizer, len(tokenizer) + extra), len(tokenizer) + extra


@pytest.mark.parametrize(
    "make", [byte_tokenizer, protein_tokenizer, sentencepiece_tokenizer, word_piece_tokenizer]
)
def test_no_two_tokens_have_one_name(make: Any) -> None:
    """With rows of the model that the tokenizer knows nothing of."""
    names, number = names_of(make())
    assert len({names[token].name for token in range(number)}) == number
    assert names[number - 1].name == f"token_id:{number - 1}"
    assert names[number - 1].content is None


def test_bytes_of_a_byte_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    names, _ = names_of(tokenizer)
    for text in ("a", " ", "\n", "\u00e9", "\U0001f336", "\ufffd"):
        told = [names[token] for token in tokenizer(text)["input_ids"]]
        assert b"".join(token.content or b"" for token in told) == text.encode()
        if len(told) > 1:
            assert [token.name for token in told] == [
                f"bytes:\\x{byte:02x}" for byte in text.encode()
            ]
        else:
            assert told[0].name == text
    assert names[1].name == "<end>"


def test_sentencepiece_tells_spaces_and_spelled_out_bytes() -> None:
    tokenizer = sentencepiece_tokenizer()
    names, _ = names_of(tokenizer)

    def name(spelling: str) -> str:
        return names[tokenizer.convert_tokens_to_ids(spelling)].name

    assert (name("ab"), name("\u2581ab")) == ("ab", " ab")
    assert (name("A"), name("<0x41>")) == ("A", "bytes:\\x41")
    assert name("<0xE2>") == "bytes:\\xe2"
    assert name("<0x42>") == "B"
    assert names[tokenizer.convert_tokens_to_ids("<0xE2>")].content == b"\xe2"


def test_word_pieces_tell_beginnings_from_ends() -> None:
    names, _ = names_of(word_piece_tokenizer())
    assert (names[3].name, names[4].name) == (" ing", "ing")
    assert names[1].name == "[CLS]"


def test_a_scoring_tool_finds_the_greedy_token(server: Running) -> None:
    body = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    found = post(server, {**body, "logprobs": 20}).json()["choices"][0]["logprobs"]
    assert any(token.startswith("bytes:") for token in found["tokens"])
    for token, value, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert len(top) == 20
        assert top[token] == value == max(top.values())


def test_the_token_that_was_drawn_is_told_too(server: Running) -> None:
    body = {"prompt": "hello", "max_tokens": 12, "seed": 3, "logprobs": 1, "ignore_eos": True}
    found = post(server, body).json()["choices"][0]["logprobs"]
    both = list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))
    assert all(top[token] == value for token, value, top in both)
    assert {len(top) for _, _, top in both} == {1, 2}


def test_a_prompt_that_is_scored_has_its_own_values(server: Running) -> None:
    body = {"prompt": "h\u00e9", "max_tokens": 0, "echo": True, "logprobs": 2}
    found = post(server, body).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert found["top_logprobs"][1]["bytes:\\xc3"] == found["token_logprobs"][1]


def test_chats_tell_bytes_of_parts_of_characters(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "ignore_eos": True}
    found = chat(server, **body, temperature=0, logprobs=True, top_logprobs=20).json()
    entries = found["choices"][0]["logprobs"]["content"]
    for entry in entries:
        assert len({top["token"] for top in entry["top_logprobs"]}) == 20
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])
    parts = [entry for entry in entries if entry["token"].startswith("bytes:")]
    assert parts
    assert all(entry["token"] == f"bytes:\\x{entry['bytes'][0]:02x}" for entry in parts)
