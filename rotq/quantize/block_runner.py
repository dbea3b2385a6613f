"""Runs of a block over the calibration windows: what its layers read, and what comes out of it.

Shape suffixes: B windows, T positions, D hidden size, K in features, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rotq.calibration.capture import capture_inputs, replayed, run_block
from rotq.calibration.streams import Streams, Track
from rotq.layers.online_linear import prepared_input
from rotq.models.adapter import Site
from rotq.models.experts import calibrating
from rotq.models.skeleton import Skeleton
from rotq.numerics import matmul_precision
from rotq.solvers.statistics import Moments


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How blocks are run."""

    skeleton: Skeleton
    device: torch.device
    precision: str
    """Of fp32 products, see ``rotq.numerics``."""

    def advance(self, index: int, block: nn.Module, track: Track) -> None:
        """Replace the track's hidden states by the block's outputs."""
        with matmul_precision(self.precision):
            for batch, hidden_BTD in enumerate(track.hidden):
                hidden_BTD = hidden_BTD.to(self.device)
                mask_BT = track.batches[batch].mask_on(self.device)
                kwargs = self.skeleton.block_kwargs(index, hidden_BTD, mask_BT)
                with self._replayed(block, track, batch):
                    track.hidden[batch] = run_block(block, hidden_BTD, kwargs)
        track.forget()

    def collect(
        self,
        index: int,
        stage: tuple[Site, ...],
        blocks: tuple[nn.Module, nn.Module],
        streams: Streams,
        weights: list[Tensor] | None,
        last: bool,
    ) -> dict[str, Moments]:
        """One pass over the batches: moments of every site of the stage.

        Args:
            index: Position of the block in the model.
            stage: Sites whose inputs no unrounded layer of the stage decides.
            blocks: The original one, and the one whose earlier stages are rounded.
            weights: Importance of each batch's tokens, (B, T); None counts all once.
            last: Take the original track to the end of the block.

        Returns:
            By name of the site.
        """
        original, working = blocks
        firsts = {site.name: site.linears[0] for site in stage}
        settled = self._attention_is_settled(stage)
        moments: dict[str, Moments] = {}
        with (
            matmul_precision(self.precision),
            calibrating(original),
            calibrating(working),
        ):
            for batch, tokens in enumerate(streams.batches):
                names = firsts.values()
                seen, _ = self._inputs(index, working, streams.quantized, batch, names, settled)
                targets: dict[str, Tensor] = {}
                if streams.original is not None:
                    targets, output_BTD = self._inputs(
                        index, original, streams.original, batch, names, settled, to_the_end=last
                    )
                    if output_BTD is not None:
                        streams.original.hidden[batch] = output_BTD
                weight_M = None if weights is None else weights[batch].flatten()
                counted_M = tokens.real_M
                for name, first in firsts.items():
                    if name not in moments:
                        cross = streams.original is not None
                        features = seen[first].shape[-1]
                        moments[name] = Moments(features, cross=cross, device=self.device)
                    target_MK = targets.get(first)
                    moments[name].add(
                        _rows(seen[first], counted_M),
                        None if target_MK is None else _rows(target_MK, counted_M),
                        None if weight_M is None else _rows(weight_M, counted_M),
                    )
        if last and streams.original is not None:
            streams.original.forget()
        return moments

    def _attention_is_settled(self, stage: tuple[Site, ...]) -> bool:
        """Whether what the attention's output projection reads changes no more."""
        adapter = self.skeleton.adapter
        names = [name for site in stage for name in site.linears]
        inner = [name for name in names if name.startswith(f"{adapter.attention}.")]
        return bool(adapter.attention) and set(inner) <= {adapter.attention_output}

    def _inputs(
        self,
        index: int,
        block: nn.Module,
        track: Track,
        batch: int,
        names: Iterable[str],
        settled: bool,
        *,
        to_the_end: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the named layers' weights multiply, and the block's output if it was run whole.

        What the attention's output projection is given is remembered once it is settled.
        """
        hidden_BTD = track.hidden[batch].to(self.device)
        mask_BT = track.batches[batch].mask_on(self.device)
        kwargs = self.skeleton.block_kwargs(index, hidden_BTD, mask_BT)
        output_projection = self.skeleton.adapter.attention_output
        new = settled and track.attention(batch) is None
        wanted = {*names, output_projection} if new else set(names)
        with self._replayed(block, track, batch):
            seen, output_BTD = capture_inputs(
                block, wanted, hidden_BTD, kwargs, to_the_end=to_the_end
            )
        if new:
            track.remember(batch, seen[output_projection].unflatten(0, hidden_BTD.shape[:2]))
        multiplied = {name: prepared_input(block.get_submodule(name), seen[name]) for name in names}
        return multiplied, output_BTD

    def _replayed(self, block: nn.Module, track: Track, batch: int) -> AbstractContextManager[None]:
        attention_BTK, adapter = track.attention(batch), self.skeleton.adapter
        if attention_BTK is None:
            return nullcontext()
        return replayed(
            block, adapter.attention, adapter.attention_output, attention_BTK.to(self.device)
        )


def _rows(tensor: Tensor, counted_M: Tensor | None) -> Tensor:
    """The rows that are no padding."""
    return tensor if counted_M is None else tensor[counted_M.to(tensor.device)]
