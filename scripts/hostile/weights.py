"""Hostile safetensors files and indexes of shards, and GGUF files."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import Bench, Case
from config_files import DEEP

NAME = "model.embed_tokens.weight"
Header = dict[str, Any]


def _reshaped(shape: object) -> Callable[[Header], object]:
    return lambda header: header[NAME].update(shape=shape)


def _moved(*offsets: object) -> Callable[[Header], object]:
    return lambda header: header[NAME].update(data_offsets=list(offsets))


HEADERS: dict[str, Callable[[Header], object]] = {
    "dtype-unknown": lambda header: header[NAME].update(dtype="F7"),
    "dtype-number": lambda header: header[NAME].update(dtype=3),
    "dtype-float8": lambda header: header[NAME].update(dtype="F8_E4M3"),
    "dtype-wider": lambda header: header[NAME].update(dtype="F64"),
    "dtype-missing": lambda header: header[NAME].pop("dtype"),
    "shape-negative": _reshaped([-300, -96]),
    "shape-huge": _reshaped([2**40, 2**40]),
    "shape-overflow": _reshaped([2**62, 4]),
    "shape-fractions": _reshaped([300.0, 96.0]),
    "shape-true": _reshaped([True, 28800]),
    "shape-word": _reshaped("300x96"),
    "shape-flat": _reshaped([28800]),
    "shape-turned": _reshaped([96, 300]),
    "shape-deep": _reshaped([1] * 3000 + [300, 96]),
    "shape-null": _reshaped(None),
    "offsets-swapped": _moved(100, 0),
    "offsets-negative": _moved(-8, 0),
    "offsets-far": _moved(10**15, 10**15 + 115200),
    "offsets-words": _moved("0", "1"),
    "offsets-three": _moved(0, 1, 2),
    "offsets-overlap": _moved(4, 115204),
    "entry-null": lambda header: header.update({NAME: None}),
    "entry-list": lambda header: header.update({NAME: [1, 2]}),
    "entry-missing": lambda header: header.pop(NAME),
    "entry-more": lambda header: header.update(
        {"../../more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    ),
    "entry-escape": lambda header: header.update({"\x1b[2J": header.pop(NAME)}),
    "entry-lone-surrogate": lambda header: header.update({"\ud800": header.pop(NAME)}),
    "metadata-list": lambda header: header.update(__metadata__=[1]),
    "metadata-format": lambda header: header.update(__metadata__={"format": "tf"}),
    "metadata-numbers": lambda header: header.update(__metadata__={"format": 3}),
}


def _with_header(text: str | bytes) -> Callable[[bytes], bytes]:
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda whole: struct.pack("<Q", len(raw)) + raw


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "seven": lambda whole: whole[:7],
    "length-only": lambda whole: whole[:8],
    "in-the-header": lambda whole: whole[:200],
    "in-the-data": lambda whole: whole[:-1000],
    "longer": lambda whole: whole + b"more",
    "length-far": lambda whole: b"\xff" * 8 + whole[8:],
    "length-sign": lambda whole: struct.pack("<q", -1) + whole[8:],
    "zeros": lambda whole: bytes(len(whole)),
    "text": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "zip": lambda whole: b"PK\3\4" + whole,
    "header-list": _with_header("[]"),
    "header-empty": _with_header("{}"),
    "header-cut": _with_header('{"a": {"dtype": "F32"'),
    "header-latin": _with_header(b'{"\xe9": 1}'),
    "header-deep": _with_header('{"a": ' + DEEP + "}"),
    "header-of-empty-objects": _with_header("[" + "{}," * 25_000_000 + "{}]"),
    "header-digits": _with_header('{"a": ' + "9" * 5000 + "}"),
    "not-a-number": lambda whole: whole[:-4] + b"\0\0\xc0\x7f",
    "infinite": lambda whole: whole[:-4] + b"\0\0\x80\x7f",
}

INDEXES: dict[str, str | bytes] = {
    "empty": "",
    "list": "[]",
    "latin": b'{"weight_map": {"\xe9": "x"}}',
    "deep": '{"weight_map": ' + DEEP + "}",
    "no-map": '{"metadata": {}}',
    "map-list": '{"weight_map": ["model.safetensors"]}',
    "map-empty": '{"weight_map": {}}',
    "map-numbers": json.dumps({"weight_map": {NAME: 3}}),
    "map-null": json.dumps({"weight_map": {NAME: None}}),
    "map-lists": json.dumps({"weight_map": {NAME: ["a", "b"]}}),
    "map-empty-name": json.dumps({"weight_map": {NAME: ""}}),
    "up": json.dumps({"weight_map": {NAME: "../sound/model.safetensors"}}),
    "absolute": json.dumps({"weight_map": {NAME: "/etc/passwd"}}),
    "folder": json.dumps({"weight_map": {NAME: "."}}),
    "nul": json.dumps({"weight_map": {NAME: "a\0b"}}),
    "long-name": json.dumps({"weight_map": {NAME: "x" * 5000}}),
    "shard-missing": json.dumps({"weight_map": {NAME: "model-00001-of-00002.safetensors"}}),
    "one-tensor": json.dumps({"weight_map": {NAME: "shard.safetensors"}}),
    "unknown-tensor": json.dumps({"weight_map": {"no.such": "shard.safetensors"}}),
    "device": json.dumps({"weight_map": {NAME: "/dev/zero"}}),
}

GGUF: dict[str, bytes] = {
    "empty": b"",
    "magic": b"GGUF",
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "none": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    "far": b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62),
    "key-far": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60),
    "cut": b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 20) + b"general",
    "text": b"<html>not found</html>",
}


def cases() -> Iterator[Case]:
    for name, change in HEADERS.items():
        yield from _each(f"header-{name}", lambda bench, c=change: _with_changed(bench, c))
    for name, make in BYTES.items():
        yield from _each(f"weights-{name}", lambda bench, m=make: _with_bytes(bench, m))
    for name, content in INDEXES.items():
        yield from _each(f"index-{name}", lambda bench, c=content: _with_index(bench, c))
    for name, raw in GGUF.items():
        yield from _each(f"gguf-{name}", lambda bench, r=raw: bench.file("model.gguf", r))


def _each(name: str, build: Callable[[Bench], Path]) -> Iterator[Case]:
    yield Case(f"{name}-job", lambda bench: bench.quantize(build(bench), bench.out()))
    yield Case(f"{name}-ppl", lambda bench: bench.ppl(build(bench)))


def _with_bytes(bench: Bench, make: Callable[[bytes], bytes]) -> Path:
    whole = (bench.llama / "model.safetensors").read_bytes()
    return bench.damaged(bench.llama, "model.safetensors", make(whole))


def _with_changed(bench: Bench, change: Callable[[Header], object]) -> Path:
    def make(whole: bytes) -> bytes:
        length = struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        return struct.pack("<Q", len(raw)) + raw + whole[8 + length :]

    return _with_bytes(bench, make)


def _with_index(bench: Bench, content: str | bytes) -> Path:
    sound = bench.copy(bench.llama)
    if sound.name != "sound":
        sound = sound.rename(sound.with_name("sound"))
    model = bench.damaged(bench.llama, "model.safetensors.index.json", content)
    (model / "model.safetensors").rename(model / "shard.safetensors")
    return model
