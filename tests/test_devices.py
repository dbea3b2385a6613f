"""A device that is not there is refused in one line, by every command that takes one."""

from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from rotq.checkpoint.load import load_model
from rotq.cli.main import main
from rotq.devices import (
    check_device_name,
    choose_device,
    fast_dtype,
    has_double,
    multiplies,
    usable_device,
)
from rotq.errors import RotqError

MISSING = ["nonsense", "cuda:99", "meta", *(["cuda"] if not torch.cuda.is_available() else [])]


def test_the_cpu_is_there() -> None:
    assert usable_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", MISSING)
def test_devices_that_are_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(RotqError, match=f"--device {name}: this machine has none"):
        usable_device(name)
    with pytest.raises(RotqError, match=f"--device-map {name}: this machine has none"):
        load_model(tmp_path, device_map=name)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_spellings(name: str) -> None:
    check_device_name(name)


@pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "mps:0", "meta", ""])
def test_other_spellings(name: str) -> None:
    with pytest.raises(ValueError, match="is not auto, cpu, cuda, cuda:N or mps"):
        choose_device(name)
    result = CliRunner().invoke(main, ["eval", "ppl", "m", "--text", "t", "--device", name])
    assert result.exit_code == 2
    assert "is not auto, cpu, cuda, cuda:N or mps" in result.stderr


@pytest.mark.parametrize(
    ("there", "first", "in_double"),
    [([], "cpu", "cpu"), (["mps"], "mps", "cpu"), (["cuda", "mps"], "cuda:0", "cuda:0")],
)
def test_auto_is_the_first_that_is_there(
    monkeypatch: pytest.MonkeyPatch, there: list[str], first: str, in_double: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: "cuda" in there)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: "mps" in there)
    numbered = {"cuda": "cuda:0"}
    monkeypatch.setattr(
        "rotq.devices.usable_device", lambda name: torch.device(numbered.get(name, name))
    )
    assert str(choose_device("auto")) == first
    assert str(choose_device("auto", in_double="a search")) == in_double
    assert not has_double(torch.device("mps"))
    with pytest.raises(RotqError, match="--device mps has no fp64, which a search needs"):
        choose_device("mps", in_double="a search")


def test_one_option_everywhere() -> None:
    """The same name, choices and default in every command that has it, and all that compute do."""
    found = {}
    commands = {"": main}
    while commands:
        path, command = commands.popitem()
        if isinstance(command, click.Group):
            commands |= {f"{path} {name}".strip(): c for name, c in command.commands.items()}
        found[path] = [p for p in command.params if p.name == "device"]
    options = {path: params[0] for path, params in found.items() if params}
    computing = {"quantize", "calibrate-kv", "serve-kv", "bench serve"}
    assert options.keys() >= computing | {"eval ppl", "eval kv", "eval pll"}
    told = {(p.opts[0], p.default, str(p.metavar), p.help) for p in options.values()}
    assert len(told) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "ppl", "MODEL", "--text", "pydoc-test", "--device", "cuda"],
        ["eval", "kv", "MODEL", "--text", "pydoc-test", "--kv", "k3v3", "--device", "cuda"],
        ["eval", "pll", "MODEL", "--groups", "--device", "cuda"],
        ["calibrate-kv", "MODEL", "-o", "OUT", "--device", "cuda"],
        ["quantize", "MODEL", "-o", "OUT", "--device", "cuda"],
        ["quantize", "MODEL", "--dry-run", "--device", "cuda"],
        ["bench", "serve", "MODEL", "--device", "cuda"],
        ["serve-kv", "MODEL", "--device", "cuda"],
    ],
)
def test_commands(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    named = {"MODEL": str(tmp_path / "m"), "OUT": str(tmp_path / "new" / "out")}
    result = CliRunner().invoke(main, [named.get(word, word) for word in command])
    assert result.exit_code == 1
    line = "rotq: error: --device cuda: this machine has none that torch can use\n"
    assert result.stderr == line
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_cpu_multiplies_16_bits_where_onednn_does(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, asked = torch.device("cpu"), f"_is_mkldnn_{name}_supported"
    for found in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, asked, lambda found=found: found)
        assert multiplies(dtype, cpu) is found
        assert fast_dtype(dtype, cpu) == (dtype if found else torch.float32)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert fast_dtype(dtype, cpu) == torch.float32
    for other in (torch.float32, torch.float64):
        assert fast_dtype(other, cpu) == other
    assert fast_dtype(dtype, torch.device("cuda")) == dtype
