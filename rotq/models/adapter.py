"""What rotq has to know of a model family: module paths, norm convention, tensor names.

An adapter is data. Everything that differs between families is a field of it; masks,
position embeddings and embedding scales are not, because the model's own forward computes them
(see skeleton.py). A path left empty means that the family has no such module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from rotq.calibration.capture import Ending
from rotq.recipe import Rotation


@dataclass(frozen=True, kw_only=True)
class Site:
    """Linear layers of a block that read one input, so that one Hessian serves them all."""

    name: str
    """``qkv``, ``o``, ``gate_up`` or ``down``; ``down.3`` for expert 3."""
    linears: tuple[str, ...]
    """Paths inside the block."""


@dataclass(frozen=True)
class Like:
    """The value that another key of the configuration has."""

    key: str


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One model family."""

    family: str
    """Name in messages and reports."""
    architectures: tuple[str, ...]
    """Class names in a checkpoint's ``architectures``."""

    embedding: str = "model.embed_tokens"
    """Token embedding: writes the residual stream."""
    blocks: str = "model.layers"
    """ModuleList of decoder blocks."""
    final_norm: str = "model.norm"
    """Norm between the residual stream and the head."""
    head: str = "lm_head"
    """Linear that gives the logits; a tied one takes the embedding's tensor."""
    head_reader: str = ""
    """Linear that reads the final norm, where it is not the head itself."""
    other_writers: tuple[str, ...] = ()
    """Embeddings of something else than tokens that are added to the residual stream."""
    tied_biases: tuple[tuple[str, str], ...] = ()
    """(tensor, the tensor it is tied to) where the head is tied to the embedding."""

    attention_norm: str = "input_layernorm"
    """In the block: the norm that q, k and v read."""
    mlp_norm: str = "post_attention_layernorm"
    """In the block: the norm that the MLP (gate, up, router) reads."""
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    query_norm: str = ""
    """In the block: the norm on the heads of q, if the family has one."""
    key_norm: str = ""
    norms_all_heads: bool = False
    """A norm over all heads together stands behind q, and one behind k."""
    mlp: str = "mlp"
    """The MLP, or the mixture of experts in its place; empty if its linears are the block's."""
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    """In the MLP or one expert: linears that read its input."""
    mlp_up: str = "up_proj"
    """In the MLP or one expert: the one of ``mlp_inputs`` whose output is a factor of what
    ``mlp_output`` reads; empty if there is none, or it is rows of another."""
    mlp_output: str = "down_proj"
    """In the MLP or one expert: the linear that writes its output."""
    experts: str = ""
    """In the block: the experts of a mixture (a list once unfused)."""
    router: str = ""
    """In the block: the module whose ``weight`` scores the experts."""

    layer_norm: bool = False
    """Norms subtract the mean, so that R1 has to leave the all-ones direction alone."""
    norm_offset: float = 0.0
    """A norm's gain is ``norm_offset + weight``: 1 for Gemma."""
    residual_rotation: bool = True
    """Writers add to the residual stream directly (no norm in between), so R1 can be fused."""
    residual_needs: tuple[tuple[str, object], ...] = ()
    """(configuration key, value it must have) for R1; ``Like`` another key's."""
    value_rotation: bool = True
    """v_proj and o_proj are known, so R2 can be fused; values are the last rows of ``value``."""
    down_rotation: bool = True
    """The last linear of the MLP is known, so R4 can be applied before it."""
    renames: tuple[tuple[str, str], ...] = ()
    """(regular expression, replacement) on stored tensors' names, before transformers' rules."""
    transposed: str = ""
    """Regular expression of the weights that a checkpoint stores as (in, out), for Conv1D."""
    part: str = ""
    """Path of the text decoder in a model that has other parts; empty where it is the model."""
    image_writers: str = ""
    """Regular expression of the other parts' tensors that write rows of the residual stream."""

    @property
    def is_generic(self) -> bool:
        """Nothing is known of the family but its list of blocks."""
        return False

    @property
    def attention(self) -> str:
        """In the block: the module that holds q, k, v and o; empty if they are not in one."""
        return self.query.rpartition(".")[0]

    @property
    def attention_readers(self) -> tuple[str, ...]:
        """Query, key and value; one path where they are rows of one linear."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))

    def residual_obstacle(self, config: Any) -> str | None:
        """Why R1 cannot be fused into a model of this configuration; None where it can."""
        if not self.residual_rotation:
            return "a norm lies between what is written and the residual stream"
        if self.part and not self.image_writers:
            return "what writes image features into the residual stream is not known"
        for key, needed in self.residual_needs:
            wanted = getattr(config, needed.key) if isinstance(needed, Like) else needed
            if (getattr(config, key, None) or False) != wanted:
                return f"it needs {key}={wanted}, the model has {getattr(config, key, None)}"
        return None

    def ends_obstacle(self) -> str | None:
        """Why R1 cannot begin and end at run time, at the blocks; None where it can."""
        if self.layer_norm:
            return "their R1 has to leave the all-ones direction alone"
        return "features of images may be written between the blocks" if self.part else None

    def turns_outer(self, rotation: Rotation, config: Any) -> bool:
        """Whether embedding and head get into R1's basis."""
        if rotation.residual == "none" or rotation.residual_ends == "online":
            return False
        tied = bool(getattr(config, "tie_word_embeddings", False))
        return rotation.residual_ends == "fused" or not tied or self.ends_obstacle() is not None

    def is_beside(self, name: str) -> bool:
        """Whether a tensor is one of the parts beside the text decoder and its head."""
        own = (f"{self.part}.", f"{self.head}.")
        return bool(self.part) and not name.startswith(own)

    def norms(self, block: nn.Module) -> dict[str, tuple[str, ...]]:
        """The block's norms on the residual stream, and what reads each, routers included."""
        found: dict[str, tuple[str, ...]] = {self.attention_norm: self.attention_readers}
        readers = (*self.mlp_readers(block), *self.routers(block))
        # attention and MLP side by side read one norm
        found[self.mlp_norm] = (*found.get(self.mlp_norm, ()), *readers)
        return found

    def writers(self, block: nn.Module) -> tuple[str, ...]:
        """Paths of the linears whose outputs are added to the residual stream."""
        return (self.attention_output, *self.mlp_writers(block))

    def sites(self, block: nn.Module) -> tuple[Site, ...]:
        """The block's quantizable linears by shared input, in execution order."""
        attention = (
            Site(name="qkv", linears=self.attention_readers),
            Site(name="o", linears=(self.attention_output,)),
        )
        gate_up = Site(name="gate_up", linears=self.mlp_readers(block))
        downs = self.mlp_writers(block)
        if not self.has_experts(block):
            return (*attention, gate_up, Site(name="down", linears=downs))
        experts = block.get_submodule(self.experts)
        assert not getattr(experts, "own_rows", False), "sites of such experts are found by running"
        per_expert = (Site(name=f"down.{e}", linears=(path,)) for e, path in enumerate(downs))
        return (*attention, gate_up, *per_expert)

    def attention_ending(self) -> Ending | None:
        """How attention ends; None where it is not a module of its own."""
        if not self.attention:
            return None
        return Ending(path=self.attention, projection=self.attention_output, in_tuple=True)

    def mlp_ending(self, block: nn.Module) -> Ending | None:
        """How the MLP ends; None for a mixture, and where it is not a module of its own."""
        if self.is_generic or not self.mlp or self.has_experts(block):
            return None
        path = _join(self.mlp, self.mlp_output)
        return Ending(path=self.mlp, projection=path, in_tuple=False)

    def mlp_readers(self, block: nn.Module) -> tuple[str, ...]:
        """Paths of the linears that read the MLP norm, of all experts; the router is not one."""
        return tuple(_join(mlp, name) for mlp in self._mlps(block) for name in self.mlp_inputs)

    def mlp_writers(self, block: nn.Module) -> tuple[str, ...]:
        """Paths of the linears that write the MLP's output: one, or one per expert."""
        return tuple(_join(mlp, self.mlp_output) for mlp in self._mlps(block))

    def mlp_ups(self, block: nn.Module) -> tuple[str, ...]:
        """Paths of the linears whose outputs are multiplied by the gate: one, or one per expert."""
        return tuple(_join(mlp, self.mlp_up) for mlp in self._mlps(block))

    def routers(self, block: nn.Module) -> tuple[str, ...]:
        """Path of the router, if this block is a mixture of experts."""
        return (self.router,) if self.has_experts(block) else ()

    def has_experts(self, block: nn.Module) -> bool:
        """Families with experts may have plain blocks in between."""
        return bool(self.experts) and _has_submodule(block, self.experts)

    def _mlps(self, block: nn.Module) -> tuple[str, ...]:
        if not self.has_experts(block):
            return (self.mlp,)
        experts = block.get_submodule(self.experts)
        assert isinstance(experts, nn.ModuleList), "experts are unfused before anything else"
        return tuple(f"{self.experts}.{e}" for e in range(len(experts)))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has_submodule(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if name not in module._modules:
            return False
        module = module.get_submodule(name)
    return True
