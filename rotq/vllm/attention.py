"""The attention backend of vLLM that keeps keys and values in rotq's packed pages.

vLLM asks a backend's class, not a layer, how many bytes a block takes, and has no configuration set
when it does. So the class remembers what the last layer was made for; layers of one engine agree,
and an engine asks right after it has made them.

On CUDA the same code launches the Triton kernels of ``rotq_kernels``. It is compiled for the
targets, and **has not been run on a GPU**; a step of it has no CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from rotq.errors import RotqError
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.calibration.model_hash import hash_config
from rotq.ops import KVFormat
from rotq.vllm.blocks import BlockLayout, Blocks
from rotq.vllm.heads import heads_of_rank
from rotq.vllm.packed_config import BLOCK_SIZE, MULTIPLE
from rotq.vllm.paged_layer import Batch, PagedLayer
from rotq.vllm.passes import requests_of
from rotq.vllm.settings import load_kv, read_settings


class RotqAttentionBackend(AttentionBackend):
    """Packed keys and values."""

    accept_output_buffer: bool = True
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    served: ClassVar[KVCalibration | None] = None
    """What the last layer was made for."""
    served_as: ClassVar[tuple[str, str] | None] = None
    """Its name, and the hash of the model."""

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's enumeration."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[RotqAttentionImpl]:
        """Of a layer."""
        return RotqAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[RotqMetadataBuilder]:
        """Of what a batch looks like."""
        return RotqMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Blocks are never split."""
        return [MultipleOf(MULTIPLE)]

    @classmethod
    def serve(cls, name: str, config: Any) -> KVCalibration:
        """Constants for a layer, loaded once for all layers of a model."""
        wanted = name, hash_config(config)
        if cls.served is None or cls.served_as != wanted:
            cls.served, cls.served_as = load_kv(name, config), wanted
        return cls.served

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Where the user does not say."""
        return BLOCK_SIZE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A block's bytes must be contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """They are served."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """How large a block is."""
        if spec.state_content_bytes is not None:
            return spec
        if cls.served is None:
            raise RotqError("rotq_kv: vLLM asked for the size of a block before it made a layer")
        form = replace(cls.served.layers[0].format, page_size=max(spec.block_size, MULTIPLE))
        layout = BlockLayout(format=form, sinks=cls.served.sinks, dtype=spec.dtype)
        return replace(spec, dtype=torch.int8, state_content_bytes=layout.bytes_per_token)


@dataclass
class RotqMetadata(AttentionMetadata):
    """A batch."""

    batch: Batch
    block_size: int


class RotqMetadataBuilder(AttentionMetadataBuilder[RotqMetadata]):
    """Makes one from what vLLM knows of a step."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> RotqMetadata:
        """The requests of a step."""
        step = common_attn_metadata
        starts = step.query_start_loc_cpu[: step.num_reqs + 1].tolist()
        lengths = step.seq_lens[: step.num_reqs].tolist()
        return RotqMetadata(
            batch=Batch(requests=requests_of(starts, lengths), table_RJ=step.block_table_tensor),
            block_size=self.kv_cache_spec.block_size,
        )


class RotqAttentionImpl(AttentionImpl[RotqMetadata]):
    """One layer. What it cannot do is refused when it is made."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        wrong = {
            "ALiBi": alibi_slopes,
            "capped scores": logits_soft_cap,
            f"attention of kind {attn_type}": attn_type != AttentionType.DECODER,
            f"a cache in {kv_cache_dtype}": kv_cache_dtype != "auto",
            "layers that share keys and values": kv_sharing_target_layer_name,
            **{name: value is not None for name, value in kwargs.items()},
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise RotqError(f"rotq_kv: packed attention cannot do {name}")
        config = get_current_vllm_config()
        kv = read_settings(config.additional_config).kv
        if kv is None:
            raise RotqError("the packed cache wants --additional-config '{\"rotq_kv\": ...}'")
        self.calibration = RotqAttentionBackend.serve(kv, config.model_config.hf_config)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype, self.sliding_window = kv_cache_dtype, sliding_window
        self.dtype = config.model_config.dtype
        self.layer: PagedLayer | None = None
        self.seen: tuple[Tensor, Blocks] | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: RotqMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step's new tokens (N, heads, D), which are packed; ``output`` is written.

        Without metadata it is a warm-up, and nothing is done.
        """
        if attn_metadata is None:
            return output
        if self.layer is None:
            self.layer = self._bind(layer.layer_name, attn_metadata.block_size, query.device)
        blocks = self._blocks(self.layer.format, kv_cache)
        self.layer.attend(query, key, value, attn_metadata.batch, blocks, output)
        return output

    def _bind(self, name: str, block_size: int, device: torch.device) -> PagedLayer:
        """The constants of this layer, and of its heads on this rank."""
        constants = self.calibration.on(device).layer(extract_layer_index(name))
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        return PagedLayer(
            heads_of_rank(constants, self.num_kv_heads, rank, ranks),
            block_size,
            sinks=self.calibration.sinks,
            window=self.sliding_window or 0,
            scale=self.scale,
        )

    def _blocks(self, form: KVFormat, kv_cache: Tensor) -> Blocks:
        """Views of the layer's blocks, made once."""
        if self.seen is None or self.seen[0] is not kv_cache:
            layout = BlockLayout(format=form, sinks=self.calibration.sinks, dtype=self.dtype)
            self.seen = kv_cache, layout.view(kv_cache)
        return self.seen[1]
