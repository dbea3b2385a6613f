"""What travels with the weights: everything that tokenizer, processors and code are made of."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_families import byte_tokenizer
from tiny_models import tiny_model
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from rotq.checkpoint.companions import PATTERNS, companion_files
from rotq.checkpoint.load import load_tokenizer
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import load_recipe

ROOT = Path(__file__).parents[2]

CODE = """
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from .spelling import SPELLING


class Mine(PreTrainedTokenizerFast):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.letters = (Path(kwargs["name_or_path"]) / SPELLING).read_text()
"""


def names_of(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in companion_files(path)}


def fill(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")


def test_every_tokenizer_of_transformers_has_all_of_its_files() -> None:
    names: set[str] = set()
    for classes in TOKENIZER_MAPPING_NAMES.values():
        for name in classes if isinstance(classes, tuple | list) else (classes,):
            for file in _files_of(name or ""):
                names |= {file} if isinstance(file, str) else set(file)
    assert len(names) > 15
    assert not [n for n in names if not any(fnmatch.fnmatch(n, p) for p in PATTERNS)]


def _files_of(tokenizer: str) -> list[str | tuple[str, ...]]:
    try:
        kind = getattr(transformers, tokenizer, None)
        return list((getattr(kind, "vocab_files_names", None) or {}).values())
    except ImportError:  # of one that needs a package that is not here
        return []


def test_templates_and_processors_are_taken_and_nothing_else(tmp_path: Path) -> None:
    wanted = {
        "tokenizer.json",
        "tokenizer.model.v3",
        "tekken.json",
        "qwen.tiktoken",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
    }
    left = (
        "config.json",
        "README.md",
        "rotq_recipe.yaml",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.bin",
        "notes.txt",
        "modeling_mine.py",
        "original/tokenizer.model",
    )
    fill(tmp_path, *wanted, *left)
    assert names_of(tmp_path) == wanted


@pytest.mark.parametrize("declares", ["config.json", "tokenizer_config.json"])
def test_code_takes_along_what_it_names(tmp_path: Path, declares: str) -> None:
    wanted = {"mine.py", "package/inner.py", "letters.dat", declares} - {"config.json"}
    fill(tmp_path, *wanted, "notes.txt", ".git/hooks/x.py", "__pycache__/y.py", "model.safetensors")
    (tmp_path / "mine.py").write_text('FILES = ("letters.dat", "README.md", "model.safetensors")')
    (tmp_path / "README.md").write_text("of the source")
    (tmp_path / declares).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine"]}}))
    assert names_of(tmp_path) == wanted


def test_a_tokenizer_of_its_own_code_loads_from_the_result(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model("llama", dtype=torch.float32).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    (model / "tokenization_mine.py").write_text(CODE)
    (model / "spelling.py").write_text('SPELLING = "letters.dat"\n')
    (model / "letters.dat").write_text("abc")
    file = model / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": [None, "tokenization_mine.Mine"]}
    settings = json.loads(file.read_text()) | {"auto_map": auto_map, "tokenizer_class": "Mine"}
    file.write_text(json.dumps(settings))
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 20)
    recipe = load_recipe(
        ROOT / "configs" / "rtn.yaml",
        {
            "calibration.source": str(text),
            "calibration.num_samples": 1,
            "calibration.seq_len": 16,
            "weights.group_size": 8,
        },
    )
    quantize_model(model, recipe, tmp_path / "out", trust_remote_code=True)
    loaded = load_tokenizer(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "Mine"
    assert loaded.letters == "abc"
