"""Models of tiny_models.py on the disk, whose text is numbers as words: one tokenizer for all."""

from pathlib import Path

import torch
from tiny_models import VOCAB, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

SMALL = {
    "calibration.num_samples": 3,
    "calibration.seq_len": 24,
    "calibration.batch_size": 2,
    "weights.bits": 4,
    "weights.group_size": 16,
    "weights.outer_group_size": 16,
    "solver.target_correction": 0.5,
    "tuning.steps": 2,
}
"""A recipe for a job on such a model that takes a second."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """transformers would pick a class by model type."""
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_model(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: int
) -> Path:
    """The model, with changes of its configuration, and a text of numbered words, text.txt."""
    tiny_model(name, dtype=dtype, **changes).save_pretrained(folder)
    ids = torch.randint(1, VOCAB, (400,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text(" ".join(f"w{number}" for number in ids.tolist()))
    return folder
