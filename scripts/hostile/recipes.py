"""Hostile recipes and values of --set."""

from collections.abc import Iterator

from bench import Bench, Case
from config_files import DEEP


def _bomb(levels: int) -> str:
    lines = ["  a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"  a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "name:\n" + "\n".join(lines) + "\n"


def _merge_bomb(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


FILES: dict[str, str | bytes] = {
    "list": "- a\n",
    "word": "w4",
    "number": "4",
    "nul": b"\0\0\0",
    "latin": b"name: \xe9\n",
    "utf-16": "name: mine\n".encode("utf-16"),
    "binary": bytes(range(256)) * 40,
    "tabs": "weights:\n\tbits: 4\n",
    "two": "name: a\n---\nname: b\n",
    "bomb": _bomb(9),
    "bomb-shallow": _bomb(5),
    "merge-bomb": _merge_bomb(9),
    "ring": "weights: &a {bits: *a}\n",
    "ring-list": "weights: &a [*a]\n",
    "deep": "name: " + DEEP,
    "deep-mappings": "".join(f"{' ' * i}a:\n" for i in range(900)),
    "long": "name: " + "x" * 3_000_000,
    "long-name": "name: " + "x" * 900_000,
    "many-keys": "".join(f"key{i}: 1\n" for i in range(60_000)),
    "many-overrides": "weights: {overrides: [" + "{match: a, keep: true}," * 9000 + "]}",
    "python": "name: !!python/object/apply:os.system ['false']\n",
    "python-name": "name: !!python/name:os.system\n",
    "tag": "weights: !secret {bits: 4}\n",
    "tag-bool": "weights: {symmetric: !!bool 3}\n",
    "tag-int": "weights: {bits: !!int x}\n",
    "tag-time": "name: !!timestamp x\n",
    "tag-binary": "name: !!binary aGVsbG8=\n",
    "tag-set": "weights: !!set {bits}\n",
    "date": "name: 2001-99-99\n",
    "date-sound": "name: 2001-01-01\n",
    "keys-twice": "weights: {bits: 4}\nweights: {bits: 3}\n",
    "keys-list": "? [a]\n: b\n",
    "keys-null": "~: 1\n",
    "keys-mapping": "? {a: 1}\n: b\n",
    "control": 'name: "\\e[2J\\0"\nweights: {"\\e[31m": 1}\n',
    "nan": "solver: {damping: .nan}\n",
    "inf": "output: {max_shard_gb: .inf}\n",
    "tiny": "output: {max_shard_gb: 1e-12}\n",
    "negative": "tuning: {learning_rate: -1}\n",
    "far": "calibration: {seed: 99999999999999999999999}\n",
    "hex-far": "calibration: {seed: 0x" + "f" * 5000 + "}\n",
    "digits": "calibration: {seed: " + "9" * 5000 + "}\n",
    "samples": "calibration: {num_samples: 100000000000}\n",
    "window": "calibration: {seq_len: 100000000000}\n",
    "batch": "calibration: {batch_size: 100000000000}\n",
    "group-far": "weights: {group_size: 10000000000000000000000}\n",
    "pattern-slow": "weights: {overrides: [{match: '(m+o?d?e?l?.?)+!', bits: 8}]}\n",
    "pattern-slow-words": "weights: {overrides: [{match: '(.|[a-z])*!$', bits: 8}]}\n",
    "pattern-slow-flat": "weights: {overrides: [{match: '" + ".*" * 12 + "!', bits: 8}]}\n",
    "pattern-broken": "weights: {overrides: [{match: '(', bits: 8}]}\n",
    "pattern-deep": "weights: {overrides: [{match: '" + "(" * 5000 + ")" * 5000 + "'}]}\n",
    "pattern-repeat": "weights: {overrides: [{match: 'a{99999999999}', bits: 8}]}\n",
    "pattern-nothing": "weights: {overrides: [{match: mlp.downproj, bits: 8}]}\n",
    "pattern-missing": "weights: {overrides: [{bits: 8}]}\n",
    "source-nul": 'calibration: {source: "a\\0b"}\n',
    "source-surrogate": 'calibration: {source: "a\\ud83d.txt"}\n',
    "name-surrogate": 'name: "\\udce9"\n',
    "source-long": f"calibration: {{source: {'x' * 5000}.txt}}\n",
    "source-folder": "calibration: {source: .}\n",
    "source-device": "calibration: {source: /dev/null}\n",
    "candidates": "transform: {method: auto, candidates: [" + "none," * 5000 + "]}\n",
}

VALUES = {
    "no-yaml": "weights.bits=[1",
    "python": "name=!!python/name:os.system",
    "deep": "name=" + "[" * 5000,
    "bomb": "name=" + "&a [" * 40 + "]" * 40,
    "date": "name=2001-99-99",
    "empty": "weights.bits=",
    "no-value": "weights.bits",
    "no-key": "=3",
    "key-deep": ".".join(["a"] * 20_000) + "=1",
    "key-control": "\x1b[2J.x=1",
    "key-dots": "weights..bits=3",
    "key-long": "x" * 50_000 + "=3",
    "whole-section": "weights=3",
    "nan": "solver.damping=.nan",
}


def cases() -> Iterator[Case]:
    for name, content in FILES.items():
        yield Case(f"recipe-{name}", lambda bench, c=content: _dry(bench, "r.yaml", c))
    for name, assignment in VALUES.items():
        yield Case(
            f"set-{name}", lambda bench, a=assignment: ["quantize", "--print-config", "--set", a]
        )
    for name, recipe in {"null": "/dev/null", "zero": "/dev/zero", "long": "x" * 5000}.items():
        yield Case(
            f"recipe-path-{name}", lambda bench, r=recipe: ["quantize", "--print-config", "-c", r]
        )


def _dry(bench: Bench, name: str, content: str | bytes) -> list[object]:
    file = bench.file(name, content)
    return ["quantize", bench.llama, "-c", file, "--set", "weights.group_size=16", "--dry-run"]
