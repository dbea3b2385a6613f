"""Sequences and tokenizers for tests of protein models; the sequences are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import EsmTokenizer, PreTrainedTokenizerFast
from transformers.models.esm.configuration_esm import get_default_vocab_list

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def sequences(number: int, *, shortest: int = 5, longest: int = 30, seed: int = 0) -> list[str]:
    """Random proteins of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (number,), generator=generator).tolist()
    return [
        "".join(RESIDUES[i] for i in torch.randint(0, 20, (n,), generator=generator).tolist())
        for n in lengths
    ]


def write_fasta(file: Path, found: list[str]) -> Path:
    """One record each, lines of 7 letters."""
    records = []
    for number, sequence in enumerate(found):
        lines = [sequence[start : start + 7] for start in range(0, len(sequence), 7)]
        records.append("\n".join([f">s{number} made up", *lines]))
    file.write_text("\n".join(records) + "\n", encoding="utf-8")
    return file


def esm_tokenizer(folder: Path) -> Any:
    """ESM-2's: no separator, <cls> and <eos> around."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vocab.txt"
    file.write_text("\n".join(get_default_vocab_list()), encoding="utf-8")
    return EsmTokenizer(str(file))


def saprot_tokenizer(folder: Path) -> Any:
    """SaProt's: a residue and a letter of structure in each token, 446 in all."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [a + b for a in "ACDEFGHIKLMNPQRSTVWY#" for b in "pynwrqhgdlvtmfsaeikc#"]
    special = ["<cls>", "<pad>", "<eos>", "<unk>", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join([*special, *tokens]), encoding="utf-8")
    return EsmTokenizer(str(folder / "vocab.txt"))


def spaced_tokenizer() -> Any:
    """BERT's way: a space between residues, no X, [CLS] and [SEP] around."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
