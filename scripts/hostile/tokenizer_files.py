"""Hostile tokenizer.json and the files beside it."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from bench import Bench, Case
from config_files import DEEP

Values = dict[str, Any]


def _split(pattern: object) -> Values:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


CHANGES: dict[str, Callable[[Values], object]] = {
    "no-model": lambda t: t.pop("model"),
    "model-null": lambda t: t.update(model=None),
    "model-unknown": lambda t: t["model"].update(type="Magic"),
    "vocabulary-list": lambda t: t["model"].update(vocab=["a", "b"]),
    "vocabulary-empty": lambda t: t["model"].update(vocab={}, merges=[]),
    "vocabulary-negative": lambda t: t["model"]["vocab"].update(a=-1),
    "vocabulary-twice": lambda t: t["model"]["vocab"].update(a=5, b=5),
    "vocabulary-far": lambda t: t["model"]["vocab"].update(t=4_000_000_000),
    "vocabulary-beyond": lambda t: t["model"]["vocab"].update(t=100_000),
    "merges-unknown": lambda t: t["model"].update(merges=[["no", "such"]]),
    "merges-numbers": lambda t: t["model"].update(merges=[1, 2]),
    "regex-broken": lambda t: t.update(pre_tokenizer=_split({"Regex": "("})),
    "regex-slow": lambda t: t.update(pre_tokenizer=_split({"Regex": "(?:(?:a|b|[a-z ])+)+!$"})),
    "regex-backtracking": lambda t: t.update(pre_tokenizer=_split({"Regex": r"(\w+\s?)+\1x"})),
    "regex-empty": lambda t: t.update(pre_tokenizer=_split({"Regex": ""})),
    "pre-tokenizer-word": lambda t: t.update(pre_tokenizer="x"),
    "normalizer-unknown": lambda t: t.update(normalizer={"type": "Magic"}),
    "normalizer-nothing-left": lambda t: t.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    ),
    "normalizer-grows": lambda t: t.update(
        normalizer={"type": "Replace", "pattern": {"String": "o"}, "content": "o" * 2000}
    ),
    "added-far": lambda t: t["added_tokens"].append(
        {**t["added_tokens"][0], "id": 2**31, "content": "quick"}
    ),
    "added-word": lambda t: t.update(added_tokens="x"),
    "added-negative": lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": -5}),
    "truncation-one": lambda t: t.update(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    ),
    "truncation-stride": lambda t: t.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 9}
    ),
    "padding-far": lambda t: t.update(
        padding={
            "strategy": {"Fixed": 1000},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 10**6,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ),
    "post-processor": lambda t: t.update(
        post_processor={"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": 3}
    ),
    "version": lambda t: t.update(version="9.9"),
}

FILES: dict[str, tuple[str, str | bytes]] = {
    "empty": ("tokenizer.json", ""),
    "cut": ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a"'),
    "list": ("tokenizer.json", "[]"),
    "nothing": ("tokenizer.json", "{}"),
    "nul": ("tokenizer.json", b"\0" * 100),
    "deep": ("tokenizer.json", '{"model": ' + DEEP + "}"),
    "config-empty": ("tokenizer_config.json", ""),
    "config-list": ("tokenizer_config.json", "[]"),
    "config-deep": ("tokenizer_config.json", DEEP),
    "config-class": ("tokenizer_config.json", '{"tokenizer_class": "NoSuchTokenizer"}'),
    "config-class-number": ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    "config-class-list": ("tokenizer_config.json", '{"tokenizer_class": ["A"]}'),
    "config-end-number": ("tokenizer_config.json", '{"eos_token": 5}'),
    "config-end-object": ("tokenizer_config.json", '{"eos_token": {"content": 5}}'),
    "config-added": ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 5}}'),
    "config-length": ("tokenizer_config.json", '{"model_max_length": "many"}'),
    "config-code": (
        "tokenizer_config.json",
        '{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "tokenizer_class": "T"}',
    ),
    "special-list": ("special_tokens_map.json", "[]"),
    "special-number": ("special_tokens_map.json", '{"eos_token": 5}'),
    "added-words": ("added_tokens.json", '{"quick": "far"}'),
}


def cases() -> Iterator[Case]:
    for name, (file, content) in FILES.items():
        yield from _each(name, lambda bench, f=file, c=content: bench.damaged(bench.llama, f, c))
    for name, change in CHANGES.items():
        yield from _each(name, lambda bench, c=change: _changed(bench, c))
    yield Case("tokenizer-missing-job", _missing)


def _each(name: str, build: Callable[[Bench], Any]) -> Iterator[Case]:
    yield Case(f"tokenizer-{name}-ppl", lambda bench: bench.ppl(build(bench)))
    yield Case(f"tokenizer-{name}-job", lambda bench: bench.quantize(build(bench), bench.out()))


def _changed(bench: Bench, change: Callable[[Values], object]) -> Any:
    values = json.loads((bench.llama / "tokenizer.json").read_text())
    change(values)
    return bench.damaged(bench.llama, "tokenizer.json", json.dumps(values))


def _missing(bench: Bench) -> list[object]:
    model = bench.copy(bench.llama)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    return bench.quantize(model, bench.out())
