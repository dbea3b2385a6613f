"""The processes that share one job: each has some of the calibration windows and solves some rows.

What they find is summed or put side by side in the order of their ranks, so that two runs with as
many processes give the same bytes. Rank 0 leads: it alone writes, decides what is finished, and
talks. torch.distributed does the rest, gloo between CPUs and NCCL between GPUs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rotq.errors import RotqError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the job; by default it is alone and nothing here does anything.

    Every method that speaks of all ranks must be called by all of them, in the same order.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    """Its number on this machine."""

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's run of ``items``; those of all ranks, one after the other, are all of them.

        Args:
            items: The same on every rank.
        """
        return items[slice(*self._run(len(items)))]

    def first_of_own(self, total: int) -> int:
        """Position of the first of this rank's items among ``total``."""
        return self._run(total)[0]

    def sum_(self, *tensors: Tensor) -> None:
        """Put the sum over all ranks into each tensor, contiguous and of one shape everywhere."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def largest_(self, tensor: Tensor) -> None:
        """The same with the largest of each element."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def total(self, *numbers: float) -> list[float]:
        """Sums over all ranks, in fp64."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def gathered(self, mine: T) -> list[T]:
        """What each rank has, in their order; tensors inside are on the CPU."""
        if self.size == 1:
            return [mine]
        # pickle alone knows no uint16
        buffer, found = io.BytesIO(), [b""] * self.size
        torch.save(mine, buffer)
        dist.all_gather_object(found, buffer.getvalue())
        return [torch.load(io.BytesIO(each), weights_only=False) for each in found]

    def told(self, answer: Callable[[], T]) -> T:
        """What the leader answers; the others do not ask."""
        if self.size == 1:
            return answer()
        box = [answer() if self.leads else None]
        dist.broadcast_object_list(box)
        return cast(T, box[0])

    def once(self, action: Callable[[], None]) -> None:
        """Let the leader do it; all go on when it is done."""
        if self.leads:
            action()
        if self.size > 1:
            dist.barrier()

    def device(self, name: str) -> str:
        """The device of that name for this rank: of several GPUs each has its own.

        Raises:
            RotqError: there are fewer GPUs than ranks, or one of them is asked for.
        """
        on_cuda = name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())
        if self.size == 1 or not on_cuda:
            return name
        if ":" in name:
            raise RotqError(f"{self.size} processes need a GPU each; --device cuda takes the first")
        if self.local >= torch.cuda.device_count():
            raise RotqError(
                f"{self.size} processes need a GPU each, and there are "
                f"{torch.cuda.device_count()}; --device cpu needs none"
            )
        return f"cuda:{self.local}"

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Put the sum over all ranks into every gradient; one that is not there counts as 0."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def _run(self, total: int) -> tuple[int, int]:
        return total * self.rank // self.size, total * (self.rank + 1) // self.size


ALONE = Ranks()
