"""Files that travel with a checkpoint's weights: of its tokenizer, its processors and its code.

Tokenizers are made of files of many names, so that they are taken by their kinds. A tokenizer or
model of its own code (``auto_map``) may read any file: what its code or settings name is taken too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath

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

DESCRIPTION = (
    *PATTERNS,
    *SETTINGS,
    "model.safetensors.index.json",
    "report.json",
    "rotq_*",
)
"""All that is read of a model before its weights, its code aside."""


def companion_files(path: Path) -> list[Path]:
    """The files of a checkpoint's folder that its tokenizer, processors and code are made of."""
    found = {file for pattern in PATTERNS for file in path.glob(pattern)}
    if has_code(path):
        code = set(_code(path))
        settings = [path / name for name in SETTINGS]
        found |= code | set(_spoken_of(path.iterdir(), [*code, *settings]))
    ours = {file for pattern in OURS for file in path.glob(pattern)}
    return sorted(file for file in found - ours if file.is_file() and not _is_weight(file))


def has_code(path: Path, names: Iterable[str] = ()) -> bool:
    """Whether the model, its tokenizer, its processors or its generation run code of their own.

    Args:
        path: The folder, with the settings.
        names: Of files that the folder can be given.
    """
    return (
        any("auto_map" in text or "custom_generate" in text for text in _settings(path))
        or (path / "custom_generate").is_dir()
        or any(name.startswith("custom_generate/") for name in names)
    )


def description_names(names: Iterable[str]) -> list[str]:
    """Of the names of a repository's files, those that describe the model: settings, tokenizer."""
    return [
        name
        for name in names
        if any(_matches(name, pattern) for pattern in DESCRIPTION)
        and (name.endswith("safetensors.index.json") or not _is_weight(PurePosixPath(name)))
    ]


def code_names(names: Iterable[str]) -> list[str]:
    """Of the names of a repository's files, those of its code."""
    return [name for name in names if name.endswith(".py") and _is_code(PurePosixPath(name))]


def named_names(path: Path, names: Iterable[str]) -> list[str]:
    """Of the names of a repository's files, those that its settings or its code speak of.

    Args:
        path: The folder, with both.
    """
    files = [path / name for name in names if "/" not in name]
    wanted = _spoken_of(files, [*_code(path), *(path / name for name in SETTINGS)])
    return [file.name for file in wanted if not _is_weight(file)]


def _code(path: Path) -> Iterator[Path]:
    """Python files, also of packages beside the weights."""
    return (file for file in path.rglob("*.py") if _is_code(file.relative_to(path)))


def _is_code(name: PurePath) -> bool:
    """Hidden folders and caches hold none."""
    return not any(part.startswith((".", "__")) for part in name.parts[:-1])


def _spoken_of(files: Iterable[Path], texts: Iterable[Path]) -> Iterator[Path]:
    """Those of ``files`` whose names stand in one of ``texts``."""
    content = "\n".join(_read(file) for file in texts if file.is_file())
    for file in files:
        if not file.name.startswith(".") and file.name in content:
            yield file


def _settings(path: Path) -> Iterator[str]:
    for name in SETTINGS:
        if (path / name).is_file():
            yield _read(path / name)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _matches(name: str, pattern: str) -> bool:
    """Whether a name is one of ``glob``'s; an asterisk stands for no slash."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _is_weight(file: PurePath) -> bool:
    return file.suffix in WEIGHTS or file.name.endswith(".index.json")
