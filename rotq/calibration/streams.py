"""Hidden states of all calibration windows between two blocks.

Shape suffixes: B windows of a batch, T positions, D hidden size, K features that the last layer of
a module reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from rotq.calibration.batches import Batch
from rotq.errors import RotqError


class BatchStore:
    """Batches of hidden states, in memory or in a file that is read batch by batch."""

    def __init__(self, shapes: list[torch.Size], dtype: torch.dtype, file: Path | None) -> None:
        self._shapes, self._dtype, self._file = shapes, dtype, file
        self._batches: list[Tensor] = []
        sizes = [shape.numel() * dtype.itemsize for shape in shapes]
        self._offsets = [0, *accumulate(sizes)]

    @classmethod
    def empty(cls, shapes: list[torch.Size], dtype: torch.dtype, file: Path | None) -> BatchStore:
        """Room for one batch per shape; ``file`` keeps it on disk instead of in memory.

        Raises:
            RotqError: no room on the disk.
        """
        store = cls(shapes, dtype, file)
        if file is None:
            store._batches = [torch.empty(shape, dtype=dtype) for shape in shapes]
        else:
            store._write(0, b"")
        return store

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self._shapes[0][-1]

    def __getitem__(self, index: int) -> Tensor:
        """(B, T, D) hidden states of one batch, on the CPU."""
        if self._file is None:
            return self._batches[index]
        # plain reads: a mapped file would count as memory of the process
        data = torch.empty(self._offsets[index + 1] - self._offsets[index], dtype=torch.uint8)
        with self._file.open("rb", buffering=0) as handle:
            handle.seek(self._offsets[index])
            handle.readinto(data.numpy().data)
        return data.view(self._dtype).view(self._shapes[index])

    def __setitem__(self, index: int, hidden_BTD: Tensor) -> None:
        if self._file is None:
            self._batches[index].copy_(hidden_BTD)
            return
        data = hidden_BTD.to("cpu", self._dtype).contiguous().view(-1).view(torch.uint8)
        self._write(self._offsets[index], data.numpy().data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        assert self._file is not None
        try:
            with self._file.open("r+b" if offset or self._file.exists() else "wb") as handle:
                handle.seek(offset)
                handle.write(data)
        except OSError as error:
            raise RotqError(f"cannot keep activations in {self._file}: {error.strerror}") from None


class Stream:
    """One model's way through the blocks: its hidden states, and what modules of a block came to.

    Once queries, keys and values of a block change no more, what the attention's output projection
    reads is remembered, and later passes over the block replay it instead of computing it again;
    so is what the MLP's last layer reads.
    """

    def __init__(
        self, hidden: BatchStore, ends: Mapping[str, BatchStore], batches: Sequence[Batch]
    ) -> None:
        """
        Args:
            hidden: (B, T, D) of every batch.
            ends: Room for what the last layer of a module reads, (B, T, K), by the module's path.
            batches: That they belong to.
        """
        self.hidden, self._ends = hidden, ends
        self.batches = batches
        self._remembered: set[tuple[str, int]] = set()

    def wants(self, path: str, batch: int, features: int) -> bool:
        """Whether there is room for what the last layer of a module reads, and it is not there."""
        has_room = path in self._ends and self._ends[path].width == features
        return has_room and (path, batch) not in self._remembered

    def remember(self, path: str, batch: int, given_BTK: Tensor) -> None:
        """Keep what the last layer of a module reads, for one batch, until ``forget``."""
        self._ends[path][batch] = given_BTK
        self._remembered.add((path, batch))

    def remembered(self, path: str, batch: int) -> Tensor | None:
        """What was remembered, (B, T, K) on the CPU, or None."""
        return self._ends[path][batch] if (path, batch) in self._remembered else None

    def forget(self) -> None:
        """The hidden states are those before the next block now."""
        self._remembered.clear()


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Where calibration stands before a block, batch by batch."""

    quantized: Stream
    """Through the partly quantized model."""
    original: Stream | None
    """Through the original model; None where nothing needs it: no target correction."""

    @property
    def batches(self) -> Sequence[Batch]:
        """Token ids and masks that both streams' hidden states belong to."""
        return self.quantized.batches
