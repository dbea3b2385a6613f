"""What hostile files are made from: small sound models, texts and files of rotq, made once."""

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from click.testing import CliRunner
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer
from transformers.models.esm.configuration_esm import get_default_vocab_list

from rotq.cli.main import main

sys.path.append(str(Path(__file__).resolve().parents[1]))

from train_tiny import make_model, make_tokenizer

SENTENCE = "the quick brown fox jumps over the lazy dog and 9 others. "


@dataclass
class Bench:
    """A folder to work in."""

    work: Path

    @cached_property
    def text(self) -> Path:
        """A text of some hundred tokens."""
        (self.work / "text.txt").write_text(SENTENCE * 40)
        return self.work / "text.txt"

    @cached_property
    def fasta(self) -> Path:
        """Two proteins."""
        records = [f">p{n} sound\n{'MKTAYIAKQRQISFVKSHFSRQ' * 3}\n" for n in range(2)]
        (self.work / "sound.fasta").write_text("".join(records))
        return self.work / "sound.fasta"

    @cached_property
    def llama(self) -> Path:
        """A Llama with a byte-level tokenizer."""
        folder, tokenizer = self.work / "llama", make_tokenizer(SENTENCE * 10, vocab_size=300)
        make_model(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    @cached_property
    def esm(self) -> Path:
        """An ESM-2 of 33 tokens."""
        folder = self.work / "esm"
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(get_default_vocab_list()))
        EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        config = EsmConfig(
            vocab_size=33,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            position_embedding_type="rotary",
            pad_token_id=1,
            mask_token_id=32,
        )
        torch.manual_seed(0)
        EsmForMaskedLM(config).save_pretrained(folder)
        return folder

    @cached_property
    def packed(self) -> Path:
        """What ``rotq quantize`` makes of the Llama."""
        self.command(*self.quantize(self.llama, self.work / "packed"))
        return self.work / "packed"

    @cached_property
    def kv(self) -> Path:
        """What ``rotq calibrate-kv`` makes of the Llama."""
        file = self.work / "kv.safetensors"
        small = ["--num-samples", "2", "--calibration-seq-len", "64"]
        self.command("calibrate-kv", self.llama, "-o", file, "--calibration", self.text, *small)
        return file

    def command(self, *arguments: object) -> None:
        """A command that must succeed."""
        done = CliRunner().invoke(main, [*map(str, arguments)])
        assert done.exit_code == 0, done.output

    def quantize(self, model: Path, output: Path | None = None, *more: object) -> list[object]:
        """A job of a second; without ``output`` a dry run."""
        small = ["--num-samples", 2, "--seq-len", 32, "--set", "weights.group_size=16"]
        small += more if "--calibration" in more else ["--calibration", self.text, *more]
        last = ["--dry-run"] if output is None else ["-o", output]
        return ["quantize", model, "-c", "rtn", *small, *last]

    def ppl(self, model: Path, text: Path | None = None) -> list[object]:
        """Perplexity on one window."""
        return ["eval", "ppl", model, "--text", text or self.text, "--windows", 1, "--seq-len", 32]

    def out(self) -> Path:
        """A place for a result that nothing has yet."""
        return self.fresh("out")

    def fresh(self, name: str) -> Path:
        """A path that nothing has yet, of this name or one like it."""
        path = self.work / "case" / name
        path.parent.mkdir(exist_ok=True)
        number = 0
        while os.path.lexists(path):
            number += 1
            path = path.with_name(f"{name}-{number}")
        return path

    def copy(self, model: Path) -> Path:
        """A model that may be damaged: its files are links to the sound ones until replaced."""
        copied = self.fresh(model.name)
        shutil.copytree(model, copied, copy_function=os.link)
        return copied

    def damaged(self, model: Path, name: str, content: bytes | str) -> Path:
        """A copy of a model with one file replaced, or one more."""
        return replaced(self.copy(model) / name, content).parent

    def file(self, name: str, content: bytes | str) -> Path:
        """A file of its own."""
        return replaced(self.fresh(name), content)

    def clear(self) -> None:
        """Forget what the last case was given and what it made."""
        shutil.rmtree(self.work / "case", ignore_errors=True)


def replaced(path: Path, content: bytes | str) -> Path:
    """Write a file where a link to a sound one may lie."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@dataclass(frozen=True)
class Case:
    """A hostile file and the command that reads it."""

    name: str
    build: Callable[[Bench], Iterable[object]]
    """Writes the file; returns the arguments of the command."""
