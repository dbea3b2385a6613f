"""How evenly the inputs of each site use the range of a quantizer, before and after the rotations.

The original model is run twice over a sample of the calibration windows, as it is and transformed,
both unrounded. For x one token's features, and mean mu and covariance Sigma of the sample:

    max/rms    max_k |x_k| / rms(x), mean over tokens
    kurtosis   mean_k x_k^4 / (mean_k x_k^2)^2, mean over tokens; 3 for Gaussian features
    spread     max_j Sigma_jj / mean_j Sigma_jj
    QSUR       share of the quantizer's cube that the confidence ellipsoid of N(mu, Sigma) fills
               (OSTQuant, arXiv 2501.13987), with the ellipsoid's exact extent along axis j:
               log QSUR^(1/d) = (log chi2 + log det Sigma / d) / 2 + log(V_d) / d
                                - log(2 max_j (|mu_j| + sqrt(chi2 Sigma_jj)))
               V_d: volume of the unit ball, chi2: 99 % quantile for d degrees of freedom

A rotation keeps det Sigma, so that QSUR then tells what the spread tells.
Shape suffixes: B windows, T positions, D hidden size, M tokens, K features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rotq.calibration.capture import capture_inputs
from rotq.devices import double
from rotq.layers.online_linear import prepared_input
from rotq.models.experts import calibrating
from rotq.models.skeleton import Skeleton
from rotq.numerics import matmul_precision
from rotq.report import Flatness

SAMPLED_TOKENS = 2048
"""Of the sample, rounded up to whole windows."""

_NORMAL_99 = 2.3263478740408408
"""99 % quantile of the standard normal distribution."""

_REGULARIZATION = 1e-6
"""Share of the mean variance that is added to the diagonal of Sigma."""


@dataclass(frozen=True, kw_only=True)
class FlatnessChange:
    """One site's figures."""

    before: Flatness
    after: Flatness


class FlatnessMeter:
    """Hidden states of the sample before the current block, in both models."""

    def __init__(
        self,
        skeleton: Skeleton,
        windows: Iterable[Tensor],
        *,
        device: torch.device,
        precision: str,
    ) -> None:
        """
        Args:
            windows: The calibration windows, (1, T) each, from the first of which the sample is
                taken.
            precision: Of fp32 products in the forward passes.
        """
        self.skeleton, self.device, self.precision = skeleton, device, precision
        self.sample: list[Tensor] = []
        missing = SAMPLED_TOKENS
        for ids_BT in windows:
            self.sample.append(ids_BT)
            missing -= ids_BT.numel()
            if missing <= 0:
                break

    @torch.no_grad()
    def start(self, original: dict[str, Tensor]) -> None:
        """Embed the sample with the model's own tensors outside the blocks."""
        self._before = [self.skeleton.embed(original, ids_BT) for ids_BT in self.sample]

    @torch.no_grad()
    def start_transformed(self, fused: dict[str, Tensor]) -> None:
        """Embed the sample with the transformed tensors outside the blocks."""
        self._after = [self.skeleton.embed(fused, ids_BT) for ids_BT in self.sample]

    @torch.no_grad()
    def measure(self, index: int, before: nn.Module, after: nn.Module) -> dict[str, FlatnessChange]:
        """Figures of every kind of site in a block, by name; of experts the first stands for all.

        Args:
            index: Its position in the model; blocks are given in order.
            before: As the model has it.
            after: Transformed. Both are run on the sample, in the dtype of the embeddings.
        """
        first, self._before = self._figures(index, before, self._before)
        second, self._after = self._figures(index, after, self._after)
        return {name: FlatnessChange(before=first[name], after=second[name]) for name in first}

    def _figures(
        self, index: int, block: nn.Module, hidden: Sequence[Tensor]
    ) -> tuple[dict[str, Flatness], list[Tensor]]:
        linears: dict[str, str] = {}
        for site in self.skeleton.adapter.sites(block):
            linears.setdefault(site.name.split(".")[0], site.linears[0])
        seen: dict[str, list[Tensor]] = {name: [] for name in linears.values()}
        outputs: list[Tensor] = []
        with matmul_precision(self.precision), calibrating(block):
            for hidden_BTD in hidden:
                hidden_BTD = hidden_BTD.to(self.device)
                kwargs = self.skeleton.block_kwargs(index, hidden_BTD)
                inputs, output_BTD = capture_inputs(
                    block, seen, hidden_BTD, kwargs, to_the_end=True
                )
                assert output_BTD is not None, "the block was run to its end"
                outputs.append(output_BTD)
                for name, x_MK in inputs.items():
                    seen[name].append(x_MK)
        return {
            kind: flatness(prepared_input(block.get_submodule(name), torch.cat(seen[name])))
            for kind, name in linears.items()
        }, outputs


def flatness(x_MK: Tensor) -> Flatness:
    """The module's figures of a sample of tokens, in fp32; log det in fp64."""
    x_MK = x_MK.float()
    square_MK = x_MK.square()
    energy_M = square_MK.mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    variance_K, mean_K = torch.var_mean(double(x_MK), dim=0, correction=0)
    return Flatness(
        max_over_rms=(x_MK.abs().amax(1) / energy_M.sqrt()).mean().item(),
        kurtosis=(square_MK / energy_M[:, None]).square().mean().item(),
        spread=(variance_K.max() / variance_K.mean()).item(),
        log_qsur=_log_qsur(x_MK, mean_K, variance_K),
    )


def _log_qsur(x_MK: Tensor, mean_K: Tensor, variance_K: Tensor) -> float | None:
    """None where the sample has no more tokens than features, and so no full covariance.

    Nor has it one with values that are not finite.
    """
    M, K = x_MK.shape
    if M <= K:
        return None
    log_det = _log_det(double(x_MK) - mean_K, variance_K)
    if log_det is None:
        return None
    chi2 = chi_square_99(K)
    log_ball = K / 2 * math.log(math.pi) - math.lgamma(K / 2 + 1)
    extent = (mean_K.abs() + (chi2 * variance_K).sqrt()).max().item()
    return 0.5 * (math.log(chi2) + log_det / K) + log_ball / K - math.log(2 * extent)


def _log_det(centered_MK: Tensor, variance_K: Tensor) -> float | None:
    """log det of the regularized covariance: of the variances and of the correlations.

    Sums of correlations are exact enough in fp32, unless features depend on each other almost
    linearly; covariances are not, where a few features are a thousand times larger than the others.
    """
    variance_K = variance_K + _REGULARIZATION * variance_K.mean()
    scaled_MK = centered_MK / variance_K.sqrt()
    for dtype in (torch.float32, torch.float64):
        rows_MK = scaled_MK.to(dtype)
        with matmul_precision("highest"):
            correlation_KK = (rows_MK.T @ rows_MK).double() / len(rows_MK)
        correlation_KK.diagonal().fill_(1.0)
        factor_KK, failed = torch.linalg.cholesky_ex(correlation_KK)
        if not failed:
            return (variance_K.log().sum() + 2 * factor_KK.diagonal().log().sum()).item()
    return None


def chi_square_99(d: int) -> float:
    """99 % quantile for d degrees of freedom, to 1 % or better (Wilson and Hilferty, 1931)."""
    third = 2 / (9 * d)
    return d * (1 - third + _NORMAL_99 * math.sqrt(third)) ** 3
