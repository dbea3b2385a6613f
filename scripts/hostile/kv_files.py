"""Hostile files of rotq calibrate-kv."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Case
from config_files import DEEP
from safetensors.torch import load_file, save
from torch import Tensor
from weights import BYTES

KIND = "rotq-kv-calibration"
Facts, Tensors = dict[str, Any], dict[str, Tensor]

FACTS: dict[str, Callable[[Facts], object]] = {
    "version": lambda facts: facts.update(version="x"),
    "no-spec": lambda facts: facts.pop("spec"),
    "spec-word": lambda facts: facts.update(spec="k3v3"),
    "spec-bits": lambda facts: facts["spec"].update(k_bits=99),
    "spec-sinks": lambda facts: facts["spec"].update(sinks=-3),
    "spec-sinks-far": lambda facts: facts["spec"].update(sinks=10**12),
    "spec-mean": lambda facts: facts["spec"].update(mean="odd"),
    "spec-norm-list": lambda facts: facts["spec"].update(norm=["log8"]),
    "spec-basis-null": lambda facts: facts["spec"].update(basis=None),
    "spec-name-control": lambda facts: facts["spec"].update(name="\x1b[2J\n"),
    "spec-key-control": lambda facts: facts["spec"].update({"\x1b[2J": 1}),
    "spec-bits-digits": lambda facts: facts["spec"].update(k_bits=10**4000),
    "spec-word-bits": lambda facts: facts["spec"].update(k_bits="three"),
    "model-control": lambda facts: facts.update(model_hash="\x1b[2J\n"),
    "more": lambda facts: facts.update(more="x"),
    "layers-arabic": lambda facts: facts["layers"].update({"\u0661": facts["layers"].pop("1")}),
    "layers-null": lambda facts: facts["layers"].update({"0": None}),
    "search-fraction": lambda facts: facts["layers"]["0"].update(key_search=4.5),
    "heads-true": lambda facts: facts["layers"]["0"].update(heads=True),
    "rotary-nan": lambda facts: facts["layers"]["0"].update(rotary_scale=float("nan")),
    "source-deep": lambda facts: facts.update(source={"a": [[[[[]]]]]}),
    "model": lambda facts: facts.update(model_hash=5),
    "layers-list": lambda facts: facts.update(layers=[]),
    "layers-word": lambda facts: facts.update(layers={"x": {}}),
    "layers-fewer": lambda facts: facts["layers"].pop("0"),
    "layers-more": lambda facts: facts["layers"].update({"99": facts["layers"]["0"]}),
    "format-width": lambda facts: facts["layers"]["0"]["format"].update(head_dim=64),
    "format-bits": lambda facts: facts["layers"]["0"]["format"].update(k_bits=7),
    "format-page": lambda facts: facts["layers"]["0"]["format"].update(page_size=0),
    "format-page-far": lambda facts: facts["layers"]["0"]["format"].update(page_size=2**40),
    "format-null": lambda facts: facts["layers"]["0"].update(format=None),
    "heads-zero": lambda facts: facts["layers"]["0"].update(heads=0),
    "heads-far": lambda facts: facts["layers"]["0"].update(heads=10**9),
    "gain-word": lambda facts: facts["layers"]["0"].update(key_gain="loud"),
    "gain-nan": lambda facts: facts["layers"]["0"].update(key_gain=float("nan")),
    "mean-word": lambda facts: facts["layers"]["0"].update(mean="odd"),
    "search-word": lambda facts: facts["layers"]["0"].update(key_search="deep"),
    "rotary-word": lambda facts: facts["layers"]["0"].update(rotary_scale="x"),
    "source-word": lambda facts: facts.update(source="x"),
}

TENSORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda tensor: None,
    "empty": lambda tensor: tensor[:0],
    "flat": lambda tensor: tensor.flatten(),
    "double": lambda tensor: tensor.double(),
    "half": lambda tensor: tensor.half(),
    "integers": lambda tensor: tensor.to(torch.int64),
    "wider": lambda tensor: torch.cat([tensor, tensor], -1),
    "not-finite": lambda tensor: tensor * float("nan"),
    "zeros": torch.zeros_like,
    "huge": lambda tensor: tensor * 1e30,
}
NAMES = (
    "0.key.matrix_HDD",
    "0.key.levels_HL",
    "0.value.thresholds_HL",
    "0.key.base_H",
    "0.value.unit_H",
    "0.key.metric_HDD",
    "0.value.mean_HD",
    "0.inv_freq_R",
)


def cases() -> Iterator[Case]:
    for name, make in BYTES.items():
        yield from _each(
            f"kv-file-{name}", lambda bench, m=make: bench.file("kv", m(bench.kv.read_bytes()))
        )
    for name, change in FACTS.items():
        yield from _each(f"kv-facts-{name}", lambda bench, c=change: _with_facts(bench, c))
    for tensor in NAMES:
        for name, made in TENSORS.items():
            yield from _each(
                f"kv-{tensor}-{name}", lambda bench, n=tensor, m=made: _with_tensor(bench, n, m)
            )
    for name, file in {"null": "/dev/null", "zero": "/dev/zero", "long": "x" * 5000}.items():
        yield from _each(f"kv-path-{name}", lambda bench, f=file: Path(f))
    yield from _each("kv-pipe", _pipe)
    yield from _each("kv-facts-digits", lambda bench: _written(bench, {}, "9" * 10_000))
    yield from _each("kv-facts-long", lambda bench: _written(bench, {}, f'"{"x" * 40_000_000}"'))
    yield from _each("kv-facts-deep", lambda bench: _written(bench, load_file(bench.kv), DEEP))
    yield from _each("kv-folder", lambda bench: bench.work)


def _each(name: str, build: Callable[[Bench], Path]) -> Iterator[Case]:
    yield Case(f"{name}-bench", lambda bench: _bench(bench, build(bench)))
    yield Case(f"{name}-eval", lambda bench: _eval(bench, build(bench)))


def _eval(bench: Bench, file: Path) -> list[object]:
    size = ["--windows", 1, "--seq-len", 32]
    return [
        "eval",
        "kv",
        bench.llama,
        "--kv",
        "k3v3",
        "--kv-calibration",
        file,
        "--text",
        bench.text,
        *size,
    ]


def _bench(bench: Bench, file: Path) -> list[object]:
    load = ["--requests", 2, "--clients", 2, "--prompt-tokens", 40, "--output-tokens", 8]
    memory = ["--kv-memory", "4MiB", "--max-batch", 2, "--kv", "k3v3"]
    return ["bench", "serve", bench.llama, "--kv-calibration", file, *load, *memory]


def _facts(bench: Bench) -> Facts:
    raw = bench.kv.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    facts: Facts = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][KIND])
    return facts


def _written(bench: Bench, tensors: Tensors, facts: str) -> Path:
    return bench.file("kv.safetensors", save(tensors, metadata={KIND: facts}))


def _pipe(bench: Bench) -> Path:
    path = bench.fresh("pipe")
    os.mkfifo(path)
    return path


def _with_facts(bench: Bench, change: Callable[[Facts], object]) -> Path:
    facts = _facts(bench)
    change(facts)
    return _written(bench, load_file(bench.kv), json.dumps(facts))


def _with_tensor(bench: Bench, name: str, make: Callable[[Tensor], Tensor | None]) -> Path:
    tensors = load_file(bench.kv)
    made = make(tensors.pop(name))
    if made is not None:
        tensors[name] = made.contiguous()
    return _written(bench, tensors, json.dumps(_facts(bench)))
