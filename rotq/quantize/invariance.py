"""The function-preservation check: rotated and original model side by side, in fp64.

A few calibration tokens pass through every block three times: through the original weights in fp64,
through the rotated ones in fp64 (exact: they must agree up to the basis), and through the rounded
ones in the model's dtype (whose logits the finished checkpoint must reproduce bit for bit). Where
nothing is rotated there is nothing to compare, and the first two are left out: families that do not
compute in fp64 are quantized, too.
Shape suffixes: B windows, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rotq.calibration.capture import run_block
from rotq.errors import CheckFailed
from rotq.fusion.fuse import fuse_block, fuse_outer, in_basis
from rotq.job.context import Job
from rotq.job.rest import module_in
from rotq.models.exact import InDouble
from rotq.models.outer import Head
from rotq.numerics import matmul_precision
from rotq.phases import phase
from rotq.rotations.basis import Basis

TOLERANCE = 1e-9
"""Largest accepted difference in fp64, relative to the largest value."""
CHECKED_TOKENS = 64
"""Of the first calibration window, at most."""
VOCABULARY_ROWS = 4096
"""The head is compared on about this many evenly spaced tokens."""


class InvarianceCheck:
    """Takes a few tokens through the original, the rotated and the rounded blocks, and compares."""

    def __init__(self, job: Job, basis: Basis) -> None:
        self.skeleton, self.basis, self.dtype = job.skeleton, basis, job.plan.dtype
        self.ids_BT = job.windows.first_BT[:, :CHECKED_TOKENS]
        self.worst = 0.0
        """Largest relative difference so far."""

    @torch.no_grad()
    @phase("checks")
    def start(self, original: dict[str, Tensor]) -> None:
        """Embed the tokens and keep a sample of the head; ``original`` is the model's own."""
        if self.basis.is_identity:
            return
        self.reference_BTD = self.skeleton.embed(original, self.ids_BT).double()
        self.rotated_BTD = self._outside(self.reference_BTD)
        self._outer = self._sampled(original)

    @torch.no_grad()
    @phase("checks")
    def check_embedding(self, fused: dict[str, Tensor]) -> None:
        """Embed the tokens with the fused embedding, which may differ only by its rounding.

        Raises:
            CheckFailed: it differs by more.
        """
        if self.basis.is_identity:
            return
        embedded_BTD = self.skeleton.embed(fused, self.ids_BT)
        rounding = 8 * torch.finfo(embedded_BTD.dtype).eps
        self._compare("the embedding", embedded_BTD.double(), self.rotated_BTD, rounding)

    @torch.no_grad()
    @phase("checks")
    def start_quantized(self, stored: dict[str, Tensor]) -> None:
        """Embed the tokens with the embedding as it is stored, in the model's dtype."""
        self.quantized_BTD = self.skeleton.embed(stored, self.ids_BT)
        self._embedded_BTD = self.quantized_BTD

    def restart_quantized(self) -> None:
        """Begin again at the embedding, for blocks that were changed since."""
        self.quantized_BTD = self._embedded_BTD

    @torch.no_grad()
    @phase("checks")
    def rotate_block(self, index: int, block: nn.Module) -> nn.Module:
        """Fuse the basis into an fp64 block, in place, and check that its function is the same.

        Returns:
            The block.

        Raises:
            CheckFailed: the outputs differ; names the block.
        """
        device = next(block.parameters()).device
        self.reference_BTD = self._run(index, block, self.reference_BTD.to(device))
        fuse_block(block, self.skeleton.adapter, self.basis, index)
        self.rotated_BTD = self._run(index, block, self.rotated_BTD.to(device))
        name = self.skeleton.block_name(index)
        ends = self.basis.ends
        is_end = ends is not None and index == ends.last_block
        expected_BTD = self.reference_BTD if is_end else in_basis(self.reference_BTD, self.basis)
        self._note(self._compare(name, self.rotated_BTD, expected_BTD))
        return block

    @torch.no_grad()
    @phase("checks")
    def advance(self, index: int, block: nn.Module) -> None:
        """Take the quantized stream through a finished block, in the model's dtype.

        Always on the CPU, where the fresh process that must reproduce the logits runs too.
        """
        if next(block.parameters()).device.type != "cpu":
            block = copy.deepcopy(block).cpu()
        if next(block.parameters()).dtype != self.dtype:
            block = module_in(block, self.dtype)
        with matmul_precision("highest"):
            kwargs = self.skeleton.block_kwargs(index, self.quantized_BTD)
            self.quantized_BTD = run_block(block, self.quantized_BTD, kwargs)

    @torch.no_grad()
    @phase("checks")
    def check_head(self) -> None:
        """Compare fp64 logits of original and rotated model on sampled vocabulary rows.

        Raises:
            CheckFailed: they differ.
        """
        if self.basis.is_identity:
            return
        fused = fuse_outer(self._outer, self.skeleton.adapter, self.basis)
        with InDouble():
            reference_BTV = self.skeleton.logits(self._outer, self.reference_BTD.cpu())
            rotated_BTV = self.skeleton.logits(fused, self.rotated_BTD.cpu())
        self._note(self._compare("the head", rotated_BTV, reference_BTV))

    @phase("checks")
    def logits(self, outer: dict[str, Tensor], head: Head | None = None) -> Tensor:
        """(B, T, V) of the quantized stream, in the model's dtype; after the last block.

        Args:
            head: In place of the head's own product, see ``Skeleton.logits``.
        """
        with matmul_precision("highest"):
            return self.skeleton.logits(outer, self.quantized_BTD, head)

    def _outside(self, hidden_BTD: Tensor) -> Tensor:
        """The original's hidden states as they are before the first block."""
        return in_basis(hidden_BTD, self.basis) if self.basis.turns_outer else hidden_BTD.clone()

    def _run(self, index: int, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        with InDouble():
            return run_block(block, hidden_BTD, self.skeleton.block_kwargs(index, hidden_BTD))

    def _sampled(self, outer: dict[str, Tensor]) -> dict[str, Tensor]:
        adapter = self.skeleton.adapter
        vocabulary = {f"{path}.weight" for path in (adapter.embedding, adapter.head)}
        size = len(outer[f"{adapter.embedding}.weight"])
        sampled = {}
        for name, tensor in outer.items():
            # biases of the head too, which no other vector is as long as
            if name in vocabulary or tensor.shape == (size,):
                tensor = tensor[:: -(-len(tensor) // VOCABULARY_ROWS)]
            exact = tensor.is_floating_point()
            sampled[name] = tensor.to(torch.float64, copy=True) if exact else tensor
        return sampled

    def _note(self, difference: float) -> None:
        self.worst = max(self.worst, difference)

    def _compare(
        self, where: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE
    ) -> float:
        scale = expected.abs().max().clamp(min=1e-30)
        difference = ((actual - expected).abs().max() / scale).item()
        if not difference <= tolerance:
            raise CheckFailed(
                f"the rotation changes the function of {where}: relative difference "
                f"{difference:.1e}, allowed {tolerance:.0e}"
            )
        return difference
