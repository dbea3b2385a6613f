"""What the sites of a stage read: summed as it comes, or kept on the disk until a site is solved.

The moments of a wide layer are larger than its block: 3.3 GB for the 28672 features of a 70B model,
whose block has 1.7 GB in bf16. Where activations may be on the disk, the inputs of such a site
are written there while the block is run, and summed after the block has given its weights up.

Shape suffixes: M tokens, K features, G groups of rows that weigh tokens differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rotq.calibration.streams import BatchStore
from rotq.disk.files import remove
from rotq.job.context import Job
from rotq.job.part_names import inputs_file
from rotq.numerics import matmul_precision
from rotq.quantize.rounded_weights import is_large
from rotq.quantize.token_weights import TokenWeights
from rotq.recipe import Recipe
from rotq.solvers.statistics import Moments


def waits_on_disk(recipe: Recipe, features: int) -> bool:
    """Whether what a site of so many in features reads is kept until the site is solved."""
    return recipe.calibration.offload and is_large(features)


@dataclass
class Collected:
    """Moments of a stage's sites by name, each for every group of rows with weights of its own."""

    job: Job
    weights: TokenWeights | None
    """Importance of the tokens; None counts all once."""
    _sums: dict[str, list[Moments]] = field(default_factory=dict)
    _kept: dict[str, list[BatchStore]] = field(default_factory=dict)

    def add(self, name: str, number: int, x_MK: Tensor, target_MK: Tensor | None) -> None:
        """Take what a site has read of batch ``number``; batches come in their order.

        Args:
            x_MK: In the quantized stream.
            target_MK: In the original stream; None where the recipe needs none.
        """
        if waits_on_disk(self.job.recipe, x_MK.shape[-1]):
            self._keep(name, number, [x_MK] if target_MK is None else [x_MK, target_MK])
        else:
            self._sum(name, number, x_MK, target_MK)

    def share(self, names: Sequence[str]) -> None:
        """Add what the other processes have seen of the sites that were summed at once."""
        for name in names:
            for sums in self._sums.get(name, []):
                sums.sum_over(self.job.ranks)

    def take(self, name: str) -> list[Moments]:
        """The site's moments over the windows of all processes, held here no longer.

        All processes ask for the same sites in the same order.
        """
        kept = self._kept.pop(name, None)
        if kept is not None:
            with matmul_precision(self.job.recipe.calibration.precision):
                for number, store in enumerate(kept):
                    tensors = [some.to(self.job.device) for some in store]
                    self._sum(name, number, tensors[0], tensors[1] if len(tensors) > 1 else None)
                    remove(self.job.folder.path / inputs_file(name, number, self.job.ranks.rank))
            self.share([name])
        return self._sums.pop(name)

    def _keep(self, name: str, number: int, tensors: list[Tensor]) -> None:
        file = self.job.folder.path / inputs_file(name, number, self.job.ranks.rank)
        store = BatchStore.empty([some.shape for some in tensors], tensors[0].dtype, file)
        for place, some in enumerate(tensors):
            store[place] = some
        self._kept.setdefault(name, []).append(store)

    def _sum(self, name: str, number: int, x_MK: Tensor, target_MK: Tensor | None) -> None:
        weights = [None] if self.weights is None else self.weights.of(name, number).unbind(-1)
        if name not in self._sums:
            self._sums[name] = [
                Moments(x_MK.shape[-1], cross=target_MK is not None, device=self.job.device)
                for _ in weights
            ]
        for sums, weight_M in zip(self._sums[name], weights, strict=True):
            sums.add(x_MK, target_MK, weight_M)
