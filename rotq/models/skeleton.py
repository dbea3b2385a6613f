"""A model without its weights: one block at a time gets them.

The whole model is built with its parameters on meta and its buffers (rotary frequencies) real.
What a block is given besides the hidden states (masks, position embeddings, flags) is recorded in a
run of the model's own forward (``outer``). The same run with real tensors for what lies outside the
blocks gives the embedding and, with hidden states put in behind the last block, the logits.

Shape suffixes: B batch, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Self, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rotq.errors import RotqError, told
from rotq.models.adapter import Adapter
from rotq.models.conversion import Conversion
from rotq.models.experts import unfuse_experts
from rotq.models.families.gpt2 import linearize
from rotq.models.generic import GenericAdapter
from rotq.models.loading import TensorSource, load_tensors
from rotq.models.outer import Head, OuterModel, Stop
from rotq.models.registry import adapter_for, with_transposed
from rotq.models.survey import kind_of, survey
from rotq.models.task import auto_class, is_masked, text_config
from rotq.models.ties import ties_of

_LARGE = 1 << 20
"""Numbers of a tensor from which on it is a weight, and no buffer."""

_KEPT_SHAPES = 4
"""Recorded keyword arguments are kept for this many; a mask can take B T^2 bytes."""


class _LargeOnMeta(TorchFunctionMode):
    """No memory is asked for, not even for a moment, for what can only be a weight.

    The fused experts of one block of a 600B model are a parameter of 15 G numbers.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.numel() >= _LARGE:
                return made
        return func(*args, **kwargs)


class Skeleton:
    """A language model's structure, and its parts with weights on request.

    ``model`` is the model on meta; ``adapter`` knows its family; ``ties`` has the tensors that take
    another's unless they are given one of their own, and ``tied`` says that the head is one;
    ``conversion`` knows how they are made of stored ones. ``config`` is the text decoder's where
    the model has other parts.
    """

    def __init__(
        self, config: Any, adapter: Adapter, model: nn.Module, conversion: Conversion
    ) -> None:
        self.config = config
        self.adapter = adapter
        self.conversion = conversion
        self.model = model.eval().requires_grad_(False)
        self.ties = ties_of(model, adapter)
        self.tied = f"{adapter.head}.weight" in self.ties
        self.masked = is_masked(model.config)
        self._outer = OuterModel(self.model, adapter, self.ties)
        self.kept: dict[str, str] = {}
        """Linear layers of the blocks that cannot be packed, by full name, and why."""
        self.read: set[str] = set()
        """Linear layers whose weight the model looks at, beside calling them, by full name."""
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
        empty = init_empty_weights(include_buffers=False)
        with told("cannot build the model"), empty, _LargeOnMeta():
            model = auto_class(config).from_config(
                config,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
            )
        conversion = Conversion(model)
        forms = unfuse_experts(model)
        convolutions = linearize(model)
        adapter = with_transposed(adapter_for(model), convolutions)
        skeleton = cls(text_config(model.config), adapter, model, conversion.unfused(model, forms))
        skeleton.look_at_blocks()
        return skeleton

    def look_at_blocks(self) -> None:
        """Find out what an adapter would say of the blocks, where there is none.

        Raises:
            RotqError: they cannot be run one by one, or most of their weights cannot be packed.
        """
        if not isinstance(self.adapter, GenericAdapter):
            return
        found = survey(self._outer, self.config)
        self._outer.rest = found.rest
        self.adapter = replace(self.adapter, found=found.sites)
        for index, block in enumerate(self.blocks):
            name, kind = self.block_name(index), kind_of(block)
            self.kept |= {f"{name}.{path}": why for path, why in found.kept[kind].items()}
            self.read |= {f"{name}.{path}" for path in found.read[kind]}

    @property
    def blocks(self) -> nn.ModuleList:
        """On meta."""
        return self._outer.blocks

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
            source: Names as in ``model`` (``Source.read_for``).
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
        without: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Every tensor outside the blocks by full name; what is tied is left out.

        Args:
            without: Names of what is not read.

        A checkpoint that says it is tied but stores a head that differs from the embedding is
        taken at its tensors, as transformers does: the head is returned. Buffers keep their dtype,
        and have the model's own values where the checkpoint has none.

        Raises:
            RotqError: a tensor is missing or has another shape than the configuration says.
        """
        return self._outer.load(source, dtype=dtype, device=device, without=without)

    @property
    def own_head(self) -> str:
        """Name of the weight that makes logits, if no other part of the model has it; else ""."""
        name = f"{self.adapter.head}.weight"
        named = dict(self.model.named_parameters())
        return "" if self.tied or name not in named else name

    def head_alone(self, outer: dict[str, Tensor]) -> dict[str, Tensor]:
        """What ``logits`` needs in place of all outer tensors: zeros for an embedding not read.

        Args:
            outer: May have no embedding where ``own_head`` names a tensor.
        """
        name = f"{self.adapter.embedding}.weight"
        if name in outer:
            return outer
        like = next(iter(outer.values()))
        return {**outer, name: self._outer.zeros(like)[name]}

    @torch.no_grad()
    def embed(
        self, outer: dict[str, Tensor], ids_BT: Tensor, attention_mask_BT: Tensor | None = None
    ) -> Tensor:
        """What the first block is given for these tokens, (B, T, D), in the dtype of ``outer``.

        Args:
            attention_mask_BT: 1 where a token is, 0 where padding is.
        """

        def stop_at_first(_: int, hidden_BTD: Tensor, __: dict[str, Any]) -> Tensor:
            raise Stop(hidden_BTD)

        inputs = {"input_ids": ids_BT, "attention_mask": attention_mask_BT}
        try:
            self._outer.run(outer, stop_at_first, **inputs)
        except Stop as stop:
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

    def logits(
        self, outer: dict[str, Tensor], hidden_BTD: Tensor, head: Head | None = None
    ) -> Tensor:
        """(B, T, V) from the last block's output: final norm, head and what the model adds.

        Gradients flow to ``outer`` and ``hidden_BTD`` where they are wanted.

        Args:
            head: In place of the head's own product; None: that.
        """
        last = self.num_blocks - 1

        def put_in(index: int, given_BTD: Tensor, _: dict[str, Any]) -> Tensor:
            return hidden_BTD if index == last else given_BTD

        with self._outer.head_replaced(head):
            output = self._outer.run(outer, put_in, **self._outer.stand_in(hidden_BTD))
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
                raise Stop(given_BTD)
            return given_BTD

        outer, inputs = self._outer.zeros(hidden_BTD), self._outer.stand_in(hidden_BTD)
        try:
            self._outer.run(outer, record, **inputs, attention_mask=attention_mask_BT)
        except Stop:
            return recorded
        raise AssertionError("the model's forward did not reach its last block")
