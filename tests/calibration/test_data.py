"""Text sources and the seeded draw of windows."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rotq.calibration.data import HELD_OUT_TOPICS, load_windows, read_text, tokenize
from rotq.errors import RotqError
from rotq.recipe import Calibration


class ByteTokenizer:
    """Token ids are the UTF-8 bytes; a special token is added unless it is refused."""

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        return {"input_ids": [256] * add_special_tokens + list(text.encode())}


def windows_of(path: Path, **changes: Any) -> Any:
    settings = {"num_samples": 5, "seq_len": 7, "seed": 3, **changes}
    return load_windows(Calibration(source=str(path), **settings), ByteTokenizer())


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


def test_seed_decides_the_draw(text_file: Path) -> None:
    assert torch.equal(windows_of(text_file).ids_BT, windows_of(text_file).ids_BT)
    assert not torch.equal(windows_of(text_file).ids_BT, windows_of(text_file, seed=4).ids_BT)


@pytest.mark.parametrize(("length", "enough"), [(9, True), (8, False)])
def test_shortest_text(tmp_path: Path, length: int, enough: bool) -> None:
    file = tmp_path / "short.txt"
    file.write_text("x" * length)
    if enough:
        assert windows_of(file).ids_BT.shape == (5, 7)
    else:
        with pytest.raises(RotqError, match=f"too short: {length} tokens.* at least 9"):
            windows_of(file)


def test_bad_byte_is_named_with_its_offset(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(RotqError, match=r"not UTF-8: byte 0xe9 at offset 3"):
        read_text(str(file))


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_text(tmp_path: Path, content: str) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(content)
    with pytest.raises(RotqError, match="is empty"):
        read_text(str(file))


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "~/missing/file"])
def test_missing_file(source: str) -> None:
    with pytest.raises(RotqError, match=f"{re.escape(source)}: no such file"):
        read_text(source)


def test_line_ends_are_those_of_text_mode(tmp_path: Path) -> None:
    file = tmp_path / "dos.txt"
    file.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(str(file)).content == "one\ntwo\nthree\n"


def test_jsonl_takes_the_text_field(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate(["a\u2028b", "second"])]
    file.write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    assert read_text(str(file)).content == "a\u2028b\n\nsecond"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"body": "x"}', 'line 2: no string field "text"'),
        ("[]", "line 2"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(RotqError, match=message):
        read_text(str(file))


def test_fasta_drops_headers_and_joins_lines(tmp_path: Path) -> None:
    file = tmp_path / "proteins.fasta"
    file.write_text(">first protein\nMKV\nLLA\n\n>second\n>third\nGG\n")
    assert read_text(str(file)).content == "MKVLLA\nGG"


def test_fasta_without_header(tmp_path: Path) -> None:
    file = tmp_path / "proteins.fa"
    file.write_text("MKV\n")
    with pytest.raises(RotqError, match="not FASTA"):
        read_text(str(file))


def test_data_set_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, text in (("train", "to train on"), ("test", "to test on")):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert read_text(str(folder)).content == "to train on"
    assert read_text(str(folder), split="test").content == "to test on"
    assert read_text(f"{folder}:test").content == "to test on"


def test_data_set_without_text_column(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(RotqError, match='no column "text", only body'):
        read_text(str(folder))


def test_unknown_data_set_offline() -> None:
    with pytest.raises(RotqError, match="nobody/nothing: no such file, and datasets says"):
        read_text("nobody/nothing")


def test_pydoc_and_its_held_out_part_share_hardly_a_phrase() -> None:
    def phrases(source: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", read_text(source).content.lower())
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    assert len(HELD_OUT_TOPICS) == 3
    held_out = phrases("pydoc-test")
    assert len(held_out) > 10_000
    assert len(held_out & phrases("pydoc")) <= 5


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
