"""Runs of a block over the calibration windows: what its layers read, and what comes out of it.

Shape suffixes: B windows, T positions, D hidden size, K in features, M tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.capture import Ending, capture_inputs, replayed, run_block
from rotq.calibration.streams import BatchStore, Stream, Streams
from rotq.job.context import Job
from rotq.layers.online_linear import prepared_input
from rotq.models.adapter import Site
from rotq.models.experts import calibrating
from rotq.numerics import matmul_precision
from rotq.phases import phase
from rotq.quantize.collected import Collected
from rotq.quantize.token_weights import TokenWeights

QUANTIZED, ORIGINAL = "quantized", "original"
"""Names of the streams, in those of their files."""


@dataclass(frozen=True)
class BlockRunner:
    """Runs blocks over the calibration windows, on the job's device and in its precision."""

    job: Job

    @phase("forward passes")
    def start(
        self, exact: dict[str, Tensor], stored: dict[str, Tensor] | None = None
    ) -> Streams | None:
        """The streams before the first block; None where nothing looks at activations.

        Args:
            exact: Tensors outside the blocks, in the basis.
            stored: The same as the checkpoint has them, for the quantized stream; None: no others.
        """
        job = self.job
        if not job.recipe.needs_data:
            return None
        quantized = _empty_stream(job, QUANTIZED)
        original = _empty_stream(job, ORIGINAL) if job.recipe.needs_original else None
        for number, batch in enumerate(job.batches):
            for stream, outer in ((quantized, stored or exact), (original, exact)):
                if stream is not None:
                    hidden_BTD = job.skeleton.embed(outer, batch.ids_BT, batch.mask_BT)
                    stream.hidden[number] = hidden_BTD
        return Streams(quantized=quantized, original=original)

    @phase("forward passes")
    def advance(self, index: int, block: nn.Module, stream: Stream) -> None:
        """Replace the stream's hidden states by the block's outputs."""
        with matmul_precision(self.job.recipe.calibration.precision):
            for batch in range(len(stream.batches)):
                hidden_BTD, kwargs = self._given(index, stream, batch)
                with self._replayed(block, stream, batch):
                    stream.hidden[batch] = run_block(block, hidden_BTD, kwargs)
        stream.forget()

    def input_ranges(
        self, index: int, block: nn.Module, layers: Mapping[str, nn.Module], stream: Stream
    ) -> dict[str, Tensor]:
        """Largest magnitude of what each layer's weight multiplies, over all batches.

        Args:
            layers: Of the block, by path.

        Returns:
            () fp32 by path; 0 for a layer that was given nothing, as experts may be.
        """
        tops = {path: torch.zeros((), device=self.job.device) for path in layers}

        def see(path: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].numel():
                top = prepared_input(layer, args[0]).abs().amax().float()
                tops[path] = torch.maximum(tops[path], top)

        hooks = [
            layer.register_forward_pre_hook(functools.partial(see, path))
            for path, layer in layers.items()
        ]
        with matmul_precision(self.job.recipe.calibration.precision), calibrating(block):
            for batch in range(len(stream.batches)):
                run_block(block, *self._given(index, stream, batch))
        for hook in hooks:
            hook.remove()
        for top in tops.values():
            self.job.ranks.largest_(top)
        return tops

    def collect(
        self,
        index: int,
        stage: tuple[Site, ...],
        blocks: tuple[nn.Module, nn.Module],
        streams: Streams,
        weights: TokenWeights | None,
        last: bool,
    ) -> Collected:
        """One pass over the batches: what every site of the stage reads.

        Args:
            index: Position of the block in the model.
            stage: Sites whose inputs no unrounded layer of the stage decides.
            blocks: The original one, and the one whose earlier stages are rounded.
            weights: Importance of the tokens; None counts all once.
            last: Take the original stream to the end of the block.
        """
        collected = Collected(self.job, weights)
        with (
            matmul_precision(self.job.recipe.calibration.precision),
            calibrating(blocks[0]),
            calibrating(blocks[1]),
        ):
            for number in range(len(streams.batches)):
                seen, targets = self._both_inputs(index, stage, blocks, streams, number, last)
                for name, x_MK in seen.items():
                    collected.add(name, number, x_MK, targets.get(name))
        if last and streams.original is not None:
            streams.original.forget()
        collected.share([site.name for site in stage])
        return collected

    def _both_inputs(
        self,
        index: int,
        stage: tuple[Site, ...],
        blocks: tuple[nn.Module, nn.Module],
        streams: Streams,
        batch: int,
        last: bool,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the sites read of one batch, (M, K) by name: on the quantized stream, the original.

        At the last stage the original stream is taken past the block.
        """
        original, working = blocks
        seen, _ = self._inputs(index, stage, working, streams.quantized, batch)
        if streams.original is None:
            return seen, {}
        targets, output_BTD = self._inputs(
            index, stage, original, streams.original, batch, to_the_end=last
        )
        if output_BTD is not None:
            streams.original.hidden[batch] = output_BTD
        return seen, targets

    @phase("forward passes")
    def _inputs(
        self,
        index: int,
        stage: tuple[Site, ...],
        block: nn.Module,
        stream: Stream,
        batch: int,
        *,
        to_the_end: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the sites' weights multiply, and the block's output if it was run whole.

        What the last layers of attention and MLP are given is remembered once it is settled.
        """
        hidden_BTD, kwargs = self._given(index, stream, batch)
        firsts = {site.name: site.linears[0] for site in stage}
        settled = self._settled(stage, block, stream, batch)
        wanted = {*firsts.values(), *(ending.projection for ending in settled)}
        with self._replayed(block, stream, batch):
            seen, output_BTD = capture_inputs(
                block, wanted, hidden_BTD, kwargs, to_the_end=to_the_end
            )
        for ending in settled:
            given_BTK = seen[ending.projection].unflatten(0, hidden_BTD.shape[:2])
            stream.remember(ending.path, batch, given_BTK)
        without_padding = stream.batches[batch].without_padding
        multiplied = {
            name: without_padding(prepared_input(block.get_submodule(path), seen[path]))
            for name, path in firsts.items()
        }
        return multiplied, output_BTD

    def _given(self, index: int, stream: Stream, batch: int) -> tuple[Tensor, dict[str, Any]]:
        """What a block is run with: hidden states (B, T, D) and keyword arguments."""
        hidden_BTD = stream.hidden[batch].to(self.job.device)
        mask_BT = stream.batches[batch].mask_on(self.job.device)
        return hidden_BTD, self.job.skeleton.block_kwargs(index, hidden_BTD, mask_BT)

    def _settled(
        self, stage: Iterable[Site], block: nn.Module, stream: Stream, batch: int
    ) -> list[Ending]:
        """Modules of which what their last layer reads changes no more, and is not remembered."""
        adapter = self.job.skeleton.adapter
        names = {name for site in stage for name in site.linears}
        attention, mlp = adapter.attention_ending(), adapter.mlp_ending(block)
        settled = []
        if attention and {n for n in names if _inside(n, attention)} <= {attention.projection}:
            settled.append(attention)
        if mlp and names == {mlp.projection}:
            settled.append(mlp)
        return [
            ending for ending in settled if stream.wants(ending.path, batch, ending.features(block))
        ]

    @contextmanager
    def _replayed(self, block: nn.Module, stream: Stream, batch: int) -> Iterator[None]:
        adapter = self.job.skeleton.adapter
        with ExitStack() as stack:
            for ending in filter(None, (adapter.attention_ending(), adapter.mlp_ending(block))):
                given_BTK = stream.remembered(ending.path, batch)
                if given_BTK is not None:
                    stack.enter_context(replayed(block, ending, given_BTK.to(self.job.device)))
            yield


def _empty_stream(job: Job, name: str) -> Stream:
    """Room for what is kept of all windows, on the disk if the recipe says so.

    The quantized stream runs the MLP twice in a block, and its ends are remembered on the disk
    alone: they are several times as large as hidden states.
    """
    adapter, block = job.skeleton.adapter, job.skeleton.blocks[0]

    def store(kind: str, width: int) -> BatchStore:
        file: Path | None = None
        if job.recipe.calibration.offload:
            file = job.folder.path / f"{kind}-{name}-{job.ranks.rank}"
        shapes = [torch.Size((*batch.ids_BT.shape, width)) for batch in job.batches]
        return BatchStore.empty(shapes, job.dtype, file)

    ends: dict[str, BatchStore] = {}
    attention, mlp = adapter.attention_ending(), adapter.mlp_ending(block)
    if attention is not None:
        ends[attention.path] = store("attention", attention.features(block))
    if mlp is not None and name == QUANTIZED and job.recipe.calibration.offload:
        ends[mlp.path] = store("mlp", mlp.features(block))
    return Stream(store("hidden", job.skeleton.config.hidden_size), ends, job.batches)


def _inside(name: str, ending: Ending) -> bool:
    return name.startswith(f"{ending.path}.")
