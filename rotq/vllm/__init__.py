"""rotq inside vLLM: weights of 2 to 8 bits, the rotq format, keys and values in packed pages.

vLLM finds ``register`` by the entry point group ``vllm.general_plugins`` and calls it in each of
its processes: nothing else has to be asked for, and nothing here imports vLLM before that. Modules
are of two kinds. ``blocks``, ``passes``, ``heads``, ``paged_layer``, ``settings``, ``shards`` and
``targets`` know no vLLM; the others subclass or wrap what vLLM 0.32 has, and are imported by
``register`` alone.
"""

from __future__ import annotations

from rotq.errors import RotqError

TESTED = ("0.32.0",)
"""Versions of vLLM that the plugin was run with."""


def register() -> None:
    """Tell vLLM what rotq has; may be repeated, and is cheap.

    Raises:
        RotqError: this vLLM has no such interfaces.
    """
    try:
        from rotq.vllm.registration import register_all

        register_all()
    except (ImportError, AttributeError) as error:
        raise RotqError(
            f"rotq's plugin does not fit this vLLM ({error}); it was tested with vLLM "
            f"{', '.join(TESTED)}. VLLM_PLUGINS='' in the environment runs vLLM without it."
        ) from error
