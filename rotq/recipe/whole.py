"""The recipe of one job, and what its sections ask of each other."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

from rotq.recipe.calibration import Calibration, Importance
from rotq.recipe.sections import (
    FLOATS,
    Activations,
    KVCache,
    Output,
    Rotation,
    Solver,
    Weights,
    check,
)
from rotq.recipe.training import Transform, Tuning


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice of one job, by section; sections are checked alone, then together."""

    name: str = "default"
    """Equal to the name of its file."""
    weights: Weights = field(default_factory=Weights)
    rotation: Rotation = field(default_factory=Rotation)
    transform: Transform = field(default_factory=Transform)
    activations: Activations = field(default_factory=Activations)
    kv_cache: KVCache = field(default_factory=KVCache)
    calibration: Calibration = field(default_factory=Calibration)
    importance: Importance = field(default_factory=Importance)
    solver: Solver = field(default_factory=Solver)
    tuning: Tuning = field(default_factory=Tuning)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        check("name", self.name, len(self.name) <= 100, "at most 100 characters long")
        if self.solver.rounder == "trellis":
            self._check_trellis()
        else:
            bits = (self.weights.bits, *(each.bits for each in self.weights.overrides))
            check("weights.bits", 1, 1 not in bits, "2 to 8, or 1 to 8 with solver.rounder=trellis")
        if self.weights.format != "int":
            self._check_floats()
        if self.solver.two_sided:
            self._check_two_sided()
        if self.rotation.inputs != "none":
            self._check_inputs()
        if self.output.format == "exl3":
            self._check_exl3()
        if self.output.format != "rotq":
            self._check_expressible()
        fixed = self.transform.method == "fixed" and not self.transform.scalings
        ends = self.rotation.residual_ends
        if ends != "fused" and not fixed:
            raise ValueError(
                f"rotation.residual_ends={ends} applies the R1 that is drawn; transform.method "
                "must be fixed, without scalings"
            )

    def _check_inputs(self) -> None:
        """What rotated inputs do not go with."""
        if self.weights.format not in ("nvfp4", "mxfp4"):
            raise ValueError("rotation.inputs is for weights.format=nvfp4 and mxfp4")
        if self.weights.overrides or self.transform.method != "fixed" or self.transform.scalings:
            raise ValueError(
                "rotation.inputs rotates every layer as drawn: set transform.method=fixed, no "
                "scalings, and no weights.overrides"
            )

    def _check_two_sided(self) -> None:
        """What rows that feel each other do not go with."""
        if self.weights.format != "int":
            raise ValueError(f"solver.two_sided rounds integers, not {self.weights.format}")
        if self.output.format == "exl3":
            raise ValueError("solver.two_sided is not for output.format=exl3; rotq holds its codes")
        if self.solver.rounder == "trellis" and self.solver.refine_sweeps:
            raise ValueError("solver.two_sided sweeps no paths: set solver.refine_sweeps=0")
        if self.importance.groups != 1:
            raise ValueError("solver.two_sided weighs all rows together: set importance.groups=1")

    def _check_floats(self) -> None:
        """What the format of the weights settles, and what is of integers alone."""
        weights, kind = self.weights, self.weights.format
        bits, group_size = FLOATS[kind]
        for key, value, wanted in (
            ("weights.bits", weights.bits, bits),
            ("weights.group_size", weights.group_size, group_size),
            ("weights.symmetric", weights.symmetric, True),
            ("weights.average_bits", weights.average_bits, 0),
            ("weights.embedding", weights.embedding, 16),
            ("weights.head", weights.head, 16),
            ("solver.rounder", self.solver.rounder, "scalar"),
            ("tuning.code_steps", self.tuning.code_steps, 0),
            *self._block_choices(),
        ):
            if value != wanted:
                shown = str(wanted).lower() if isinstance(wanted, bool) else wanted
                raise ValueError(f"weights.format={kind} needs {key}={shown}, got {value}")
        if any(each.bits or each.group_size for each in weights.overrides):
            raise ValueError(f"weights.format={kind}: overrides can keep layers, and nothing else")
        if self.activations.bits not in (bits, 16):
            raise ValueError(
                f"weights.format={kind} rounds activations to the same floats; set "
                f"activations.bits={bits}, or 16"
            )
        if self.activations.bits != 16 and not self.activations.symmetric:
            raise ValueError(f"weights.format={kind} needs activations.symmetric=true")
        if self.transform.method == "learned":
            raise ValueError(
                f"weights.format={kind}: transform.method=learned expects the error of integers; "
                "set transform.method to fixed or optrot"
            )

    def _block_choices(self) -> list[tuple[str, str, str]]:
        """What a scale that rows share settles: solvers take rows one by one."""
        if self.weights.format != "fp8_block":
            return []
        solver = self.solver
        return [
            ("solver.method", solver.method, "rtn"),
            ("solver.scale_search", solver.scale_search, "minmax"),
        ]

    def _check_trellis(self) -> None:
        """What is of scalar codes, and what compressed-tensors has no words for."""
        if self.output.format == "compressed-tensors":
            raise ValueError("solver.rounder=trellis needs output.format=rotq, or exl3")
        for key, value, wanted in (
            ("solver.method", self.solver.method, "gptq"),
            ("importance.groups", self.importance.groups, 1),
            ("tuning.code_steps", self.tuning.code_steps, 0),
        ):
            if value != wanted:
                raise ValueError(f"solver.rounder=trellis needs {key}={wanted}, got {value}")
        if self.transform.method == "learned":
            raise ValueError(
                "solver.rounder=trellis: transform.method=learned expects the error of scalar "
                "codes; set transform.method to fixed or optrot"
            )

    def _check_exl3(self) -> None:
        """What the files of exllamav3 settle."""
        weights = self.weights
        for key, value, wanted in (
            ("solver.rounder", self.solver.rounder, "trellis"),
            ("weights.state_bits", weights.state_bits, 16),
            ("weights.group_size", weights.group_size, -1),
            ("weights.average_bits", weights.average_bits, 0),
            ("weights.embedding", weights.embedding, 16),
            ("weights.head", weights.head, 16),
            ("activations.bits", self.activations.bits, 16),
            ("solver.refine_sweeps", self.solver.refine_sweeps, 0),
            ("tuning.steps", self.tuning.steps, 0),
        ):
            if value != wanted:
                raise ValueError(
                    f"output.format=exl3 needs {key}={wanted}, got {value}; -c exl3 has all of it"
                )
        if any(each.group_size for each in weights.overrides):
            raise ValueError("output.format=exl3: overrides can set bits or keep layers")

    def _check_expressible(self) -> None:
        """Files of others have no words for some of what happens at run time."""
        for key, wanted in (
            ("rotation.down", self.rotation.down != "none"),
            ("rotation.inputs", self.rotation.inputs != "none"),
            ("rotation.attention", self.rotation.attention != "none"),
            ("rotation.residual_ends", self.rotation.residual_ends != "fused"),
            ("kv_cache.bits", self.kv_cache.bits != 16),
        ):
            if wanted:
                raise ValueError(
                    f"{key} is applied at run time, which only output.format=rotq can express"
                )
        if self.activations.bits != 16 and not self.weights.symmetric:
            raise ValueError(
                "activations.bits: other loaders of compressed-tensors drop the rounding of "
                "activations where weights have zero points; set weights.symmetric=true or "
                "output.format=rotq"
            )

    @property
    def needs_data(self) -> bool:
        """Whether anything looks at activations."""
        searched = self.solver.scale_search in ("diagonal", "hessian")
        trained = self.tuning.steps > 0 or self.tuning.code_steps > 0
        ranged = self.weights.format == "nvfp4" and self.activations.bits != 16
        return self.solver.method != "rtn" or searched or trained or self.is_mixed or ranged

    @property
    def is_mixed(self) -> bool:
        """Whether layers get bits by what the loss feels of their rounding."""
        return self.weights.average_bits > 0

    @property
    def needs_gradients(self) -> bool:
        """Whether the gradient of the original model's loss is wanted."""
        return self.needs_data and (
            self.importance.strategy == "gradient" or self.solver.two_sided or self.is_mixed
        )

    @property
    def needs_original(self) -> bool:
        """Whether the original model's activations are wanted next to the quantized one's."""
        trained = self.tuning.steps > 0 or self.tuning.code_steps > 0
        return self.solver.needs_original or trained

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as ``from_dict`` takes them."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
