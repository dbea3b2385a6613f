"""rotq: rotate, quantize and serve language models and protein language models.

Importing it makes transformers load rotq checkpoints and PEFT take packed layers; it imports
neither of them, nor torch.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from rotq.checkpoint.registration import register

__version__ = "0.1.0"


def load(model: str | PathLike[str], **options: Any) -> Any:
    """A model of transformers with its weights packed, in eval mode, of every format rotq reads.

    Args:
        model: Folder or .gguf file of the checkpoint, or its hub id ``ORG/NAME[@REVISION]``: dense,
            rotq, compressed-tensors or GGUF.
        options: ``dtype``, ``device_map``, ``trust_remote_code``, ``packed``, ``auto`` and settings
            of the configuration, as ``rotq.checkpoint.load.load_model`` takes them.

    Raises:
        RotqError: it cannot be read.
    """
    from rotq.checkpoint.load import load_model

    return load_model(model, **options)


register()
