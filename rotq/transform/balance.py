"""Scales in closed form, from mean squares of features.

Rounding features x' = x T makes an error of the square of their range, spread evenly, which W T^-T
carries on. With x_k^2 the mean square of a feature, w_k^2 the sum of squares of what reads it, and
a Hadamard matrix behind S that mixes all features, the error to be made small is

    (sum_k x_k^2 / S_k^2) (sum_k w_k^2 S_k^2),      least at    S_k^4 = x_k^2 / w_k^2

That is so for up and value; for query_key keys are what is rounded and queries what reads them.
Behind a norm nothing mixes after S, and the largest feature sets the range:

    (max_k x_k^2 / S_k^2) (sum_k w_k^2 S_k^2),      least at    S_k^2 = x_k^2

Shape suffixes: B windows, T positions, D hidden size, M tokens, K features, F free factors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.capture import run_block
from rotq.job.context import Job
from rotq.models.exact import normalized
from rotq.models.experts import calibrating
from rotq.models.scalings import Scaling, scalings
from rotq.rotations.basis import Basis


@dataclass(kw_only=True)
class Squares:
    """Of one block: mean squares of features, and of the weights that read them, fp64."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, x: Tensor) -> None:
        """Add tokens (..., K)."""
        x_MK = x.detach().flatten(0, -2).float()
        self.sums[name] = self.sums.get(name, 0.0) + x_MK.square().sum(0).double()
        self.counts[name] = self.counts.get(name, 0) + len(x_MK)

    def mean_K(self, name: str) -> Tensor:
        """Never zero: of a feature that is, the smallest that is not."""
        square_K = self.sums[name] / max(self.counts[name], 1)
        positive = square_K[square_K > 0]
        return square_K.clamp(min=positive.min().item() if positive.numel() else 1.0)


@dataclass(frozen=True)
class Balancer:
    """Closed-form bases of one model."""

    job: Job

    @torch.no_grad()
    def measure(self, embedded: Sequence[Tensor]) -> list[Squares]:
        """Of every block, from the original model's run over the calibration tokens.

        Args:
            embedded: (B, T, D) batches, as the first block is given them.
        """
        skeleton, hidden = self.job.skeleton, list(embedded)
        found = []
        for index in range(skeleton.num_blocks):
            block = self.job.load_block(index, torch.float32)
            squares = Squares()
            handles = self._watch(block, squares)
            with calibrating(block):
                for batch, hidden_BTD in enumerate(hidden):
                    kwargs = skeleton.block_kwargs(index, hidden_BTD)
                    hidden[batch] = run_block(block, hidden_BTD, kwargs)
            for handle in handles:
                handle.remove()
            self._add_weights(block, squares)
            found.append(squares)
        return found

    def scales(
        self, squares: Sequence[Squares], basis: Basis, wanted: Sequence[str]
    ) -> dict[str, Tensor]:
        """Free factors by name (``LAYER.scales.NAME``), fp32; their geometric mean is one.

        Args:
            basis: Its R1 is what scales behind norms go with.
            wanted: Names of scalings.
        """
        factors = {}
        for index, layer in enumerate(scalings(self.job.skeleton, wanted)):
            for name, scaling in layer.items():
                free = self._free(squares[index], name, scaling, basis)
                centred = free.log() - free.log().mean()
                factors[f"{index}.scales.{name}"] = centred.exp().float()
        return factors

    def _free(self, squares: Squares, name: str, scaling: Scaling, basis: Basis) -> Tensor:
        if name in ("qkv", "gate_up"):
            x_D = squares.mean_K(f"{name}.x")
            if basis.residual_DD is None:
                return (x_D * squares.mean_K(f"{name}.gain")).sqrt()
            # mean squares in R1's basis of features that are not correlated
            return (x_D @ basis.residual_DD.to(x_D.device).square()).sqrt()
        if name == "up":
            experts = range(scaling.shape[0])
            x, w = (
                torch.stack([squares.mean_K(f"up.{expert}.{key}") for expert in experts])
                for key in ("x", "w")
            )
        else:
            x, w = (_tied(squares.mean_K(f"{name}.{key}"), scaling) for key in ("x", "w"))
        return (w / x if name == "query_key" else x / w).pow(0.25)

    def _watch(self, block: nn.Module, squares: Squares) -> list[Any]:
        """Hooks that add what passes through a block."""
        adapter = self.job.skeleton.adapter

        def before(path: str, name: str, change: Callable[[Tensor], Tensor] | None = None) -> Any:
            def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                squares.add(name, args[0] if change is None else change(args[0]))

            return block.get_submodule(path).register_forward_pre_hook(see)

        def after(path: str, name: str) -> Any:
            def see(_: nn.Module, __: object, output: Tensor) -> None:
                # norms on heads give (..., H, d), projections (..., H d)
                squares.add(name, output.flatten(2))

            return block.get_submodule(path).register_forward_hook(see)

        norms = {"qkv": adapter.attention_norm, "gate_up": adapter.mlp_norm}
        return [
            *(
                before(path, f"{name}.x", functools.partial(normalized, block.get_submodule(path)))
                for name, path in norms.items()
            ),
            before(adapter.attention_output, "value.x"),
            after(adapter.query_norm or adapter.query, "query_key.w"),
            after(adapter.key_norm or adapter.key, "query_key.x"),
            *(
                before(path, f"up.{expert}.x")
                for expert, path in enumerate(adapter.mlp_writers(block))
            ),
        ]

    def _add_weights(self, block: nn.Module, squares: Squares) -> None:
        """What the weights that read features have in squares, per feature."""
        adapter = self.job.skeleton.adapter
        readers = {
            "qkv": (adapter.attention_norm, (adapter.query, adapter.key, adapter.value)),
            "gate_up": (adapter.mlp_norm, adapter.mlp_readers(block)),
        }
        for name, (norm, paths) in readers.items():
            gain_D = adapter.norm_offset + block.get_parameter(f"{norm}.weight")
            squares.add(f"{name}.gain", gain_D[None])
            for path in paths:
                squares.add(f"{name}.w", block.get_parameter(f"{path}.weight") * gain_D)
        squares.add("value.w", block.get_parameter(f"{adapter.attention_output}.weight"))
        for expert, path in enumerate(adapter.mlp_writers(block)):
            squares.add(f"up.{expert}.w", block.get_parameter(f"{path}.weight"))


def _tied(per_feature_K: Tensor, scaling: Scaling) -> Tensor:
    """Sums over heads that share a factor and over the two features of a pair: (heads, F)."""
    heads, num_free = scaling.shape
    R = scaling.num_pairs
    x = per_feature_K.view(heads, -1, num_free + R).mean(1)
    return torch.cat((x[:, :R] + x[:, R : 2 * R], 2 * x[:, 2 * R :]), dim=-1)
