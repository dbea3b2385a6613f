"""How vLLM runs in the process of the tests, and tiny checkpoints for it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "rotq",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
# the interpreter is for the tests of kernels; vLLM would try to use it
os.environ.pop("TRITON_INTERPRET", None)

import pytest
import torch
import transformers
from tiny_checkpoints import write_checkpoint
from tiny_models import CONFIGS

from rotq.formats.integer import Grid
from rotq.vllm import register


@pytest.fixture(scope="session", autouse=True)
def plugin() -> None:
    """As vLLM itself does when it finds the entry point."""
    register()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny checkpoint of random codes."""

    def make(bits: int, group_size: int = 64, *, symmetric: bool = False, **more: Any) -> Path:
        grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
        folder = tmp_path_factory.mktemp("packed")
        return write_checkpoint(
            folder, more.pop("family", "llama-wide"), grids=(grid,), **more
        ).path

    return make


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny model of small weights: random codes are loud, and flip codes of the cache."""

    def make(family: str = "llama-wide") -> Path:
        config_class, settings = CONFIGS[family]
        config = getattr(transformers, config_class)(**settings, initializer_range=0.05)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        folder = tmp_path_factory.mktemp("dense")
        model.save_pretrained(folder)
        return folder

    return make
