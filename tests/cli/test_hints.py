"""Guesses of people who know other tools."""

import pytest
from click.testing import CliRunner

from rotq.cli.main import main


def line(*arguments: str) -> str:
    """The one line of a wrong usage."""
    result = CliRunner().invoke(main, arguments, prog_name="rotq")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("rotq: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("quantize m --bits 4", "No such option '--bits'; did you mean --set weights.bits=...?"),
        ("quantize m --bits=4", "did you mean --set weights.bits=...?"),
        ("quantize m --w_bits 4", "did you mean --set weights.bits=...?"),
        ("quantize m --group-size 64", "did you mean --set weights.group_size=...?"),
        ("quantize m --damping 1", "did you mean --set solver.damping=...?"),
        ("quantize m --steps 1", "did you mean --set transform.steps=... or --set tuning.steps"),
        ("quantize m --recipe w4", "did you mean -c?"),
        ("quantize m --preset w4", "did you mean -c?"),
        ("quantize m --output-dir o", "did you mean -o?"),
        ("quantize m --nsamples 3", "did you mean --num-samples?"),
        ("quantize m --force", "did you mean --overwrite?"),
        ("quantize --model m", "the model is given without an option's name"),
        ("quantize m --devise cpu", "'--device'"),
        ("eval ppl m --dataset x", "did you mean --text?"),
        ("eval ppl m --gpu 0", "did you mean --device?"),
        ("eval pll m --data x", "did you mean --fasta?"),
        ("serve-kv m --max-model-len 9", "did you mean --max-length?"),
        ("bench serve m --memory 4GiB", "did you mean --kv-memory?"),
        ("-V", "did you mean --version?; see 'rotq --help'"),
        ("--verison", "Did you mean '--version'?; see 'rotq --help'"),
        ("--json inspect m", "options stand behind the command; see 'rotq --help'"),
        ("-c w4 quantize m", "options stand behind the command"),
        ("--zzz", "No such option '--zzz'; see 'rotq --help'"),
    ],
)
def test_options(arguments: str, hint: str) -> None:
    assert hint in line(*arguments.split())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("quantise m", "No such command 'quantise'; did you mean rotq quantize?"),
        ("Inspect m", "did you mean rotq inspect?"),
        ("ppl m", "did you mean rotq eval ppl?"),
        ("eval pl m", "did you mean rotq eval p"),
        ("serve m", "did you mean rotq serve-kv?"),
        ("bench server", "did you mean rotq serve-kv?"),
        ("calibrate m", "did you mean rotq calibrate-kv?"),
        ("version", "did you mean rotq --version?"),
        ("zzzz", "No such command 'zzzz'; see 'rotq --help'"),
        ("bench", "Missing command; see 'rotq bench --help'"),
    ],
)
def test_commands(arguments: str, hint: str) -> None:
    assert hint in line(*arguments.split())


@pytest.mark.parametrize("config", ["w44", "W4", "w4.yaml", "configs/w4.yml", "w-4"])
def test_presets(config: str) -> None:
    said = line("quantize", "m", "-c", config)
    assert f"no recipe {config}: neither a file nor a preset; presets: exl3, fp8, gptq, " in said
    assert "; did you mean w4?" in said


def test_a_preset_that_nothing_comes_near() -> None:
    assert "did you mean" not in line("quantize", "m", "-c", "zzzzzz")


def test_nothing_at_all_is_the_help() -> None:
    result = CliRunner().invoke(main, [], prog_name="rotq")
    assert result.exit_code == 2
    assert "Commands:" in result.output
