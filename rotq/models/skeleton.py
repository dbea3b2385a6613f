"""A model without its weights: one block at a time gets them.

The whole model is built with its parameters on meta and its buffers (rotary frequencies) real.
What a block is given besides the hidden states (masks, position embeddings, flags) is not
reproduced here: the model's own forward is run with the blocks' forwards replaced by recorders,
which is exact for every family and costs no block. The same run with real tensors for what lies
outside the blocks gives the embedding and, with hidden states put in behind the last block, the
logits.

Shape suffixes: B batch, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call

from rotq.errors import RotqError
from rotq.models.adapter import Adapter
from rotq.models.experts import unfuse_experts
from rotq.models.families.gpt2 import linearize
from rotq.models.loading import TensorSource, load_tensors
from rotq.models.registry import adapter_for
from rotq.models.task import auto_class, is_masked

_KEPT_SHAPES = 4
"""Recorded keyword arguments are kept for this many; a mask can take B T^2 bytes."""

BlockForward = Callable[[int, Tensor, dict[str, Any]], Tensor]


class Skeleton:
    """A language model's structure, and its parts with weights on request.

    ``model`` is the model on meta; ``adapter`` knows its family; ``tied`` says that the head takes
    the embedding's tensor unless it is given one of its own.
    """

    def __init__(self, config: Any, adapter: Adapter, model: nn.Module) -> None:
        self.config = config
        self.adapter = adapter
        self.model = model.eval().requires_grad_(False)
        self.blocks = cast(nn.ModuleList, model.get_submodule(adapter.blocks))
        self.tied = bool(getattr(config, "tie_word_embeddings", False)) and bool(adapter.head)
        self.masked = is_masked(config)
        self._kwargs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}

    @classmethod
    def open(cls, source: TensorSource, *, trust_remote_code: bool = False) -> Self:
        """Build the model of ``source.config`` without weights, experts unfused, no Conv1D.

        Attention is what transformers prefers for the family: sdpa where it has it, else eager.

        Raises:
            RotqError: transformers has no language model for the configuration, or the list of
                blocks of an unknown family cannot be found.
        """
        config = copy.deepcopy(source.config)
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False
        try:
            with init_empty_weights(include_buffers=False):
                model = auto_class(config).from_config(
                    config,
                    dtype=torch.float32,
                    trust_remote_code=trust_remote_code,
                )
        except ValueError as error:
            raise RotqError(f"cannot build the model: {' '.join(str(error).split())}") from None
        adapter = adapter_for(model)
        if adapter.experts:
            unfuse_experts(model)
        linearize(model)
        return cls(model.config, adapter, model)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def block_name(self, index: int) -> str:
        """Full module name, for example ``model.layers.3``."""
        return f"{self.adapter.blocks}.{index}"

    def load_block(
        self, index: int, source: TensorSource, *, device: torch.device | str, dtype: torch.dtype
    ) -> nn.Module:
        """A fresh block with its weights, in eval mode and without gradients.

        Args:
            index: Which block.
            source: Names as in ``model`` (``Source.renamed(adapter.renames)``).
            device: Where it is put.
            dtype: Of its floating point parameters; buffers that are not in checkpoints keep the
                dtype the model gave them.

        Raises:
            RotqError: a tensor is missing or has another shape than the configuration says.
        """
        block = copy.deepcopy(self.blocks[index], {id(self.config): self.config})
        prefix = self.block_name(index)
        wanted = {f"{prefix}.{name}": like for name, like in block.state_dict().items()}
        tensors = load_tensors(source, wanted, device=device, dtype=dtype)
        local = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
        block.load_state_dict(local, assign=True)
        return block.to(device).eval().requires_grad_(False)

    def load_outer(
        self,
        source: TensorSource,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Every tensor outside the blocks by full name; what is tied is left out.

        A checkpoint that says it is tied but stores a head that differs from the embedding is
        taken at its tensors, as transformers does: the head is returned. Buffers keep their dtype,
        and have the model's own values where the checkpoint has none.

        Raises:
            RotqError: a tensor is missing or has another shape than the configuration says.
        """
        present = set(source.names())
        wanted = self._outer_tensors()
        for name in (target for target, _ in self._ties() if target not in present):
            del wanted[name]
        buffers = dict(self.model.named_buffers())
        outer: dict[str, Tensor] = {}
        for name in wanted.keys() & buffers.keys():
            like = wanted.pop(name)
            loaded = {name: buffers[name].clone()}
            if name in present:
                loaded = load_tensors(source, {name: like}, device=device, dtype=like.dtype)
            outer |= loaded
        outer |= load_tensors(source, wanted, device=device, dtype=dtype)
        if self.tied and self._head_name in outer:
            embedding_VD = outer[f"{self.adapter.embedding}.weight"]
            if torch.equal(outer[self._head_name], embedding_VD):
                del outer[self._head_name]
        return outer

    @torch.no_grad()
    def embed(
        self, outer: dict[str, Tensor], ids_BT: Tensor, attention_mask_BT: Tensor | None = None
    ) -> Tensor:
        """What the first block is given for these tokens, (B, T, D), in the dtype of ``outer``.

        Args:
            attention_mask_BT: 1 where a token is, 0 where padding is.
        """

        def stop_at_first(_: int, hidden_BTD: Tensor, __: dict[str, Any]) -> Tensor:
            raise _Stop(hidden_BTD)

        with self._blocks_replaced(stop_at_first):
            try:
                self._call(outer, input_ids=ids_BT, attention_mask=attention_mask_BT)
            except _Stop as stop:
                return stop.hidden_BTD
        raise AssertionError("the model's forward did not reach its first block")

    @torch.no_grad()
    def block_kwargs(
        self, index: int, hidden_BTD: Tensor, attention_mask_BT: Tensor | None = None
    ) -> dict[str, Any]:
        """What the model passes to block ``index`` next to the hidden states.

        Without a padding mask it depends on shape, dtype and device alone, and is kept for the
        last few such triples asked for.

        Args:
            index: Which block.
            hidden_BTD: Only its shape, dtype and device matter.
            attention_mask_BT: 1 where a token is, 0 where padding is.

        Returns:
            Keyword arguments; call ``block(hidden_BTD, **kwargs)``.

        Raises:
            RotqError: the family's blocks return more than hidden states.
        """
        if attention_mask_BT is not None:
            return self._record(hidden_BTD, attention_mask_BT)[index]
        key = (tuple(hidden_BTD.shape), hidden_BTD.dtype, hidden_BTD.device)
        if key not in self._kwargs:
            if len(self._kwargs) == _KEPT_SHAPES:
                del self._kwargs[next(iter(self._kwargs))]
            self._kwargs[key] = self._record(hidden_BTD, None)
        return self._kwargs[key][index]

    def logits(self, outer: dict[str, Tensor], hidden_BTD: Tensor) -> Tensor:
        """(B, T, V) from the last block's output: final norm, head and what the model adds.

        Gradients flow to ``outer`` and ``hidden_BTD`` where they are wanted.
        """
        last = self.num_blocks - 1

        def put_in(index: int, given_BTD: Tensor, _: dict[str, Any]) -> Tensor:
            return hidden_BTD if index == last else given_BTD

        with self._blocks_replaced(put_in):
            output = self._call(outer, **self._stand_in(hidden_BTD))
        return cast(Tensor, output.logits)

    def _record(self, hidden_BTD: Tensor, attention_mask_BT: Tensor | None) -> list[dict[str, Any]]:
        recorded: list[dict[str, Any]] = []

        def record(index: int, given_BTD: Tensor, kwargs: dict[str, Any]) -> Tensor:
            if given_BTD.shape != hidden_BTD.shape:
                raise RotqError(
                    f"{type(self.model).__name__}: its blocks do not return plain hidden states, "
                    "which is needed to run them one by one"
                )
            recorded.append(kwargs)
            if index == self.num_blocks - 1:
                raise _Stop(given_BTD)
            return given_BTD

        with self._blocks_replaced(record):
            try:
                self._call(
                    self._zeros(hidden_BTD),
                    **self._stand_in(hidden_BTD),
                    attention_mask=attention_mask_BT,
                )
            except _Stop:
                return recorded
        raise AssertionError("the model's forward did not reach its last block")

    def _stand_in(self, hidden_BTD: Tensor) -> dict[str, Tensor]:
        """Inputs of a run in which only shape, dtype and device of what is embedded matter."""
        if "inputs_embeds" in inspect.signature(self.model.forward).parameters:
            return {"inputs_embeds": hidden_BTD}
        ids_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.int64, device=hidden_BTD.device)
        return {"input_ids": ids_BT}

    def _outer_tensors(self) -> dict[str, Tensor]:
        inside = f"{self.adapter.blocks}."
        state = self.model.state_dict()
        return {name: like for name, like in state.items() if not name.startswith(inside)}

    def _ties(self) -> list[tuple[str, str]]:
        """(tensor, the tensor it takes unless it has one of its own)."""
        if not self.tied:
            return []
        embedding = f"{self.adapter.embedding}.weight"
        return [(self._head_name, embedding), *self.adapter.tied_biases]

    def _zeros(self, like: Tensor) -> dict[str, Tensor]:
        # in place of the outer tensors where their values do not matter; no memory behind them
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        return {
            name: zero.expand(parameter.shape)
            for name, parameter in self.model.named_parameters()
            if not name.startswith(f"{self.adapter.blocks}.")
        }

    def _call(self, outer: dict[str, Tensor], **inputs: Tensor | None) -> Any:
        tensors = dict(outer)
        tensors |= {name: outer[to] for name, to in self._ties() if name not in outer}
        given = next(value for value in inputs.values() if value is not None)
        tensors |= {
            name: buffer.to(given.device)
            for name, buffer in self.model.named_buffers()
            if name not in tensors and not name.startswith(f"{self.adapter.blocks}.")
        }
        kwargs = {**inputs, "use_cache": False}
        return functional_call(self.model, tensors, (), kwargs, tie_weights=False)

    @property
    def _head_name(self) -> str:
        return f"{self.adapter.head}.weight"

    @contextmanager
    def _blocks_replaced(self, forward: BlockForward) -> Iterator[None]:
        # on the instances: everything else a model may ask of its blocks stays as it is
        for index, block in enumerate(self.blocks):
            block.forward = functools.partial(_call_replaced, forward, index, type(block).forward)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


class _Stop(Exception):  # noqa: N818, it is not an error
    """Leaves the model's forward once the blocks have been given what was wanted."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD


def _call_replaced(
    forward: BlockForward, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Tensor:
    names = list(inspect.signature(original).parameters)[1:]
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    return forward(index, kwargs.pop(names[0]), kwargs)
