"""Jobs on a tiny checkpoint that has weights, config and tokenizer on the disk."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from rotq.cli.main import main

ROOT = Path(__file__).parents[2]

SMALL = ["--num-samples", "4", "--seq-len", "64"]

W3 = ["-c", "w3", *SMALL, "--set", "tuning.steps=2"]
"""The preset, with less of everything."""


def load_script(name: str) -> Any:
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def make_checkpoint(folder: Path, num_layers: int = 3) -> Path:
    """An untrained model of train_tiny.py and its tokenizer."""
    load_script("train_tiny").make_tiny(folder, steps=0, num_layers=num_layers)
    return folder


def quantize(*arguments: str | Path) -> Result:
    """`rotq quantize` in this process."""
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)], prog_name="rotq")


def files_of(checkpoint: Path) -> dict[str, bytes]:
    """Contents by name, without the report, which tells times."""
    return {
        file.name: file.read_bytes() for file in checkpoint.iterdir() if file.name != "report.json"
    }
