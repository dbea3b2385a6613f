"""`rotq eval ppl` on random models, without a trained one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import VOCAB, tiny_model

from rotq.checkpoint.location import Location, locate
from rotq.cli.loading import say_computed
from rotq.cli.main import main
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset

KEYS = {"ppl", "kl", "top1", "tokens", "protocol"}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["eval", "ppl", *arguments])


class Letters:
    """Token ids are the UTF-8 bytes, folded into the vocabulary of the tiny models."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [byte % VOCAB for byte in text.encode()]}


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("models"))
    for name in ("a", "b"):
        tiny_model("llama", dtype=torch.float32).config.save_pretrained(name)

    def load_model(model: Location, **options: Any) -> Any:
        seed = {"a": 0, "b": 1}[model.name]
        dtype = torch.float32 if options["dtype"] == "fast" else getattr(torch, options["dtype"])
        return tiny_model("llama", seed=seed, dtype=dtype)

    monkeypatch.setattr("rotq.checkpoint.load.load_model", load_model)
    monkeypatch.setattr("rotq.checkpoint.load.load_tokenizer", lambda model, **_: Letters())


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 20)
    return str(file)


def small(text: str) -> list[str]:
    return ["--text", text, "--windows", "3", "--seq-len", "32"]


def test_json_without_reference(text: str) -> None:
    result = run("a", *small(text), "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.keys() >= KEYS
    assert (found["kl"], found["top1"], found["tokens"]) == (None, None, 93)
    assert found["ppl"] > 1
    assert result.stdout.count("\n") == 1


def test_json_with_reference(text: str) -> None:
    same = json.loads(run("a", *small(text), "--reference", "a", "--json").stdout)
    assert (same["kl"], same["top1"], same["ppl"]) == (0.0, 1.0, same["reference_ppl"])
    other = json.loads(run("a", *small(text), "--reference", "b", "--json").stdout)
    assert other["kl"] > 0.01
    assert other["top1"] < 1


def test_stride_is_named_in_the_protocol(text: str) -> None:
    found = json.loads(run("a", *small(text), "--stride", "8", "--json").stdout)
    assert found["protocol"].startswith("strided: 3 windows of 32 tokens every 8")
    assert found["tokens"] == 31 + 8 + 8


def test_dtype_reaches_the_model(text: str) -> None:
    single = json.loads(run("a", *small(text), "--json").stdout)["ppl"]
    half = json.loads(run("a", *small(text), "--dtype", "bfloat16", "--json").stdout)["ppl"]
    assert single != half
    assert half == pytest.approx(single, rel=0.1)


def test_table(text: str) -> None:
    result = run("a", *small(text), "--reference", "b")
    for label in ("perplexity", "KL to original", "top-1 agreement", "protocol"):
        assert label in result.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["missing"], 1, "missing does not exist"),
        (["a", "--reference", "missing"], 1, "missing does not exist"),
        (["a", "--windows", "9999"], 1, "windows of 32 asked for"),
        (["a", "--stride", "32"], 2, "--stride 32 is not below --seq-len 32"),
        (["a", "--seq-len", "1"], 2, "'--seq-len'"),
        (["a", "--text", "none.txt"], 1, "text none.txt: no such file"),
    ],
)
def test_errors(text: str, arguments: list[str], exit_code: int, message: str) -> None:
    result = run(arguments[0], *small(text), *arguments[1:])
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_with_a_packed_cache_it_is_eval_kv_s_figure(text: str) -> None:
    whole = json.loads(run("a", *small(text), "--json").stdout)
    packed = json.loads(
        run("a", *small(text), "--kv", "turboquant", "--reference", "a", "--json").stdout
    )
    arguments = ["eval", "kv", "a", *small(text), "--kv", "turboquant", "--json"]
    alone = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert "kv" not in whole
    assert packed["ppl"] == pytest.approx(alone["ppl"])
    assert packed["kl"] == pytest.approx(alone["kl"])
    assert packed["reference_ppl"] == whole["ppl"] != packed["ppl"]
    assert packed["kv"]["attention_error"] == pytest.approx(alone["attention_error"])
    assert packed["kv"]["bytes_per_packed_token"] == alone["bytes_per_token"]


def test_a_packed_cache_is_named_in_the_table(text: str) -> None:
    found = run("a", *small(text), "--kv", "turboquant")
    assert "keys and values  turboquant, " in found.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kv", "k9"], 2, "no KV preset 'k9'"),
        (["--kv", "k3v3,k4v3"], 2, "give one preset; rotq eval kv takes several"),
        (["--kv-calibration", "x"], 2, "--kv-calibration without --kv"),
        (["--kv", "k3v3", "--kv-calibration", "missing"], 1, "missing"),
    ],
)
def test_a_cache_that_cannot_be_packed(
    text: str, arguments: list[str], code: int, message: str
) -> None:
    done = run("a", *small(text), *arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr


def test_a_calibration_of_another_scheme_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "kv.safetensors"
    data_oblivious(tiny_model("llama", dtype=torch.float32).config, preset("turboquant")).save(file)
    done = run("a", *small(text), "--kv", "k3v3", "--kv-calibration", str(file))
    assert done.exit_code == 1
    assert "is for turboquant and does not serve k3v3" in done.stderr


def test_a_line_for_each_dtype_that_the_cpu_does_not_multiply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotq.devices.multiplies", lambda dtype, _: dtype == torch.float32)
    model, places = tiny_model("llama", dtype=torch.float32), []
    for name in ("bfloat16", "bfloat16", "float16", "float32"):
        folder = tmp_path / f"{name}-{len(places)}"
        model.config.dtype = name
        model.config.save_pretrained(folder)
        places.append(locate(folder))
    told = say_computed("auto", *((place, model) for place in places[:2]))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["this CPU multiplies no bfloat16 numbers"]
    say_computed("auto", *((place, model) for place in places), told=told)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["this CPU multiplies no float16 numbers"]
    assert say_computed("float32", (places[0], model)) == frozenset()
