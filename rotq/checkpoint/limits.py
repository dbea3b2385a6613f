"""What the model of a folder can be given, known before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rotq.checkpoint.configuration import load_config
from rotq.checkpoint.gguf import find_gguf
from rotq.errors import told

if TYPE_CHECKING:
    from rotq.calibration.limits import Limits


def read_limits(path: Path, *, trust_remote_code: bool = False) -> Limits:
    """Limits of the model of a folder or a .gguf file, by its configuration.

    Args:
        path: As for ``load_model``.
        trust_remote_code: Let transformers run the checkpoint's own code.

    Raises:
        RotqError: it has no configuration, or transformers cannot build the model.
    """
    import torch
    from accelerate import init_empty_weights

    from rotq.models.limits import limits_of
    from rotq.models.task import auto_class

    gguf = find_gguf(path)
    config = load_config(
        gguf.parent if gguf else path,
        trust_remote_code=trust_remote_code,
        gguf_file=gguf.name if gguf else None,
    )
    with told(f"cannot build the model of {path}"), init_empty_weights(include_buffers=False):
        # eager: attention is not run, and other kinds need packages or devices
        model = auto_class(config).from_config(
            config,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
        )
    return limits_of(model)
