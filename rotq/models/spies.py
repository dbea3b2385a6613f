"""A block whose linear layers multiply nothing and tell how they were used.

Shape suffixes: B windows, T positions, D hidden size, K in features, N out features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from rotq.models.experts import calibrating

FEWEST_OUTPUTS = 9
"""compressed-tensors 0.20 cannot unpack zero points that lie in one word: 8 of 4 bits."""


def made_up(shape: torch.Size, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A tensor of this shape over the memory of a short random vector; rows differ."""
    if not dtype.is_floating_point:
        return torch.zeros((), dtype=dtype).expand(shape)
    generator = torch.Generator().manual_seed(seed)
    vector = torch.rand(sum(shape) - len(shape) + 1, generator=generator) * 0.2 + 0.05
    return vector.to(dtype).as_strided(shape, (1,) * len(shape))


def multiplies(linear: nn.Linear) -> bool:
    """Whether a linear layer, or what a family has derived from it, is x W^T + b and no more."""
    if type(linear).forward is nn.Linear.forward:
        return True
    tensors = {
        name: made_up(parameter.shape, torch.float32)
        for name, parameter in linear.named_parameters()
    }
    if not tensors.keys() <= {"weight", "bias"} or list(linear.buffers()):
        return False
    x_BK = made_up(torch.Size((3, linear.in_features)), torch.float32) - 0.1
    try:
        found = functional_call(copy.deepcopy(linear), tensors, (x_BK,))
    except (RuntimeError, TypeError, AttributeError):
        return False
    expected = functional.linear(x_BK, tensors["weight"], tensors.get("bias"))
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


class Spy(nn.Module):
    """Stands in for a linear layer."""

    def __init__(self, linear: nn.Linear, log: list[Spy]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.rows: set[int] = set()
        """Tokens that it was called with."""
        self.was_read = False
        """Its weight was looked at from outside."""
        self.read_from: tuple[object, ...] = ()
        """Tells what it was first called with: equal for two spies that were given one tensor."""
        self._input: Tensor | None = None
        self._log, self._has_bias = log, linear.bias is not None

    @property
    def weight(self) -> Tensor:
        """(N, K), made up."""
        self.was_read = True
        return made_up(torch.Size((self.out_features, self.in_features)), self.dtype)

    @property
    def bias(self) -> Tensor | None:
        """(N), made up."""
        return made_up(torch.Size((self.out_features,)), self.dtype) if self._has_bias else None

    def forward(self, input: Tensor) -> Tensor:
        """The input's features over and over, N of them."""
        self._log.append(self)
        if self._input is None:
            # held on to, so that no other tensor gets its memory
            self._input, strides = input, input.stride()[-2:]
            shape = (input.numel(), input.shape[-1], *strides)
            self.read_from = (input.data_ptr(), input._version, *shape)
        self.rows.add(input.shape[:-1].numel())
        if input.shape[-1] != self.in_features:
            raise ValueError(f"{input.shape[-1]} features where {self.in_features} are read")
        return input[..., torch.arange(self.out_features) % self.in_features]


class SpiedBlock:
    """A copy of a block on meta, with spies."""

    def __init__(self, block: nn.Module) -> None:
        config = getattr(block, "config", None)
        self._block = copy.deepcopy(block, {id(config): config})
        self._log: list[Spy] = []
        self._spies: dict[str, Spy] = {}
        self._other: dict[str, str] = {}
        for name, module in list(self._block.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            if not multiplies(module):
                self._other[name] = f"it is a {type(module).__name__} and multiplies in another way"
                continue
            self._spies[name] = Spy(module, self._log)
            self._block.set_submodule(name, self._spies[name])
        self._tokens = 0

    def run(self, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Any:
        """What the block returns."""
        self._tokens = hidden_BTD.shape[:-1].numel()
        tensors = {
            name: made_up(parameter.shape, parameter.dtype)
            for name, parameter in self._block.named_parameters()
        }
        with calibrating(self._block):
            return functional_call(self._block, tensors, (hidden_BTD,), kwargs)

    def read(self) -> tuple[str, ...]:
        """Paths of the layers whose weights the model looks at, beside calling them."""
        return tuple(name for name, spy in self._spies.items() if spy.was_read and spy.rows)

    def linears(self) -> tuple[str, ...]:
        """Paths of the layers that can be packed, in the order of their first call."""
        kept = self.kept()
        order = {spy: number for number, spy in reversed(list(enumerate(self._log)))}
        packed = [name for name in self._spies if name not in kept]
        return tuple(sorted(packed, key=lambda name: order[self._spies[name]]))

    def sites(self) -> tuple[tuple[str, ...], ...]:
        """The same by what they read: layers that are given one tensor are together."""
        found: dict[tuple[object, ...], list[str]] = {}
        for name in self.linears():
            found.setdefault(self._spies[name].read_from, []).append(name)
        return tuple(tuple(names) for names in found.values())

    def kept(self) -> dict[str, str]:
        """Paths of the linear layers that cannot be packed, and why."""
        reasons = {name: self._reason(spy) for name, spy in self._spies.items()}
        return self._other | {name: reason for name, reason in reasons.items() if reason}

    def _reason(self, spy: Spy) -> str | None:
        if not spy.rows:
            return "the block does not call it"
        if spy.out_features < FEWEST_OUTPUTS:
            return f"of {spy.out_features} outputs nothing is gained, and some loaders fail on them"
        if spy.rows != {self._tokens}:
            return f"it is called with {sorted(spy.rows)} rows for {self._tokens} tokens"
        return None
