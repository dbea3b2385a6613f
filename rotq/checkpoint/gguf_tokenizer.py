"""Byte-level BPE tokenizers in GGUF's terms.

llama.cpp knows ways to split a text before merging by name; they are told here from the
``pre_tokenizer`` of tokenizer.json, and what it would split otherwise is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotq.checkpoint.files import read_json
from rotq.errors import RotqError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LLAMA3), ("ByteLevel", False)): "llama-bpe",
    (("Split", _LLAMA3.replace("{1,3}", "")), ("ByteLevel", False)): "qwen2",
}
"""llama.cpp's name of a way to split, by the steps of the pre-tokenizer."""


@dataclass(frozen=True, kw_only=True)
class BytePairs:
    """A byte-level BPE vocabulary."""

    split: str
    """llama.cpp's name of how texts are split."""
    tokens: list[str]
    special: set[int]
    """Ids of tokens that steer a model."""
    added: set[int]
    """Ids of other tokens that are found in a text before it is split."""
    unused: set[int]
    """Rows of the embedding without a token."""


def read_tokenizer(folder: Path, vocab_size: int) -> BytePairs:
    """The vocabulary of a folder's tokenizer.json.

    Args:
        vocab_size: Rows of the embedding.

    Raises:
        RotqError: there is none, it is of another kind, or it splits in a way without a name.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise RotqError(f"{folder} has no tokenizer.json, which GGUF's tokenizer is made from")
    content = read_json(file)
    model = content.get("model") or {}
    steps = tuple(_steps(content.get("pre_tokenizer") or {}))
    if model.get("type") != "BPE" or model.get("byte_fallback") or steps not in SPLITS:
        found = ", ".join(str(step[0]) for step in steps) or "nothing"
        raise RotqError(
            f"{file}: a {model.get('type')} tokenizer that splits by {found} is not exported to "
            "GGUF; known: byte-level BPE as of GPT-2, SmolLM, Llama 3 and Qwen 2"
        )
    by_id = {number: token for token, number in model["vocab"].items()}
    added = content.get("added_tokens") or []
    by_id |= {entry["id"]: entry["content"] for entry in added}
    if len(by_id) and max(by_id) >= vocab_size:
        raise RotqError(f"{file} has token {max(by_id)}, the embedding {vocab_size} rows")
    unused = set(range(vocab_size)) - by_id.keys()
    return BytePairs(
        split=SPLITS[steps],
        tokens=[by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)],
        special={entry["id"] for entry in added if entry.get("special")},
        added={entry["id"] for entry in added if not entry.get("special")},
        unused=unused,
    )


def _steps(step: dict[str, Any]) -> list[tuple[str, Any]]:
    """Kind and deciding setting of each step."""
    kind = str(step.get("type"))
    if kind == "Sequence":
        return [one for part in step["pretokenizers"] for one in _steps(part)]
    if kind == "Split":
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        return [(kind, (step.get("pattern") or {}).get("Regex") if isolated else None)]
    if kind == "ByteLevel":
        return [(kind, None if step.get("add_prefix_space") else bool(step.get("use_regex", True)))]
    return [(kind, step.get("individual_digits") if kind == "Digits" else None)]


def add_tokenizer(writer: Any, tokenizer: BytePairs, folder: Path) -> None:
    """Write the vocabulary, its merges, the special tokens and the chat template."""
    from gguf import SpecialVocab, TokenType

    kinds = [TokenType.NORMAL] * len(tokenizer.tokens)
    for ids, kind in (
        (tokenizer.special, TokenType.CONTROL),
        (tokenizer.added, TokenType.USER_DEFINED),
        (tokenizer.unused, TokenType.UNUSED),
    ):
        for number in ids:
            kinds[number] = kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.split)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(kinds)
    special = SpecialVocab(folder, load_merges=True, n_vocab=len(tokenizer.tokens))
    special.add_to_gguf(writer, quiet=True)
