"""What a model has and computes outside its blocks.

What happens there (embeddings, masks, position embeddings, flags, the last norm, the head) is not
reproduced: the model's own forward is run with other functions in the place of its blocks'
forwards, which is exact for every family and costs no block.

Shape suffixes: B batch, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rotq.models.adapter import Adapter
from rotq.models.loading import TensorSource, load_tensors
from rotq.models.ties import stored_under

BlockForward = Callable[[int, Tensor, dict[str, Any]], Tensor]
"""Index, hidden states and keyword arguments of a block, to what is to be its output."""

Head = Callable[[Tensor, Tensor | None], Tensor]
"""What a head reads, and its bias, to logits."""


class Stop(Exception):  # noqa: N818, it is not an error
    """Leaves the model's forward once the blocks have been given what was wanted."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD


class OuterModel:
    """A model without its blocks; its tensors are given to each run, by full name."""

    def __init__(self, model: nn.Module, adapter: Adapter, ties: Mapping[str, str]) -> None:
        """
        Args:
            model: Of transformers; its parameters may be on meta.
            ties: Of the model: a tensor takes another's unless it is given one of its own.
        """
        self.model, self.adapter = model, adapter
        self.rest: int | None = None
        """Values that blocks return behind the hidden states; None: they return them alone."""
        self.ties = {
            name: other
            for name, other in ties.items()
            if not self._inside(name) and not self._inside(other)
        }
        self.blocks = cast(nn.ModuleList, model.get_submodule(adapter.blocks))

    def load(
        self,
        source: TensorSource,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        without: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Every tensor outside the blocks by full name; ``Skeleton.load_outer`` says more."""
        present = set(source.names())
        wanted = {name: like for name, like in self._tensors().items() if name not in without}
        for name in (name for name in self.ties if name in wanted and name not in present):
            del wanted[name]
        buffers = dict(self.model.named_buffers())
        outer: dict[str, Tensor] = {}
        for name in wanted.keys() & buffers.keys():
            like = wanted.pop(name)
            loaded = {name: buffers[name].clone()}
            if name in present:
                loaded = load_tensors(source, {name: like}, device=device, dtype=like.dtype)
            outer |= loaded
        names = {name: stored_under(name, present, self.ties) for name in wanted}
        stored = {names[name]: like for name, like in wanted.items()}
        loaded = load_tensors(source, stored, device=device, dtype=dtype)
        outer |= {name: loaded[names[name]] for name in wanted}
        head = f"{self.adapter.head}.weight"
        other = self.ties.get(head)
        if head in outer and other in outer and torch.equal(outer[head], outer[other]):
            del outer[head]
        return outer

    def run(self, outer: dict[str, Tensor], forward: BlockForward, **inputs: Tensor | None) -> Any:
        """The model's output, with ``forward`` in the place of every block.

        Args:
            outer: Every tensor outside the blocks; what is tied may be left out.
            inputs: Of the model's forward.
        """
        tensors = dict(outer)
        tensors |= {name: outer[to] for name, to in self.ties.items() if name not in outer}
        given = next(value for value in inputs.values() if value is not None)
        tensors |= {
            name: buffer.to(given.device)
            for name, buffer in self.model.named_buffers()
            if name not in tensors and not self._elsewhere(name)
        }
        tensors |= self._beside(given.device)
        kwargs = {**inputs, "use_cache": False}
        with self._blocks_replaced(self._in_form(forward)), self._settings_kept():
            return functional_call(self.model, tensors, (), kwargs, tie_weights=False)

    def zeros(self, like: Tensor) -> dict[str, Tensor]:
        """In place of the tensors where their values do not matter; no memory behind them."""
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        return {name: zero.expand(parameter.shape) for name, parameter in self.parameters()}

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those outside the blocks, by full name."""
        named = self.model.named_parameters()
        return [(name, parameter) for name, parameter in named if not self._elsewhere(name)]

    def stand_in(self, hidden_BTD: Tensor) -> dict[str, Tensor]:
        """Inputs of a run in which only shape, dtype and device of what is embedded matter.

        Embedded tokens, but for families that are not known: they may project what they embed, or
        want the tokens too.
        """
        takes_embeds = "inputs_embeds" in inspect.signature(self.model.forward).parameters
        if takes_embeds and not self.adapter.is_generic:
            return {"inputs_embeds": hidden_BTD}
        shape, device = hidden_BTD.shape[:2], hidden_BTD.device
        return {"input_ids": torch.full(shape, self._plain_token(), device=device)}

    def head_left_out(self) -> AbstractContextManager[None]:
        """The largest product outside the blocks is not computed inside the context."""
        head = self.model.get_submodule(self.adapter.head) if self.adapter.head else None
        size = head.out_features if isinstance(head, nn.Linear) else 0
        return self.head_replaced(lambda x, _: x[..., :1].expand(*x.shape[:-1], size))

    @contextmanager
    def head_replaced(self, product: Head | None) -> Iterator[None]:
        """A head that is a linear layer computes something else inside the context."""
        head = self.model.get_submodule(self.adapter.head) if self.adapter.head else None
        if product is None or not isinstance(head, nn.Linear):
            yield
            return
        # its bias is read at each call, as a run may give it another
        head.forward = lambda input: product(input, head.bias)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del head.forward

    def _in_form(self, forward: BlockForward) -> Callable[[int, Tensor, dict[str, Any]], Any]:
        """The same, returning what the family's blocks return."""
        rest = self.rest
        if rest is None:
            return forward
        return lambda *given: (forward(*given), *[None] * rest)

    def _plain_token(self) -> int:
        """One that stands for nothing special, as padding does."""
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        special: set[int] = set()
        for key, value in config.to_dict().items():
            if key.endswith("_token_id"):
                special |= set(value) if isinstance(value, list) else {value}
        return next(token for token in range(len(special) + 1) if token not in special)

    def _tensors(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: like for name, like in state.items() if not self._elsewhere(name)}

    def _elsewhere(self, name: str) -> bool:
        """In a block, or in a part beside the text decoder, which no text reaches."""
        return self._inside(name) or self.adapter.is_beside(name)

    def _beside(self, device: torch.device) -> dict[str, Tensor]:
        """In place of the parts that no text reaches; no memory behind them.

        Models ask their first parameter for its device. Who does compute with one gets NaN.
        """
        return {
            name: torch.full((), torch.nan, dtype=parameter.dtype, device=device).expand_as(
                parameter
            )
            for name, parameter in self.model.named_parameters()
            if self.adapter.is_beside(name)
        }

    def _inside(self, name: str) -> bool:
        return name.startswith(f"{self.adapter.blocks}.")

    @contextmanager
    def _settings_kept(self) -> Iterator[None]:
        """What modules outside the blocks note down in a run is forgotten after it.

        Rotary embeddings of kinds that depend on the length note the longest that they have seen,
        and would take later windows for as long.
        """
        modules = [module for name, module in self.model.named_modules() if not self._inside(name)]
        before = [dict(module.__dict__) for module in modules]
        try:
            yield
        finally:
            for module, kept in zip(modules, before, strict=True):
                module.__dict__.clear()
                module.__dict__.update(kept)

    @contextmanager
    def _blocks_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        # on the instances: everything else a model may ask of its blocks stays as it is
        for index, block in enumerate(self.blocks):
            block.forward = functools.partial(_call_replaced, forward, index, type(block).forward)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def _call_replaced(
    forward: Callable[..., Any],
    index: int,
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    names = list(inspect.signature(original).parameters)[1:]
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    return forward(index, kwargs.pop(names[0]), kwargs)
