"""How a model's tensors are made of those that a checkpoint stores, as transformers makes them.

transformers 5 renames tensors while it loads them and merges or splits some (its conversion
mapping). The same rules are applied here to names first, which tells for each tensor of the model
what it is made of; tensors are then made one group at a time, and never the whole model.

Experts, which transformers fuses, are unfused again in rotq's models. Where the checkpoint stores
them one by one, its tensors are taken as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from rotq.models.fused import FusedForm

Make = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From stored tensors by name to the model's tensors by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Stored tensors that are converted together."""

    stored: tuple[str, ...]
    make: Make | None = None
    """None: there is one, and it is the model's as it is."""
    by_pattern: Mapping[str, list[str]] = field(default_factory=dict)
    """The stored names under each source pattern of transformers' rule."""
    operations: tuple[type, ...] = ()
    """What the rule does, in order."""
    rule: WeightConverter | None = None
    """transformers' own; None where there is nothing to make."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """One tensor of the model."""

    group: Group
    target: str
    """Which of the group's results; the stored name where there is nothing to make."""
    cut: Callable[[Tensor], Tensor] | None = None
    """What is taken of it; None takes all."""

    @property
    def stored(self) -> str | None:
        """The stored tensor that is this one as it is; None where it is made of others."""
        return self.group.stored[0] if self.group.make is None and self.cut is None else None


class Conversion:
    """transformers' rules for one model."""

    def __init__(self, model: Any) -> None:
        """
        Args:
            model: Of transformers, as it builds it, experts fused; parameters may be on meta.
        """
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix, self._config = model.base_model_prefix, model.config
        self.fused = _on_meta(model)
        """The model's tensors, on meta, as transformers has them."""
        self._unfused: dict[str, Tensor] = {}
        self._forms: dict[str, FusedForm] = {}

    def unfused(self, model: nn.Module, forms: Mapping[str, FusedForm]) -> Conversion:
        """The rules for the same model with its experts unfused.

        Args:
            model: Unfused.
            forms: From ``unfuse_experts``.
        """
        unfused = copy.copy(self)
        unfused._unfused, unfused._forms = _on_meta(model), dict(forms)
        return unfused

    @property
    def mixtures(self) -> tuple[str, ...]:
        """Names of the modules whose experts were unfused."""
        return tuple(self._forms)

    def merges(self, stored: Iterable[str]) -> bool:
        """Whether transformers would fuse experts stored under these names; True for none.

        Args:
            stored: Names of weights, and of nothing else.
        """
        groups = [
            self._renamed(name, self.fused, self._renamings, self._converters) for name in stored
        ]
        return all(pattern is not None and target in self.fused for target, pattern in groups)

    def keeps(self, stored: str, name: str) -> bool:
        """Whether transformers would take ``stored`` for ``name``, a packed tensor of the model.

        It falls back on the stored name where its rules lead to nothing that the model has.
        """
        renamed = self.renamed(stored)
        return renamed == name or (stored == name and renamed not in self.fused)

    def has(self, name: str) -> bool:
        """Whether the model with its experts unfused has a tensor of this name."""
        return name in self._unfused

    def renamed(self, stored: str) -> str:
        """The name by which a converting rule knows a stored tensor."""
        return rename_source_key(stored, self._renamings, [])[0]  # type: ignore[no-any-return]

    def makings(self, stored: Iterable[str]) -> dict[str, Making]:
        """How the model's tensors are made, by name, as far as ``stored`` has what they need."""
        made: dict[str, Making] = {}
        rules: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self._target(name)
            if target is None:
                continue
            if pattern is None:
                made.setdefault(target, Making(group=Group(stored=(name,)), target=name))
                continue
            rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
            _, by_pattern = rules.setdefault(target, (rule, {}))
            by_pattern.setdefault(pattern, []).append(name)
        for target, (rule, by_pattern) in rules.items():
            made |= {making.target: making for making in self._converted(target, rule, by_pattern)}
        return self._one_by_one(made)

    def _target(self, name: str) -> tuple[str | None, str | None]:
        """The model's name, and the pattern of the rule by which it is converted.

        In transformers' order: by the rules, then without them if they lead nowhere. What is not
        the fused model's may be the unfused one's.
        """
        target, pattern = self._renamed(name, self.fused, self._renamings, self._converters)
        if target not in self.fused and name in self.fused:
            target, pattern = name, None
        if target in self.fused:
            return target, pattern
        for renamings in (self._renamings, []):
            target, _ = self._renamed(name, self._unfused, renamings, [])
            if target in self._unfused:
                return target, None
        return None, None

    def _renamed(
        self,
        name: str,
        tensors: dict[str, Tensor],
        renamings: list[WeightRenaming],
        converters: list[WeightConverter],
    ) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(
            name, renamings, converters, self._prefix, tensors
        )
        return renamed

    def _converted(
        self, target: str, rule: WeightConverter, by_pattern: dict[str, list[str]]
    ) -> list[Making]:
        first = rule.target_patterns[0]
        targets = [target.replace(first, name, 1) for name in rule.target_patterns]
        group = Group(
            stored=tuple(name for found in by_pattern.values() for name in found),
            make=_Rule(rule, target, by_pattern, self.fused, self._config),
            by_pattern={key: by_pattern.get(key, []) for key in rule.source_patterns},
            operations=tuple(type(operation) for operation in rule.operations),
            rule=rule,
        )
        return [Making(group=group, target=name) for name in targets]

    def _one_by_one(self, made: dict[str, Making]) -> dict[str, Making]:
        """With the experts' own tensors in the place of fused ones."""
        made = dict(made)
        for module, form in self._forms.items():
            for expert, name, whole, cut in form.parts():
                fused = made.get(f"{module}.{whole}")
                if fused is not None:
                    own = f"{module}.{expert}.{name}"
                    made[own] = _as_stored(fused, form, expert, name) or replace(fused, cut=cut)
            for whole in {whole for _, _, whole, _ in form.parts()}:
                made.pop(f"{module}.{whole}", None)
        return made


def _as_stored(fused: Making, form: FusedForm, expert: int, name: str) -> Making | None:
    """An expert's tensor where the checkpoint has it as it is; None where it has to be cut out."""
    merged = fused.group.operations[:1] == (MergeModulelist,)
    if form.transposed or not form.concatenated or not merged:
        return None
    lists = list(fused.group.by_pattern.values())
    rest, half = fused.group.operations[1:], name.startswith("up_proj") and len(lists) == 2
    if rest not in ((), (Concatenate,)) or len(lists) != (2 if rest else 1):
        return None
    if any(len(stored) != form.num_experts for stored in lists):
        return None
    stored = lists[half][expert]
    return Making(group=Group(stored=(stored,)), target=stored)


@dataclass(frozen=True, kw_only=False)
class _Rule:
    """One of transformers' converters, for one target."""

    rule: WeightConverter
    target: str
    by_pattern: Mapping[str, list[str]]
    fused: Mapping[str, Tensor]
    config: Any

    def __call__(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rule = copy.deepcopy(self.rule)
        for pattern in rule.source_patterns:
            for name in self.by_pattern.get(pattern, []):
                rule.add_tensor(self.target, name, pattern, lambda tensor=stored[name]: tensor)
        made = rule.convert(self.target, model=_Parameters(self.fused), config=self.config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()
        }


class _Parameters:
    """What rules ask of the model: the shapes of its parameters."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def get_parameter(self, name: str) -> Tensor:
        return self._tensors[name]


def _on_meta(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict().items()
    }
