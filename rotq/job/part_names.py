"""Names of the parts of a job, and of what is recorded about it."""

OUTER = "outer"
"""Name of the part with everything outside the blocks."""

KEPT = "kept"
"""Name of the part with what the model's forward does not reach."""

TUNING = "tuning"
"""Name under which the training of scales is recorded, once all tuned parts are on the disk."""

TRANSFORM = "transform"
"""Name of the part with the basis, where it was searched for."""


GRADIENTS = "gradients"
"""Name under which the pass that weighs tokens by gradients is recorded, with all its parts."""


OWN_TEXT = "own-text"
"""Name of the part with the calibration windows that the model has written itself."""

SENSITIVITIES = "sensitivities"
"""Name under which is recorded what the loss feels of each layer's rounding, by its grid."""


def gradient_part(index: int) -> str:
    """Name of what that pass found for a block."""
    return f"gradient-{index:05d}"


def block_part(index: int) -> str:
    """Name of a block's part; sorts in block order."""
    return f"block-{index:05d}"


def tuned_part(name: str) -> str:
    """Name of what ``tune`` made of a part."""
    return f"tuned-{name}"


def inputs_file(site: str, batch: int, rank: int) -> str:
    """Name of what a site has read of a batch of a process, until the site is solved."""
    return f"inputs-{site}-{batch}-{rank}"
