"""Every command reads the same text the same way, whole, within what the model has tables for."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_proteins import RESIDUES, esm_tokenizer
from tiny_readers import BYTES, POSITIONS, byte_tokenizer, save_reader
from tokenizers import Regex, pre_tokenizers

import rotq.quantize.publish
from rotq.cli.main import main

FEW = ["--num-samples", "2", "--set", "weights.group_size=16"]
TEXT = "the quick brown fox jumps over the lazy dog. " * 60


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="rotq")


@pytest.fixture(autouse=True)
def _no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # it takes seconds, and is tested in tests/checkpoint/test_reload.py
    monkeypatch.setattr(rotq.quantize.publish, "check_reload", lambda *_, **__: None)


def readers(model: Path, text: Path | str, out: Path, length: int) -> dict[str, list[Any]]:
    """Commands that give a causal model windows of a text."""
    windows = ["--windows", "2", "--seq-len", length]
    quantize = ["quantize", model, "-c", "rtn", *FEW, "--seq-len", length, "--calibration", text]
    calibrated = ["--calibration", text, "--num-samples", "2", "--calibration-seq-len", length]
    return {
        "quantize": [*quantize, "-o", out / "quantized", "--set", "output.format=rotq"],
        "dry-run": [*quantize, "--dry-run", "--set", "output.format=rotq"],
        "calibrate-kv": ["calibrate-kv", model, "-o", out / "kv", *calibrated],
        "eval-ppl": ["eval", "ppl", model, "--text", text, *windows],
        "eval-kv": ["eval", "kv", model, "--text", text, "--kv", "turboquant", *windows],
        "eval-kv-calibrated": [
            *["eval", "kv", model, "--kv", "k3v3", "--text", "pydoc-test", "--windows", "1"],
            *["--seq-len", "32", *calibrated],
        ],
    }


COMMANDS = list(readers(Path(), "", Path(), 0))


def write(folder: Path, content: str = TEXT) -> Path:
    file = folder / "text.txt"
    file.write_text(content)
    return file


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_windows_are_cut_to_learned_positions(family: str, command: str, tmp_path: Path) -> None:
    model = save_reader(tmp_path / "model", family, byte_tokenizer())
    long = POSITIONS + 1
    done = run(*readers(model, write(tmp_path), tmp_path, long)[command])
    assert done.exit_code == 0, done.output
    cut = f"windows are cut from {long} to {POSITIONS} tokens: the model has {POSITIONS} positions"
    assert done.stderr.count(cut) == (command != "dry-run")
    fits = run(*readers(model, write(tmp_path), tmp_path, POSITIONS)[command], *_again(command))
    assert fits.exit_code == 0, fits.output
    assert "windows are cut" not in fits.stderr


def _again(command: str) -> list[str]:
    return ["--overwrite"] if command == "quantize" else []


def test_the_figures_are_those_of_the_windows_that_fit(tmp_path: Path) -> None:
    model = save_reader(tmp_path / "model", "opt", byte_tokenizer())
    given = ["eval", "ppl", model, "--text", write(tmp_path), "--windows", "3", "--json"]
    cut = json.loads(run(*given).stdout)
    assert cut == json.loads(run(*given, "--seq-len", POSITIONS).stdout)
    assert cut["tokens"] == 3 * (POSITIONS - 1)
    assert f"windows of {POSITIONS} tokens" in cut["protocol"]
    refused = run(*given, "--stride", POSITIONS)
    assert refused.exit_code == 1
    assert f"the model's {POSITIONS} positions leave room for {POSITIONS} tokens" in refused.stderr


def test_a_model_reads_no_more_than_its_reference(tmp_path: Path) -> None:
    wide = save_reader(tmp_path / "wide", "llama", byte_tokenizer())
    narrow = save_reader(tmp_path / "narrow", "gpt2", byte_tokenizer(), n_positions=20)
    for first, second in ((wide, narrow), (narrow, wide)):
        given = ["eval", "ppl", first, "--reference", second, "--text", write(tmp_path)]
        done = run(*given, "--windows", "2", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["tokens"] == 2 * 19
        cut = "windows are cut from 1024 to 20 tokens: the model has 20 positions\n"
        assert done.stderr == f"{cut}device: cpu\n"


@pytest.mark.parametrize("family", ["bert", "esm"])
def test_proteins_leave_room_for_special_tokens(family: str, tmp_path: Path) -> None:
    model = save_reader(tmp_path / "model", family, esm_tokenizer(tmp_path / "vocabulary"))
    room = POSITIONS - (2 if family == "esm" else 0)  # ESM's rows begin behind the padding token's
    fasta = tmp_path / "p.fasta"
    fasta.write_text(f">a\n{RESIDUES * 30}\n>b\n{RESIDUES}\n")
    scored = run("eval", "pll", model, "--fasta", fasta, "--positions", "2", "--json")
    assert scored.exit_code == 0, scored.output
    assert scored.stderr == (
        f"device: cpu\nwindows are cut from 512 to {room - 2} residues: "
        f"the model has {room} positions, 2 of them for special tokens\n"
    )
    protocol = json.loads(scored.stdout)["p.fasta"]["protocol"]
    assert f"1 of them cut to {room - 2} residues" in protocol
    job = ["quantize", model, "-c", "rtn", *FEW, "--calibration", fasta, "-o", tmp_path / "out"]
    done = run(*job)
    assert done.exit_code == 0, done.output
    assert f"windows are cut from 1024 to {room} tokens: the model has {room}" in done.stderr
    fasta.write_text(f">b\n{RESIDUES}\n")
    for quiet in (run(*job, "--overwrite"), run("eval", "pll", model, "--fasta", fasta)):
        assert quiet.exit_code == 0, quiet.output
        assert "windows are cut" not in quiet.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_tokens_that_the_model_does_not_know(command: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    model = save_reader(tmp_path / "model", "llama", tokenizer, vocab_size=BYTES)
    text = write(tmp_path, TEXT.replace(" ", "<|new|>"))
    done = run(*readers(model, text, tmp_path, 64)[command])
    assert (done.exit_code, done.stdout) == (1, "")
    line = f"text {text}: token id {BYTES} is outside the model's {BYTES} embeddings"
    assert line in done.stderr
    assert done.stderr.count("rotq: error") == 1
    assert not (tmp_path / "quantized").exists()


def test_a_protein_model_whose_mask_it_does_not_know(tmp_path: Path) -> None:
    tokenizer = esm_tokenizer(tmp_path / "vocabulary")
    model = save_reader(tmp_path / "model", "bert", tokenizer, vocab_size=32)
    fasta = tmp_path / "p.fasta"
    fasta.write_text(f">a\n{RESIDUES * 3}\n")
    calibrated = ["quantize", model, "-c", "rtn", *FEW, "--calibration", fasta]
    for arguments in (
        ["eval", "pll", model, "--fasta", fasta],
        [*calibrated, "-o", tmp_path / "out"],
        [*calibrated, "--dry-run"],
    ):
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "token id 32 is outside the model's 32 embeddings" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_that_panics(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    model = save_reader(tmp_path / "model", "llama", tokenizer)
    text = write(tmp_path, ("a" * 60 + "b ") * 50)
    capfd.readouterr()
    done = run(*readers(model, text, tmp_path, 64)[command])
    assert (done.exit_code, done.stdout) == (1, "")
    line = f"rotq: error: text {text}: the tokenizer of {model} fails: Onig: Regex search error"
    assert line in done.stderr
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.mkdir(), "text {}: it is a folder, and datasets says: "),
        (lambda file: file.symlink_to("/dev/zero"), "text {} is a pipe, a socket or a device"),
        (lambda file: file.write_bytes(b""), "text {} is empty"),
        (lambda file: file.write_bytes(b"\xef\xbb\xbf\r\n"), "text {} is empty"),
        (lambda file: file.write_bytes(b"caf\xe9"), "text {} is not UTF-8: byte 0xe9 at offset 3"),
        (lambda file: file.write_bytes(b"\x1f\x8b\x08"), "{}: damaged gzip file"),
        (lambda file: None, "text {}: no such file"),
    ],
)
def test_texts_that_are_none(make: Any, message: str, command: str, tmp_path: Path) -> None:
    model = save_reader(tmp_path / "model", "llama", byte_tokenizer())
    text = tmp_path / "text.txt"
    make(text)
    done = run(*readers(model, text, tmp_path, 64)[command])
    assert (done.exit_code, done.stdout) == (1, "")
    assert message.format(text) in done.stderr
    assert done.stderr.count("rotq: error") == 1
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("command", ["quantize", "dry-run", "calibrate-kv"])
def test_more_windows_than_a_text_has(command: str, tmp_path: Path) -> None:
    model = save_reader(tmp_path / "model", "llama", byte_tokenizer())
    given = readers(model, write(tmp_path), tmp_path, 64)[command]
    done = run(*given, "--num-samples", 10**6)
    assert done.exit_code == 1
    starts = len(TEXT) - 64 - 1
    assert f"hold {starts} different windows of 64, of {10**6} asked for" in done.stderr
    if command == "calibrate-kv":
        assert not (tmp_path / "kv").exists()


def test_notes_of_a_text_are_said_once(tmp_path: Path) -> None:
    model = save_reader(tmp_path / "model", "llama", byte_tokenizer())
    text = write(tmp_path, json.dumps({"text": TEXT}) + "\n")
    for name, arguments in readers(model, text, tmp_path, 64).items():
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        noted = done.stderr.count(f"{text} looks like JSON lines and is read as plain text")
        assert noted == (name != "dry-run")


def test_what_a_fasta_file_left_out_is_said_by_pll(tmp_path: Path) -> None:
    model = save_reader(tmp_path / "model", "bert", esm_tokenizer(tmp_path / "vocabulary"))
    fasta = tmp_path / "p.fasta"
    fasta.write_bytes(b">a prot\xe9ine\nMKT\n>b\nM*K\n")
    done = run("eval", "pll", model, "--fasta", fasta)
    assert done.exit_code == 0, done.output
    assert done.stderr == (
        f"{fasta}: 1 sequences, 3 residues; left out: 1 with stops; "
        "headers are not UTF-8, read as Latin-1\ndevice: cpu\n"
    )


def test_fasta_by_another_name_calibrates_a_protein_model(tmp_path: Path) -> None:
    model = save_reader(tmp_path / "model", "bert", esm_tokenizer(tmp_path / "vocabulary"))
    text = write(tmp_path, f">a\n{RESIDUES}\n>b\n{RESIDUES}\n")
    job = ["quantize", model, "-c", "rtn", *FEW, "--calibration", text, "-o", tmp_path / "out"]
    done = run(*job)
    assert done.exit_code == 0, done.output
    assert f"{text}, read as proteins: 2 sequences, 40 residues" in done.stderr


def test_the_saved_tokenizer_is_the_models_own(tmp_path: Path) -> None:
    model = save_reader(tmp_path / "model", "llama", byte_tokenizer())
    file = model / "tokenizer.json"
    held = json.loads(file.read_text())
    held["truncation"] = {
        "direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    file.write_text(json.dumps(held))
    text = write(tmp_path)
    given = readers(model, text, tmp_path, 64)
    scored = run(*given["eval-ppl"], "--windows", "0", "--json")
    assert json.loads(scored.stdout)["tokens"] == len(TEXT) // 64 * 63
    assert run(*given["quantize"]).exit_code == 0
    report = json.loads((tmp_path / "quantized" / "report.json").read_text())
    assert report["data"]["tokens"] == 2 * 64
    saved = tmp_path / "quantized" / "tokenizer.json"
    assert saved.read_bytes() == file.read_bytes()
