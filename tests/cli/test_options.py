"""Values that are refused before anything is read."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rotq.cli.main import main


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], prog_name="rotq")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["quantize", "", "-o", "out"], "[MODEL]"),
        (["quantize", "m", "-o", ""], "'-o'"),
        (["quantize", "m", "-o", "out", "-c", ""], "'-c'"),
        (["quantize", "m", "-o", "out", "--calibration", " "], "'--calibration'"),
        (["quantize", "m", "-o", "out", "--eval-text", ""], "'--eval-text'"),
        (["eval", "ppl", "m", "--text", ""], "'--text'"),
        (["eval", "ppl", "m", "--text", "t", "--reference", ""], "'--reference'"),
        (["eval", "ppl", "m", "--text", "t", "--device-map", ""], "'--device-map'"),
        (["eval", "pll", "", "--groups"], "'CHECKPOINT'"),
        (["inspect", ""], "'CHECKPOINT'"),
        (["calibrate-kv", "m", "-o", ""], "'-o'"),
        (["serve-kv", ""], "'MODEL'"),
        (["bench", "serve", "m", "--kv-calibration", ""], "'--kv-calibration'"),
    ],
)
def test_what_is_empty_is_refused(arguments: list[str], option: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert option in result.stderr
    assert "it is empty" in result.stderr


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands it behind an equals sign; a folder named ~ is a trap."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert f"{tmp_path}/home/m does not exist" in run("quantize", "~/m", "--output=~/o").stderr
    assert f"{tmp_path}/home/c does not exist" in run("inspect", "~/c").stderr
    assert "error: ./~/m does not exist" in run("quantize", "./~/m", "-o", "o").stderr
    assert "~nobody-here/m does not exist" in run("quantize", "~nobody-here/m", "-o", "o").stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "home").mkdir()
    (tmp_path / "home/r.yaml").write_text("nothing: 1")
    assert "home/r.yaml: " in run("quantize", "m", "-o", "o", "-c", "~/r.yaml").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "m\udce9", "-o", "out"],
        ["quantize", "m", "-o", "out\udce9"],
        ["quantize", "m", "-o", "out", "--calibration", "t\udce9"],
        ["quantize", "m", "-o", "out", "-c", "w\udce9"],
        ["eval", "ppl", "m", "--text", "t\udce9"],
        ["eval", "pll", "m", "--fasta", "p\udce9"],
    ],
)
def test_names_that_no_tokenizer_can_read_are_refused(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "is not UTF-8; rename it" in result.stderr


@pytest.mark.parametrize("command", ["quantize m -o o", "calibrate-kv m -o o", "bench serve m"])
def test_seeds_are_those_of_generators(command: str) -> None:
    for seed in (2**63, -(2**63) - 1, 10**30):
        result = run(*command.split(), "--seed", str(seed))
        assert result.exit_code == 2
        assert "is not from -2^63 to 2^63 - 1" in result.stderr
    for seed in (2**63 - 1, -(2**63)):
        assert "2^63" not in run(*command.split(), "--seed", str(seed)).stderr


@pytest.mark.parametrize("command", ["calibrate-kv m -o o", "eval kv m --kv k3v3 --text t"])
def test_calibration_windows_that_no_memory_holds_are_refused(command: str) -> None:
    result = run(*command.split(), "--num-samples", "100000000000")
    assert result.exit_code == 2
    assert "num_samples x seq_len" in result.stderr


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "gpu", "meta", "3x"])
def test_a_place_that_this_machine_lacks_is_refused(name: str) -> None:
    import torch

    if torch.cuda.device_count() and name == "cuda":
        pytest.skip("there is one")
    result = run("eval", "ppl", "no-model", "--text", "t", "--device-map", name)
    assert result.exit_code == 1
    assert f"--device-map {name}: neither a device of this machine" in result.stderr


def test_a_flag_is_taken_as_it_is_written(tmp_path: Path) -> None:
    for source in ("2024", "a: b.txt", "# notes.txt", "[x].txt", "no", "1e-2", "x #y.txt", "*z"):
        result = run("quantize", "--print-config", "--calibration", source)
        assert result.exit_code == 0, result.stderr
        file = tmp_path / "r.yaml"
        file.write_text(result.stdout)
        assert run("quantize", "--print-config", "-c", file).stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "weights.bit=3"], "--set weights.bit=3: unknown key weights.bit; did you mean"),
        (["--num-samples", "0"], "--num-samples 0: calibration.num_samples: 0 is not at least 1"),
        (["--set", "weights.bits=[1"], "--set weights.bits=[1: not YAML: "),
        (["--set", "kv_cache.bits=4"], "--set kv_cache.bits=4: kv_cache.bits is applied at run"),
        (["--set", "name=" + "[" * 5000], "[[...: nested more than 32 deep"),
    ],
)
def test_what_was_given_is_named_and_not_the_preset(arguments: list[str], message: str) -> None:
    result = run("quantize", "m", "-o", "out", "-c", "w4", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "w4.yaml" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    result = run("quantize", "m", "-o", "out", "-c", tmp_path)
    assert result.exit_code == 2
    assert f"no recipe {tmp_path}: it is a folder" in result.stderr
