"""Without Triton, as on macOS and Windows: all works on a CPU, and a GPU's tensor gets one line.

This file is also what runs where Triton is hidden: a folder with a ``sitecustomize.py`` hides it
from Python, and from every process that a job starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from kv_cases import paged_slots, tokens_of, transform_of
from tiny_jobs import make_checkpoint

from rotq.cli.main import main
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset
from rotq_kernels.hadamard import hadamard_triton
from rotq_kernels.kv.attention import packed_attention_triton
from rotq_kernels.kv.encode.launch import encode_kv_triton
from rotq_kernels.kv.format import KVFormat, KVHistory, KVPages
from rotq_kernels.packed_linear import packed_linear_triton

pytestmark = pytest.mark.slow

HIDDEN = 'import sys\nsys.modules["triton"] = None  # not found, by import and by find_spec\n'


def run(*arguments: str | Path) -> str:
    """A command of rotq in this process."""
    done = CliRunner().invoke(main, [*map(str, arguments)], prog_name="rotq")
    assert done.exit_code == 0, done.output
    return done.stdout


def work(folder: Path) -> None:
    """Quantize, with online rotations; evaluate; generate with a packed cache."""
    from rotq.checkpoint.load import load_model

    model, out, text = folder / "model", folder / "out", folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 30)
    tiny = ("--num-samples", "2", "--seq-len", "32", "--set", "tuning.steps=1")
    run("quantize", model, "-o", out, "-c", "quarot-w4a4kv4", *tiny)
    windows = ("--windows", "2", "--seq-len", "32")
    found = json.loads(run("eval", "ppl", out, "--text", text, *windows, "--json"))
    assert found["ppl"] > 1

    dense = load_model(model, dtype="float32")
    cache = PackedCache(dense, data_oblivious(dense.config, preset("k3v3")))
    ids = dense.generate(torch.full((1, 9), 5), past_key_values=cache, max_new_tokens=30)
    assert cache.get_seq_length() == ids.shape[1] - 1 > 9


def test_everything_works_on_a_cpu(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    path = os.pathsep.join((str(tmp_path), *sys.path))
    done = subprocess.run(
        [sys.executable, __file__, tmp_path],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def attend(tokens: int) -> None:
    """By the decode kernels for a few tokens, by those of a prefill for many."""
    form = KVFormat(head_dim=32, k_bits=3, v_bits=3, page_size=16)
    position_BT = torch.arange(tokens, dtype=torch.int32)[None]
    history = KVHistory(
        pages=KVPages.empty(form, 1, 1),
        page_table_BJ=torch.zeros(1, 1, dtype=torch.int32),
        length_B=torch.zeros(1, dtype=torch.int32),
        start_B=torch.zeros(1, dtype=torch.int32),
        constants=transform_of(form, 1),
    )
    packed_attention_triton(torch.ones(1, 1, tokens, 32), position_BT, history, scale=1.0)


def encode() -> None:
    form = KVFormat(head_dim=32, k_bits=3, v_bits=3, page_size=16)
    constants = transform_of(form, 1)
    slot_BT, _, num_pages = paged_slots([4], 16)
    pages = KVPages.empty(form, num_pages, 1)
    encode_kv_triton(*tokens_of(constants, 1, 4), torch.arange(4)[None], slot_BT, constants, pages)


ONE = torch.ones(1, 1, dtype=torch.int8)
LAUNCHERS: dict[str, Callable[[], object]] = {
    "decode": lambda: attend(1),
    "prefill": lambda: attend(70),
    "encode": encode,
    "hadamard": lambda: hadamard_triton(torch.ones(1, 4), ONE),
    "packed_linear": lambda: packed_linear_triton(
        torch.ones(1, 32), torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, 1), None, None, 4
    ),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_say_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    LAUNCHERS[name]()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="not installed: pip install triton"):
        LAUNCHERS[name]()


if __name__ == "__main__":
    assert find_spec("triton") is None
    work(Path(sys.argv[1]))
