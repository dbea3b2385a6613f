"""What ``register`` tells vLLM, and the places where vLLM has no hook and is wrapped.

Wrapped are, once per process: the platform's last look at a configuration, where a packed cache is
prepared and what it cannot do is refused; the CPU platform's choice of attention, which knows one
only; the shapes of a packed weight's parts, which vLLM places without looking; its method for the
packed experts of a mixture, which has few kernels; the names of layers that it has others for; and
the loading of packed weights, whose failures name nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, register_linear_kernel
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import PlatformEnum, current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from rotq.checkpoint.scheme import METHODS
from rotq.errors import RotqError
from rotq.vllm.experts import RotqExpertsMethod
from rotq.vllm.linear import RotqLinearKernel
from rotq.vllm.packed_config import prepare
from rotq.vllm.quantization import RotqConfig
from rotq.vllm.shards import check_shards
from rotq.vllm.targets import in_vllm

BACKEND = "rotq.vllm.attention.RotqAttentionBackend"
_PLATFORMS = (PlatformEnum.CPU, PlatformEnum.CUDA, PlatformEnum.ROCM)


def register_all() -> None:
    """Everything; a second time changes nothing."""
    if RotqLinearKernel in _POSSIBLE_KERNELS[PlatformEnum.CPU]:
        return
    for platform in _PLATFORMS:
        register_linear_kernel(RotqLinearKernel, platform, "mp")
    # asked first on a CPU, where vLLM's own kernel says yes to what it cannot; last elsewhere
    kernels = _POSSIBLE_KERNELS[PlatformEnum.CPU]
    kernels.insert(0, kernels.pop())
    register_quantization_config("rotq")(RotqConfig)
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    platform = type(current_platform)
    _wrap_classmethod(platform, "check_and_update_config", _with_packed_cache)
    if current_platform.is_cpu():
        _wrap_classmethod(platform, "get_attn_backend_cls", _with_custom_backend)
    moe = CompressedTensorsMoEMethod
    moe.get_moe_method = staticmethod(_with_named_experts(moe.get_moe_method))
    packed = compressed_tensors_moe_wna16
    packed.CompressedTensorsWNA16MoEMethod = _choose_experts(packed.CompressedTensorsWNA16MoEMethod)
    scheme = CompressedTensorsWNA16
    scheme.create_weights = _with_checked_shards(scheme.create_weights)
    config, loader = CompressedTensorsConfig, DefaultModelLoader
    config.apply_vllm_mapper = _with_mapped_patterns(config.apply_vllm_mapper)
    loader.load_weights = _with_named_failures(loader.load_weights)


def _wrap_classmethod(owner: type, name: str, wrap: Callable[[Any], Any]) -> None:
    setattr(owner, name, classmethod(wrap(getattr(owner, name).__func__)))


def _with_packed_cache(check: Callable[..., None]) -> Callable[..., None]:
    def checked(platform: Any, vllm_config: Any) -> None:
        check(platform, vllm_config)
        prepare(vllm_config)

    return checked


def _with_custom_backend(choose: Callable[..., str]) -> Callable[..., str]:
    def chosen(platform: Any, selected_backend: Any, *args: Any, **more: Any) -> str:
        if selected_backend == AttentionBackendEnum.CUSTOM:
            return AttentionBackendEnum.CUSTOM.get_path()
        return choose(platform, selected_backend, *args, **more)

    return chosen


def _with_checked_shards(create: Callable[..., None]) -> Callable[..., None]:
    def created(scheme: Any, layer: Any, **sizes: Any) -> None:
        name = scheme.layer_name or type(layer).__name__
        if not scheme.symmetric:
            _refuse_turned_rows(name)
        check_shards(
            name,
            scheme.num_bits,
            rows=sizes["output_partition_sizes"],
            columns=sizes["input_size_per_partition"],
            all_columns=sizes["input_size"],
            group_size=scheme.group_size,
            has_zeros=not scheme.symmetric,
        )
        create(scheme, layer=layer, **sizes)

    return created


def _with_mapped_patterns(apply: Callable[..., None]) -> Callable[..., None]:
    def applied(quant_config: Any, hf_to_vllm_mapper: Any) -> None:
        substrings, schemes = hf_to_vllm_mapper.orig_to_new_substr, quant_config.target_scheme_map
        for target, scheme in list(schemes.items()):
            schemes.setdefault(in_vllm(target, substrings), scheme)
        apply(quant_config, hf_to_vllm_mapper)

    return applied


def _with_named_failures(load: Callable[..., None]) -> Callable[..., None]:
    def loaded(loader: Any, model: Any, model_config: Any) -> None:
        try:
            load(loader, model, model_config)
        except (AttributeError, KeyError, ValueError) as error:
            if model_config.quantization not in METHODS:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RotqError(
                f"{type(model).__name__}: vLLM cannot load its packed weights ({reason})"
            ) from error

    return loaded


def _refuse_turned_rows(name: str) -> None:
    """Of Llama 4 vLLM 0.32 puts rows of q and k in another order, but not their zero points."""
    config = get_current_vllm_config().model_config
    kind = getattr(config and config.hf_text_config, "model_type", "")
    if kind == "llama4_text" and name.endswith("qkv_proj"):
        raise RotqError(
            f"{name}: vLLM reorders the rows of Llama 4's queries and keys, and not their zero "
            "points; quantize with weights.symmetric=true"
        )


def _choose_experts(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's method where it has a kernel, else ours; on a CPU its kernels round inputs."""

    def chosen(*args: Any, **more: Any) -> Any:
        if not current_platform.is_cpu():
            # no kernel of theirs: the plugin's
            with suppress(NotImplementedError, ValueError, AssertionError):
                return theirs(*args, **more)
        return RotqExpertsMethod(*args, **more)

    return chosen


def _with_named_experts(choose: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(quant_config: Any, layer: Any, layer_name: str) -> Any:
        try:
            return choose(quant_config, layer, layer_name)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise RotqError(
                f"{layer_name}: vLLM does not run packed experts here ({error}), and neither does "
                "rotq's plugin"
            ) from error

    return chosen
