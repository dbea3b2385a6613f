"""A device that is not there is refused in one line, by every command that takes one."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from rotq.checkpoint.load import load_model
from rotq.cli.main import main
from rotq.devices import usable_device
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
@pytest.mark.parametrize(
    "command",
    [
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
