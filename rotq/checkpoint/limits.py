"""What the model of a folder can be given, known before its weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rotq.checkpoint.configuration import load_config
from rotq.checkpoint.gguf import find_gguf
from rotq.checkpoint.location import ModelName, locate
from rotq.errors import told

if TYPE_CHECKING:
    from rotq.calibration.limits import Limits


def read_limits(model: ModelName, *, trust_remote_code: bool = False) -> Limits:
    """Limits of a model, by its configuration.

    Args:
        model: As for ``load_model``.
        trust_remote_code: Let transformers run the checkpoint's own code.

    Raises:
        RotqError: it has no configuration, or transformers cannot build the model.
    """
    import torch
    from accelerate import init_empty_weights

    from rotq.models.limits import limits_of
    from rotq.models.task import auto_class

    path = locate(model).path
    gguf = find_gguf(path)
    config = load_config(
        gguf.parent if gguf else path,
        trust_remote_code=trust_remote_code,
        gguf_file=gguf.name if gguf else None,
    )
    with told(f"cannot build the model of {path}"), init_empty_weights(include_buffers=False):
        # eager: attention is not run, and other kinds need packages or devices
        built = auto_class(config).from_config(
            config,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
        )
    return limits_of(built)
