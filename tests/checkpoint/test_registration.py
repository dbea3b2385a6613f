"""``import rotq`` registers the format with transformers, whichever comes first, and is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import write_checkpoint

CHECK = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from rotq.checkpoint.quantizer import RotqConfig, RotqHfQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["rotq"] is RotqConfig
assert AUTO_QUANTIZER_MAPPING["rotq"] is RotqHfQuantizer
"""


def run(code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
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
assert not any("rotq" in type(finder).__module__ for finder in sys.meta_path)
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
