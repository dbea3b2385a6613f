"""`rotq calibrate-kv` and `rotq eval kv` on random models, without a trained one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import VOCAB, tiny_model

from rotq.checkpoint.location import Location
from rotq.cli.main import main
from rotq.cli.serve_options import find_calibration
from rotq.errors import RotqError
from rotq.kv.calibration.file import load_calibration
from rotq.kv.presets import preset

KEYS = {
    "preset",
    "ppl",
    "ppl_ratio",
    "kl",
    "top1",
    "cosine",
    "bits_per_element",
    "bytes_per_token",
    "attention_error",
}
SMALL = ["--num-samples", "2", "--calibration-seq-len", "64"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--device", "cpu"])


class Letters:
    """Token ids are the UTF-8 bytes, folded into the vocabulary of the tiny models."""

    bos_token_id, eos_token_id = None, 2

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + byte % (VOCAB - 1) for byte in text.encode()]}


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("models"))
    for name in ("llama", "qwen", "narrow", "mamba", "nan"):
        Path(name).mkdir()

    def load_model(model: Location, **_: Any) -> Any:
        if model.name == "mamba":
            config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1)
            return transformers.MambaForCausalLM(config).eval()
        family = {"qwen": "qwen3", "narrow": "qwen2"}.get(model.name, "llama")
        built = tiny_model(family, dtype=torch.float32)
        if model.name == "nan":
            built.model.layers[0].self_attn.k_proj.weight[0, 0] = torch.nan
        return built

    monkeypatch.setattr("rotq.checkpoint.load.load_model", load_model)
    monkeypatch.setattr("rotq.checkpoint.load.load_tokenizer", lambda model, **_: Letters())


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 20)
    return str(file)


def evaluate(text: str, *arguments: str) -> Result:
    return run("eval", "kv", *arguments, "--text", text, "--windows", "2", "--seq-len", "32")


def calibrated(tmp_path: Path, text: str, *arguments: str, model: str = "llama") -> str:
    output = str(tmp_path / "kv.safetensors")
    result = run("calibrate-kv", model, "-o", output, "--calibration", text, *SMALL, *arguments)
    assert result.exit_code == 0, result.stderr
    return output


def test_calibrate_writes_what_can_be_loaded(tmp_path: Path, text: str) -> None:
    output = calibrated(tmp_path, text)
    found = load_calibration(Path(output), tiny_model("llama").config)
    assert found.spec.name == "k3v3"
    assert found.source["text"] == text
    assert found.source["windows"] == [2, 64]
    assert len(found.source["sha256"]) == 64


def test_calibrate_reports(tmp_path: Path, text: str) -> None:
    output = tmp_path / "kv"
    command = ["calibrate-kv", "llama", "-o", str(output), "--calibration", text, *SMALL]
    found = json.loads(run(*command, "--json").stdout)
    assert (found["output"], found["preset"]) == (str(output), "k3v3")
    assert found["bytes"] == output.stat().st_size
    table = run(*command, "--kv", "turboesm").stdout
    assert "turboesm" in table
    assert "2 windows of 64 tokens" in " ".join(table.split())


def test_a_text_of_one_letter_is_said_and_recorded(tmp_path: Path) -> None:
    text = tmp_path / "letter.txt"
    text.write_text("a" * 400)
    command = ["calibrate-kv", "llama", "-o", str(tmp_path / "kv"), "--calibration", str(text)]
    result = run(*command, *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("warning: the calibration windows hold 1 different ")
    assert result.stderr.count("\n") == 1
    found = json.loads(result.stdout)
    assert found["weight"] == pytest.approx(1 / 32)
    assert result.stderr == f"warning: {found['notes'][0]}\n"
    held = load_calibration(tmp_path / "kv", tiny_model("llama").config)
    assert held.source["notes"] == found["notes"]
    assert "calibrate on more text" in " ".join(run(*command, *SMALL).stdout.split())


def test_calibration_repeats_bitwise(tmp_path: Path, text: str) -> None:
    first = Path(calibrated(tmp_path, text)).read_bytes()
    assert Path(calibrated(tmp_path, text)).read_bytes() == first
    assert Path(calibrated(tmp_path, text, "--seed", "1")).read_bytes() != first


def test_a_model_writes_its_own_calibration_text(tmp_path: Path, text: str) -> None:
    first = calibrated(tmp_path, "self")
    found = load_calibration(Path(first), tiny_model("llama").config)
    assert found.source["text"] == "self"
    assert found.source["windows"] == [2, 64]
    written = Path(first).read_bytes()
    assert Path(calibrated(tmp_path, "self")).read_bytes() == written
    assert Path(calibrated(tmp_path, text)).read_bytes() != written
    result = evaluate("self", "llama", "--kv", "k3v3", "--kv-calibration", first)
    assert result.exit_code == 1
    assert "text self is what a model writes for its own calibration" in result.stderr


def test_one_preset_is_one_object(tmp_path: Path, text: str) -> None:
    output = calibrated(tmp_path, text)
    result = evaluate(text, "llama", "--kv", "k3v3", "--kv-calibration", output, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert found.keys() >= KEYS
    assert found["preset"] == "k3v3"
    assert len(found["attention_error"]) == 2
    assert found["kl"] > 0


def test_a_file_serves_other_bits_and_the_rest_is_calibrated_aloud(
    tmp_path: Path, text: str
) -> None:
    output = calibrated(tmp_path, text)
    names = "k2v2,k4v4,turboquant,turboesm"
    result = evaluate(
        text, "llama", "--kv", names, "--kv-calibration", output, "--calibration", text, *SMALL,
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [values["preset"] for values in found] == names.split(",")
    assert found[0]["kl"] > found[1]["kl"]
    said = result.stderr.splitlines()
    assert said[0] == f"turboquant: needs no calibration, {output} is not used"
    assert said[1] == f"turboesm: not served by {output}"
    assert said[2].startswith(f"turboesm: calibrated on {text}, 2 windows of 64 tokens; kept as ")
    assert len(said) == 3


def test_file_and_calibration_now_agree(tmp_path: Path, text: str) -> None:
    output = calibrated(tmp_path, text)
    held = evaluate(text, "llama", "--kv", "k3v3", "--kv-calibration", output, "--json")
    now = evaluate(text, "llama", "--kv", "k3v3", "--calibration", text, *SMALL, "--json")
    assert now.stderr.startswith(f"k3v3: calibrated on {text}, 2 windows of 64 tokens; kept as ")
    assert json.loads(held.stdout)["kl"] == pytest.approx(json.loads(now.stdout)["kl"], rel=1e-6)


def test_sinks_and_recent(text: str) -> None:
    result = evaluate(
        text, "llama", "--kv", "turboquant", "--sinks", "3", "--recent", "32", "--json"
    )
    found = json.loads(result.stdout)
    assert (found["sinks"], found["recent"], found["top1"]) == (3, 32, 1.0)
    assert found["bits_per_element"] == 32


def test_schemes_of_others_come_in_the_order_of_their_names(tmp_path: Path, text: str) -> None:
    names = "kivi-2,turboquant,oscar-int2,k3v3"
    result = evaluate(
        text, "llama", "--kv", names, "--calibration", text, *SMALL, "--json", "--chunk", "4"
    )
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [values["preset"] for values in found] == names.split(",")
    assert {values["chunk"] for values in found} == {4}
    assert all(values["kl"] > 0 for values in found)


def test_bits_by_layer_stand_beside_presets(text: str) -> None:
    result = evaluate(
        text,
        "llama",
        "--kv",
        "turboquant",
        "--kv-bits",
        "5.5",
        "--calibration",
        text,
        *SMALL,
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    _, found = (json.loads(line) for line in result.stdout.splitlines())
    assert found["preset"] == "kv5.5"
    assert result.stderr.count("\n") == 1
    made = run(
        "calibrate-kv", "llama", "-o", "x", "--kv-bits", "5.5", "--calibration", text, *SMALL
    )
    assert "bits chosen  keys 2 in" in made.stdout
    refused = run("calibrate-kv", "llama", "-o", "x", "--kv", "k3v3", "--kv-bits", "5.5")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "leave one out" in refused.stderr


def test_constants_that_need_no_data_are_asked_for_by_name(text: str) -> None:
    result = evaluate(text, "llama", "--kv", "k3v3", "--kv-calibration", "none", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["preset"] == "k3v3-oblivious"


@pytest.mark.parametrize("task", ["passkey", "needle", "drift"])
def test_tasks(text: str, task: str) -> None:
    command = ["eval", "kv", "llama", "--kv", "kivi-2,turboquant", "--text", text]
    small = ["--task", task, "--windows", "1", "--seq-len", "256"]
    result = run(*command, *small, "--json")
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    reference = [] if task == "drift" else ["unquantized"]
    assert [row["preset"] for row in found] == [*reference, "kivi-2", "turboquant"]
    assert {row["task"] for row in found} == {task}
    table = run(*command, *small).stdout
    assert "turboquant" in table
    assert ("unchanged" in table) == (task == "drift")


def test_table(text: str) -> None:
    result = evaluate(text, "llama", "--kv", "turboquant")
    for label in ("scheme", "bytes/token", "worst layer", "unquantized ppl", "stepwise cache"):
        assert label in result.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["llama", "--kv", "k3v33"], 2, "no KV preset 'k3v33'; did you mean k3v3?"),
        (["llama", "--kv", "k3v3,k3v3"], 2, "a preset is named twice"),
        (["llama"], 2, "Missing option '--kv' or '--kv-bits'"),
        (["llama", "--kv-bits", "9"], 2, "--kv-bits 9 is not between 2 and 8"),
        (["llama", "--kv-bits", "2.5"], 1, "--kv-bits 2.5 is below"),
        (["llama", "--kv", "k3v3", "--sinks", "5000"], 2, "sinks: 5000 is not between"),
        (["missing", "--kv", "turboquant"], 1, "missing does not exist"),
        (["mamba", "--kv", "turboquant"], 1, "mamba: not a decoder with a KV cache"),
        (["narrow", "--kv", "turboquant"], 1, "width that is a multiple of 8"),
        (["nan", "--kv", "turboquant"], 1, "logits are not finite"),
        (["llama", "--kv", "k3v3", "--kv-calibration", "./gone"], 1, "gone: no such file"),
        (["llama", "--kv", "turboesm", "--kv-calibration", "none"], 1, "does not exist without"),
        (["llama", "--kv", "kivi-2", "--task", "passkey", "--chunk", "2"], 2, "is decoding"),
        (["llama", "--kv", "kivi-2", "--task", "drift", "--windows", "0"], 2, "no number of"),
        (["llama", "--kv", "kivi-2", "--task", "passkey"], 1, "32 tokens leave -"),
        (["llama", "--kv", "k3v3", "--windows", "999"], 1, "windows of 32 asked for"),
    ],
)
def test_errors(text: str, arguments: list[str], exit_code: int, message: str) -> None:
    result = run("eval", "kv", "--text", text, "--windows", "2", "--seq-len", "32", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_calibration_of_another_model(tmp_path: Path, text: str) -> None:
    output = calibrated(tmp_path, text, model="qwen")
    result = evaluate(text, "llama", "--kv", "k3v3", "--kv-calibration", output)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "was calibrated for another model" in result.stderr
    assert result.stderr.count("\n") == 1


def test_truncated_calibration(tmp_path: Path, text: str) -> None:
    output = Path(calibrated(tmp_path, text))
    output.write_bytes(output.read_bytes()[:1000])
    result = evaluate(text, "llama", "--kv", "k3v3", "--kv-calibration", str(output))
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"cannot read {output}" in " ".join(result.stderr.split())


def test_every_reader_refuses_a_changed_calibration(tmp_path: Path, text: str) -> None:
    output = calibrated(tmp_path, text)
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["1.value.levels_HL"] = tensors["1.value.levels_HL"][:, :2].contiguous()
    save_file(tensors, output, metadata=metadata)
    line = f"rotq: error: {output} is damaged: 1.value.levels_HL is I8 (1, 2), not I8 (1, 8)"
    result = evaluate(text, "llama", "--kv", "k3v3", "--kv-calibration", output)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    # servers and rotq bench serve
    with pytest.raises(RotqError, match=r"1\.value\.levels_HL"):
        find_calibration(tiny_model("llama"), Letters(), preset("k3v3"), Path(output))


@pytest.mark.parametrize(
    ("model", "output", "options", "exit_code", "message"),
    [
        ("llama", "none/kv", [], 1, "is not a folder"),
        ("llama", ".", [], 1, "it is a folder"),
        ("missing", "kv", [], 1, "missing does not exist"),
        ("mamba", "kv", [], 1, "mamba: not a decoder with a KV cache"),
        ("nan", "kv", [], 1, "of layer 0 are not finite"),
        ("llama", "kv", ["--kv", "k3"], 2, "no KV preset 'k3'; did you mean k3v3?"),
        ("llama", "kv", ["--kv", "k3v3,k4v3"], 2, "fitted under one preset"),
        ("llama", "kv", ["--calibration", "none.txt"], 1, "none.txt: no such file"),
        ("llama", "kv", ["--calibration-seq-len", "5000"], 1, "too short"),
    ],
)
def test_calibrate_errors(
    tmp_path: Path,
    text: str,
    model: str,
    output: str,
    options: list[str],
    exit_code: int,
    message: str,
) -> None:
    given = ["--calibration", text, *SMALL, *options]
    result = run("calibrate-kv", model, "-o", str(tmp_path / output), *given)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in " ".join(result.stderr.split())
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_only_a_file_of_its_own_kind_is_replaced(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    os.mkfifo(tmp_path / "pipe")
    for output, words in (
        (folder / "model.safetensors", "lies inside the model"),
        (folder / "new.safetensors", "lies inside the model"),
        (Path(text), "is the calibration text"),
        (tmp_path / "notes", "is no file of rotq calibrate-kv; rotq replaces only what it has"),
        (tmp_path / "link", "is no file of rotq calibrate-kv"),
        (tmp_path / "pipe", "is no plain file"),
    ):
        given = ["--calibration", text, *SMALL]
        result = run("calibrate-kv", str(folder), "-o", str(output), *given)
        assert (result.exit_code, result.stdout) == (1, "")
        assert words in " ".join(result.stderr.split())
        assert "calibration window" not in result.stderr
    assert (folder / "model.safetensors").read_text() == "weights"
    assert (tmp_path / "notes").read_text() == "mine"
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_what_is_replaced_and_what_stays_beside_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "kv.safetensors").touch()  # as mktemp leaves it
    (tmp_path / "kv.safetensors.partial").write_text("mine")
    first = Path(calibrated(tmp_path, text)).read_bytes()
    assert Path(calibrated(tmp_path, text, "--seed", "1")).read_bytes() != first
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "link").symlink_to(tmp_path / "kv.safetensors")
    (tmp_path / "there" / "dangling").symlink_to(tmp_path / "later")
    for name in ("link", "dangling"):
        output = str(tmp_path / "there" / name)
        result = run("calibrate-kv", "llama", "-o", output, "--calibration", text, *SMALL)
        assert result.exit_code == 0, result.stderr
        assert Path(output).is_symlink()
    assert (tmp_path / "kv.safetensors").read_bytes() == first
    assert (tmp_path / "later").read_bytes() == first
    assert (tmp_path / "kv.safetensors.partial").read_text() == "mine"
