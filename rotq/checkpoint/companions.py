"""Files that travel with a checkpoint's weights: of its tokenizer, its processors and its code.

Tokenizers are made of files of many names, so that they are taken by their kinds. A tokenizer or
model of its own code (``auto_map``) may read any file: what its code or settings name is taken too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

PATTERNS = (
    "tokenizer*",
    "*tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "*.vocab",
    "merges*.txt",
    "*.model",
    "*.spm",
    "*.bpe",
    "*.codes",
    "*.tiktoken",
    "tekken.json",
    "dict*.txt",
    "*.tokenizer",
    "normalizer.json",
    "emoji.json",
    "byte_maps.json",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "*_preprocessor_config.json",
)
"""Of a tokenizer, its chat templates, and the processors of what is no text."""

SETTINGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
"""Files that may say that code comes with the checkpoint."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
"""Never taken, whatever they are called."""


OURS = ("README.md", "config.json", "report.json", "rotq_*")
"""What a job writes itself."""


def companion_files(path: Path) -> list[Path]:
    """The files of a checkpoint's folder that its tokenizer, processors and code are made of."""
    found = {file for pattern in PATTERNS for file in path.glob(pattern)}
    if has_code(path):
        code = set(_code(path))
        found |= code | set(_named(path, [*code, *(path / name for name in SETTINGS)]))
    ours = {file for pattern in OURS for file in path.glob(pattern)}
    return sorted(file for file in found - ours if file.is_file() and not _is_weight(file))


def has_code(path: Path) -> bool:
    """Whether the model, its tokenizer, its processors or its generation run code of their own."""
    return (
        any("auto_map" in text or "custom_generate" in text for text in _settings(path))
        or (path / "custom_generate").is_dir()
    )


def _code(path: Path) -> Iterator[Path]:
    """Python files, also of packages beside the weights; hidden folders and caches are no code."""
    for file in path.rglob("*.py"):
        parents = file.relative_to(path).parts[:-1]
        if not any(part.startswith((".", "__")) for part in parents):
            yield file


def _named(path: Path, texts: Iterable[Path]) -> Iterator[Path]:
    """Files of the folder whose names stand in one of ``texts``."""
    content = "\n".join(_read(file) for file in texts if file.is_file())
    for file in path.iterdir():
        if not file.name.startswith(".") and file.name in content:
            yield file


def _settings(path: Path) -> Iterator[str]:
    for name in SETTINGS:
        if (path / name).is_file():
            yield _read(path / name)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _is_weight(file: Path) -> bool:
    return file.suffix in WEIGHTS or file.name.endswith(".index.json")
