"""Second moments of the loss's slopes at what layers put out: how errors of their rows add up.

    H_O = sum over tokens of g_t g_t^T,     g_t = d loss / d y_t,   y_t = W x_t

With the Hessian of the inputs it makes K-FAC's product, the curvature that two-sided rounding
lowers (YAQA, arXiv 2505.22988). The loss is the one of ``gradients``.

Shape suffixes: M tokens, N out features.
"""

from __future__ import annotations

from torch import Tensor

from rotq.checkpoint.source import read_tensors
from rotq.errors import RotqError
from rotq.job.context import Job
from rotq.job.part_names import gradient_part
from rotq.ranks import Ranks
from rotq.solvers.factor import add_lower_, mirror_

SUFFIX = ":output"
"""Behind a layer's path, in the part of its block."""


class OutputMoments:
    """Sums for the layers of one block, fp32; from the diagonal down until they are stored."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def see(self, path: str, slope: Tensor) -> None:
        """Add the slopes (..., N) at a layer's output.

        Args:
            path: Inside the block.
        """
        slope_MN = slope.flatten(0, -2).float()
        N = slope_MN.shape[1]
        sum_NN = self._sums.setdefault(path, slope_MN.new_zeros(N, N))
        add_lower_(sum_NN, slope_MN, slope_MN)

    def stored(self, prefix: str, ranks: Ranks) -> dict[str, Tensor]:
        """Over all processes, (N, N) on the CPU, as a part of the job holds them.

        Args:
            prefix: Of the block, for messages.

        Raises:
            RotqError: one is not finite.
        """
        for path, sum_NN in self._sums.items():
            ranks.sum_(sum_NN)
            mirror_(sum_NN)
            if not sum_NN.isfinite().all():
                raise RotqError(f"{prefix}.{path}: the gradient of the loss is not finite")
        return {f"{path}{SUFFIX}": sum_NN.cpu() for path, sum_NN in self._sums.items()}


def output_moments(job: Job, index: int) -> dict[str, Tensor]:
    """What a finished pass has found for a block: (N, N) fp32 by path inside the block."""
    stored = read_tensors(job.folder.part(gradient_part(index)))
    return {
        name.removesuffix(SUFFIX): sum_NN
        for name, sum_NN in stored.items()
        if name.endswith(SUFFIX)
    }
