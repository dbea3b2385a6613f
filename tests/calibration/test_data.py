"""Tokens of a text, and the seeded draw of windows."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rotq.calibration.data import load_windows, shared
from rotq.calibration.limits import Limits
from rotq.calibration.texts import Text, read_text
from rotq.calibration.tokenized import tokenize
from rotq.errors import RotqError
from rotq.recipe import Calibration
from rotq.recipe.calibration import Share


class ByteTokenizer:
    """Token ids are the UTF-8 bytes; a special token is added unless it is refused."""

    bos_token_id = 257

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        return {"input_ids": [256] * add_special_tokens + list(text.encode())}


def windows_of(path: Path, **changes: Any) -> Any:
    settings = {"num_samples": 5, "seq_len": 7, "seed": 3, "bos": "no", **changes}
    return load_windows(Calibration(source=str(path), **settings), ByteTokenizer(), Limits())


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(32 + i % 90 for i in range(200)))
    return file


def test_windows_are_the_drawn_slices_of_the_text(text_file: Path) -> None:
    windows = windows_of(text_file)
    data = text_file.read_bytes()
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(0, 200 - 7 - 1, (5,), generator=generator).tolist()
    assert windows.ids_BT.tolist() == [list(data[s : s + 7]) for s in starts]
    assert windows.ids_BT.dtype == torch.int64
    assert windows.tokens == 200
    assert windows.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(("bos", "first"), [("auto", 256), ("yes", 257)])
def test_windows_begin_with_a_special_token_and_are_no_longer(
    text_file: Path, bos: str, first: int
) -> None:
    ids_BT = windows_of(text_file, bos=bos).ids_BT
    assert ids_BT.shape == (5, 7)
    assert (ids_BT[:, 0] == first).all()
    assert torch.equal(ids_BT[:, 1:], windows_of(text_file, seq_len=6).ids_BT)


def test_a_window_has_room_for_more_than_its_beginning(text_file: Path) -> None:
    with pytest.raises(RotqError, match="seq_len"):
        windows_of(text_file, bos="yes", seq_len=1)


def test_seed_decides_the_draw(text_file: Path) -> None:
    assert torch.equal(windows_of(text_file).ids_BT, windows_of(text_file).ids_BT)
    assert not torch.equal(windows_of(text_file).ids_BT, windows_of(text_file, seed=4).ids_BT)


@pytest.mark.parametrize(("length", "enough"), [(9, True), (8, False)])
def test_shortest_text(tmp_path: Path, length: int, enough: bool) -> None:
    file = tmp_path / "short.txt"
    file.write_text("x" * length)
    if enough:
        assert windows_of(file, num_samples=1).ids_BT.shape == (1, 7)
    else:
        with pytest.raises(RotqError, match=f"too short: {length} tokens.* at least 9"):
            windows_of(file)


def test_tokenize_adds_no_special_tokens(text_file: Path) -> None:
    ids = tokenize(read_text(str(text_file)), ByteTokenizer())
    assert ids.tolist() == list(text_file.read_bytes())


def test_fast_tokenizers_give_the_tokens_of_a_plain_call(text_file: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<s>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    text = read_text(str(text_file))
    assert tokenizer(text.content)["input_ids"][0] == 256
    plain = tokenizer(text.content, add_special_tokens=False)["input_ids"]
    assert tokenizer.is_fast
    assert tokenize(text, tokenizer).tolist() == plain


class ChatTokenizer(ByteTokenizer):
    """With a template, which writes a role's first letter before what it says."""

    chat_template = "roles"

    def apply_chat_template(
        self, messages: list[Any], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        return "".join(f"{message['role'][0]}:{message['content']};" for message in messages)


@pytest.fixture
def chats(tmp_path: Path) -> Text:
    file = tmp_path / "chats.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}'
        '\n{"text": "plain"}\n'
    )
    return read_text(str(file))


def test_chats_are_written_by_the_models_own_template(chats: Text) -> None:
    assert bytes(tokenize(chats, ChatTokenizer()).tolist()) == b"u:hi;a:yo;\nplain"


def test_chats_without_a_template_are_refused(chats: Text) -> None:
    with pytest.raises(
        RotqError, match=r"chats\.jsonl: it holds messages, and the tokenizer has no"
    ):
        tokenize(chats, ByteTokenizer())


def test_a_template_that_fails_is_one_line(chats: Text) -> None:
    class Broken(ChatTokenizer):
        def apply_chat_template(self, messages: list[Any], **options: bool) -> str:
            raise TypeError("roles must alternate")

    with pytest.raises(RotqError, match=r"the chat template fails: .*roles must alternate"):
        tokenize(chats, Broken())


def test_several_texts_have_shares_of_the_windows_in_turn(tmp_path: Path) -> None:
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text(letter * 200)
    mix = (
        Share(source=str(tmp_path / "a.txt"), share=3.0),
        Share(source=str(tmp_path / "b.txt"), share=1.0),
    )
    settings = Calibration(mix=mix, num_samples=8, seq_len=7, batch_size=1, bos="no")
    windows = load_windows(settings, ByteTokenizer(), Limits())
    letters = "".join(chr(batch.ids_BT[0, 0]) for batch in windows.batches)
    assert sorted(letters) == ["a"] * 6 + ["b"] * 2
    assert letters[:4].count("b") == 1
    assert windows.source == f"{tmp_path / 'a.txt'}, {tmp_path / 'b.txt'}"
    swapped = dataclasses.replace(settings, mix=mix[::-1])
    assert load_windows(swapped, ByteTokenizer(), Limits()).sha256 != windows.sha256


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [
        (8, [3, 1], [6, 2]),
        (3, [100, 1, 1], [1, 1, 1]),
        (7, [1, 1], [4, 3]),
        (10, [0.5, 0.2, 0.3], [5, 2, 3]),
    ],
)
def test_shares(total: int, shares: list[float], counts: list[int]) -> None:
    assert shared(total, shares) == counts


@pytest.mark.parametrize("parts", [False, True], ids=["strings", "parts"])
@pytest.mark.parametrize("given", ["hi", [{"type": "text", "text": "hi"}]], ids=["string", "list"])
def test_no_word_of_a_chat_is_lost(given: Any, parts: bool, tmp_path: Path) -> None:
    """Templates read the content of a message as a string or by its parts; files have both."""

    class Picky(ChatTokenizer):
        def apply_chat_template(
            self, messages: list[Any], *, tokenize: bool, add_generation_prompt: bool
        ) -> str:
            assert not add_generation_prompt
            texts = []
            for message in messages:
                content = message["content"]
                if parts:  # what goes through a string finds no part in it
                    content = "".join(part["text"] for part in content if isinstance(part, dict))
                texts.append(content if isinstance(content, str) else "")
            return "|".join(texts)

    file = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": given}, {"role": "assistant", "content": "yo"}]
    file.write_text(json.dumps({"messages": chat}))
    assert bytes(tokenize(read_text(str(file)), Picky()).tolist()) == b"hi|yo"
