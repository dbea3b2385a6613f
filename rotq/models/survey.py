"""What the blocks of a family take, give and call, found by running each kind once.

Of a family without an adapter only its list of blocks is known. Whether the blocks can be run one
by one, and which of their linear layers can be packed, is asked of the model itself, before any
weight is read: its own forward is run on a few made-up tokens, linear layers are replaced by spies
that multiply nothing, and all other tensors are views of short random vectors. So it costs neither
the memory nor the time of the model.

Shape suffixes: B windows, T positions, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from rotq.errors import RotqError
from rotq.models.outer import OuterModel
from rotq.models.spies import SpiedBlock, made_up

TOKENS = 8
"""Positions of the one window that is run."""

Kind = tuple[object, ...]
"""Blocks of one kind have the same class and the same linear layers."""


def kind_of(block: nn.Module) -> Kind:
    """The kind of a block."""
    linears = (
        (name, module.in_features, module.out_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    )
    return (type(block).__qualname__, *linears)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found."""

    rest: int | None
    """Values that a block returns behind the hidden states; None: it returns them alone."""
    sites: Mapping[Kind, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """Linear layers that can be packed, by kind of block, in the order in which they are called;
    those that read one tensor are together."""
    kept: Mapping[Kind, Mapping[str, str]] = field(default_factory=dict)
    """The others: path to the reason."""
    read: Mapping[Kind, tuple[str, ...]] = field(default_factory=dict)
    """Those of ``sites`` whose weight the model looks at, beside calling them."""


def survey(outer: OuterModel, config: Any) -> Survey:
    """Run a model on made-up tensors, and look at its blocks.

    Args:
        outer: The model, on meta, experts unfused.
        config: Of the model.

    Raises:
        RotqError: its blocks cannot be run one by one; says why.
    """
    name = type(outer.model).__name__
    watched = _Watch(outer, config)
    try:
        with torch.no_grad():
            # what differs between two runs is made of more than the positions
            first = watched.run(seed=1)
            second = watched.run(seed=2)
    except RotqError as error:
        raise RotqError(f"{name} cannot be quantized block by block: {error}") from None
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        raise RotqError(
            f"{name} cannot be quantized block by block: {type(error).__name__} in a trial run: "
            f"{line}"
        ) from error
    made_of_tokens = {
        key
        for before, after in zip(first, second, strict=True)
        for key in before
        if not _equal(before[key], after[key])
    }
    if made_of_tokens:
        raise RotqError(
            f"{name} cannot be quantized block by block: beside the hidden states its blocks are "
            f"given {', '.join(sorted(made_of_tokens))}, made from the tokens or from other weights"
        )
    found = Survey(
        rest=watched.rest,
        sites=watched.sites,
        kept=watched.kept,
        read={kind: spied.read() for kind, spied in watched.spied.items()},
    )
    _check_share(found, outer, name)
    return found


def _check_share(found: Survey, outer: OuterModel, name: str) -> None:
    """Refuse a model most of whose weights would stay as they are."""
    packed, others = 0, Counter[str]()
    for block in outer.blocks:
        paths = {f"{path}.weight" for site in found.sites[kind_of(block)] for path in site}
        for path, parameter in block.named_parameters():
            if path in paths:
                packed += parameter.numel()
            elif parameter.ndim > 1:
                others[path] += parameter.numel()
    if packed < others.total():
        largest, _ = others.most_common(1)[0]
        raise RotqError(
            f"{name} cannot be quantized: most of the weights of its blocks, {largest} above all, "
            "are not in linear layers that rotq can pack"
        )


class _Watch:
    """Runs a model, and looks at each kind of block when it is met for the first time."""

    def __init__(self, outer: OuterModel, config: Any) -> None:
        self.outer, self.config = outer, config
        self.rest: int | None = None
        self.sites: dict[Kind, tuple[tuple[str, ...], ...]] = {}
        self.kept: dict[Kind, dict[str, str]] = {}
        self.spied = {kind_of(block): SpiedBlock(block) for block in outer.blocks}
        self._returned: dict[Kind, Any] = {}
        self._behind: set[int] = set()

    def run(self, seed: int) -> list[dict[str, Any]]:
        """The keyword arguments of every block, with other tokens and tensors for every seed."""
        size = self.config.get_text_config().hidden_size
        ids_BT = torch.arange(TOKENS)[None] * (seed + 1) % 89 + 3
        given: list[dict[str, Any]] = []

        def forward(index: int, hidden_BTD: Any, kwargs: dict[str, Any]) -> Any:
            if index != len(given):
                raise RotqError("it does not run its blocks one after the other, each once")
            if not isinstance(hidden_BTD, Tensor) or hidden_BTD.shape != (1, TOKENS, size):
                shape = tuple(getattr(hidden_BTD, "shape", ()))
                raise RotqError(
                    f"its blocks pass on {shape} for {TOKENS} tokens of {size} features"
                )
            self._check_given(kwargs)
            given.append(kwargs)
            return self._answer(self.outer.blocks[index], hidden_BTD, kwargs)

        tensors = {
            name: made_up(parameter.shape, parameter.dtype, seed)
            for name, parameter in self.outer.parameters()
        }
        with self.outer.head_left_out():
            self.outer.run(tensors, forward, input_ids=ids_BT)
        if len(given) != len(self.outer.blocks):
            raise RotqError("its forward does not run all of its blocks")
        return given

    def _answer(self, block: nn.Module, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Any:
        """What the model is to be given for a block's output: its input, in the same form."""
        kind = kind_of(block)
        if kind not in self._returned:
            spied = self.spied[kind]
            containers = {key: len(value) for key, value in _containers(kwargs)}
            self._returned[kind] = spied.run(hidden_BTD, kwargs)
            if any(len(value) != containers[key] for key, value in _containers(kwargs)):
                raise RotqError("its blocks hand on more than hidden states, by a shared container")
            self.sites[kind], self.kept[kind] = spied.sites(), spied.kept()
        returned = self._returned[kind]
        rest: int | None = None
        answer: Any = hidden_BTD
        if isinstance(returned, Tensor):
            pass
        elif isinstance(returned, tuple | list) and isinstance(returned[0], Tensor):
            rest, answer = len(returned) - 1, (hidden_BTD, *returned[1:])
            self._behind |= {id(value) for value in _tensors(returned[1:])}
        else:
            raise RotqError(f"its blocks return {type(returned).__name__}")
        if len(self._returned) > 1 and rest != self.rest:
            raise RotqError("its blocks return different numbers of values")
        self.rest = rest
        return answer

    def _check_given(self, kwargs: dict[str, Any]) -> None:
        for key, value in kwargs.items():
            if any(id(tensor) in self._behind for tensor in _tensors(value)):
                raise RotqError(f"its blocks hand on {key} beside the hidden states")
            if isinstance(value, Cache):
                raise RotqError(f"its blocks need a cache ({key})")


def _containers(kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in kwargs.items() if isinstance(value, dict | list)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _equal(before: Any, after: Any) -> bool:
    pairs = list(zip(_tensors(before), _tensors(after), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
