"""``import rotq`` registers the format with transformers, whichever comes first, and is light."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_checkpoints import write_checkpoint

from rotq.checkpoint import registration

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

CHECK = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from rotq.checkpoint.quantizer import RotqConfig, RotqHfQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["rotq"] is RotqConfig
assert AUTO_QUANTIZER_MAPPING["rotq"] is RotqHfQuantizer
"""


def run(code: str, *arguments: str, installed: Path | None = None) -> None:
    """Run Python code in a fresh process.

    Args:
        installed: Where the metadata of an installed rotq lie; None leaves those of this one out.
    """
    paths = [*([str(installed)] if installed else []), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(installed is not None)),
        },
    )
    assert done.returncode == 0, done.stderr


LIGHT = """
import sys, rotq
assert not {"torch", "transformers"} & set(sys.modules)
import importlib, transformers
importlib.reload(rotq)
assert "torch" not in sys.modules
import transformers.quantizers.auto as auto
"""

AS_IT_WAS = """
import inspect
assert "register_quantizer" in inspect.getsource(auto)
waiting = [finder for finder in sys.meta_path if "rotq" in type(finder).__module__]
assert [finder.awaited for finder in waiting] == ["peft"]
"""

LOAD = """
import sys
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
"""


def test_rotq_first_and_light() -> None:
    run(LIGHT + CHECK + AS_IT_WAS)


@pytest.mark.parametrize(
    "imports",
    [
        "import rotq; from transformers import AutoModelForCausalLM, LlamaForCausalLM",
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM; import rotq",
    ],
    ids=["rotq first", "transformers first"],
)
def test_both_orders(tmp_path: Path, imports: str) -> None:
    written = write_checkpoint(tmp_path, format="rotq")
    run(imports + LOAD + CHECK, str(written.path))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Metadata of rotq with what pyproject.toml declares, in front of any other's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "site" / "rotq-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: rotq\nVersion: 0\n")
    with (folder / "entry_points.txt").open("w") as file:
        for group, points in project["entry-points"].items():
            file.write(f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items()))
    return folder.parent


def test_programs_that_never_heard_of_rotq_load_the_format(tmp_path: Path, installed: Path) -> None:
    """Here transformers' mapping is what imports torch, which then calls rotq."""
    imports = "import transformers.quantizers.auto; from transformers import AutoModelForCausalLM"
    written = write_checkpoint(tmp_path, format="rotq")
    run(imports + LOAD + CHECK, str(written.path), installed=installed)


OURS = "import awaited\nawaited.known = True"
CALLS_US = "import rotq.checkpoint.registration as ours\nours.register()"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules, where importing `awaited` is to be followed by importing `ours`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(registration, "AWAITED", {"awaited": "ours"})
    for name in ("awaited", "ours", "another"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(OURS if name == "ours" else "")
    return tmp_path


def waiting() -> list[str]:
    return [finder.awaited for finder in sys.meta_path if isinstance(finder, registration._Finder)]


def test_asking_whether_a_module_is_there_is_not_importing_it(modules: Path) -> None:
    registration.register()
    assert importlib.util.find_spec("awaited") is not None
    assert "ours" not in sys.modules
    assert importlib.import_module("awaited").known
    assert "awaited" not in waiting()


def test_a_module_that_is_being_executed_is_waited_for(modules: Path) -> None:
    (modules / "awaited.py").write_text(CALLS_US)
    module = importlib.import_module("awaited")
    assert not hasattr(module, "known")
    importlib.import_module("another")
    assert module.known
    assert "awaited" not in waiting()


def test_what_does_not_come_later_is_registered_with_at_once(modules: Path) -> None:
    module = importlib.import_module("awaited")
    registration.register()
    registration.register()
    assert module.known
    assert "awaited" not in waiting()


def test_a_broken_rotq_breaks_nobody_else(modules: Path) -> None:
    (modules / "ours.py").write_text("import nothing_of_that_name")
    registration.register()
    with pytest.warns(RuntimeWarning, match="rotq cannot register with awaited: No module named"):
        importlib.import_module("awaited")
