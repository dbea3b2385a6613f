"""LoRA by PEFT on packed layers, against LoRA on the dense layers of equal weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import W4, W4_SYMMETRIC, write_checkpoint
from tiny_models import MASKED, random_ids
from torch import Tensor

import rotq
from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid
from rotq.layers.online_heads import OnlineHeads
from rotq.layers.quant_linear import QuantLinear

peft = pytest.importorskip("peft", reason="an optional extra")

# of transformers 5.23, for what PEFT 0.21 asks it
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing:FutureWarning")

A8 = ActivationGrid(bits=8, symmetric=True)
ONLINE = {"rotated": True, "inputs": A8, "heads": OnlineHeads(rotated=True, grid=A8)}


def checkpoint(folder: Path, family: str = "llama", format: str = "rotq", **options: Any) -> Path:
    grid = W4_SYMMETRIC if family == "qwen3-moe" else W4
    return write_checkpoint(folder, family, grids=(grid,), format=format, **options).path


def adapted(model: Any, targets: Any = "all-linear", **options: Any) -> Any:
    """With random A and B; the same ones for layers of the same names."""
    settings = {"r": 4, "target_modules": targets, **options}
    made = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(made.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 20
    return made


def loss_of(model: Any) -> Tensor:
    ids_BT = random_ids(2, 9)
    return model(ids_BT, labels=ids_BT).loss


def gradients(model: Any) -> dict[str, Tensor]:
    loss_of(model).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "format", "options"),
    [
        ("llama-biases", "compressed-tensors", {}),
        ("llama-tied", "rotq", ONLINE),
        ("gemma3", "rotq", {}),
        ("gpt2", "rotq", {}),
        ("qwen3-moe", "compressed-tensors", {}),
        ("esm", "rotq", ONLINE),
        ("esm-untied", "compressed-tensors", {}),
        ("bert", "rotq", {}),
    ],
)
def test_loss_and_gradients_are_those_of_dense_layers(
    tmp_path: Path, family: str, format: str, options: dict[str, Any]
) -> None:
    path = checkpoint(tmp_path, family, format, **options)
    packed, dense = rotq.load(path), rotq.load(path, packed=False)
    layers = [name for name, part in packed.named_modules() if isinstance(part, QuantLinear)]
    packed, dense = adapted(packed, layers), adapted(dense, layers)
    assert torch.equal(loss_of(packed), loss_of(dense))
    found, wanted = gradients(packed), gradients(dense)
    assert {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in found} >= {
        *layers
    }
    assert all(tensor.count_nonzero() for tensor in found.values())
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "esm", "bert"])
def test_training_lowers_the_loss_and_an_adapter_comes_back(tmp_path: Path, family: str) -> None:
    path = checkpoint(tmp_path, family)
    task = None if family in MASKED else "CAUSAL_LM"
    model = adapted(rotq.load(path), task_type=task).eval()
    codes = {name: t.clone() for name, t in model.named_buffers() if "weight_packed" in name}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(loss_of(model))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, model.get_buffer(name)) for name, tensor in codes.items())
    model.save_pretrained(tmp_path / "adapter")
    assert not any("packed" in file.name for file in (tmp_path / "adapter").iterdir())
    again = peft.PeftModel.from_pretrained(rotq.load(path), tmp_path / "adapter")
    assert torch.equal(loss_of(again), loss_of(model))
    with model.disable_adapter():
        assert torch.equal(loss_of(model), loss_of(rotq.load(path)))
    assert isinstance(model.unload().get_submodule(layer_name(model)), QuantLinear)


def layer_name(model: Any) -> str:
    packed = (n for n, m in model.named_modules() if isinstance(m, QuantLinear))
    return next(packed).removeprefix("base_model.model.").removesuffix(".base_layer")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("options", [{}, ONLINE], ids=["plain", "online"])
def test_merging_is_right_or_refused(tmp_path: Path, packed: bool, options: dict[str, Any]) -> None:
    """The dense layer of a rotated one is refused too: B A belongs to what it was before."""
    model = adapted(rotq.load(checkpoint(tmp_path, **options), packed=packed))
    with torch.no_grad():
        before = loss_of(model)
    if packed or options:
        reason = "rotates or rounds its input" if options else r"rotq\.load\(PATH, packed=False\)"
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(RotqError, match=f"cannot be merged into .*{reason}"):
                merge()
    else:
        model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model), before)


def test_what_would_change_the_weight_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    for start in ("pissa", "olora"):
        with pytest.raises(RotqError, match=f"init_lora_weights='{start}' changes the weight"):
            adapted(rotq.load(path), init_lora_weights=start)
    with pytest.raises(ValueError, match="use_dora"):
        adapted(rotq.load(path), use_dora=True)
    with pytest.raises(TypeError, match="QuantLinear"):
        peft.get_peft_model(rotq.load(path), peft.LoHaConfig(r=2, target_modules="all-linear"))


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_all_linear_means_packed_layers_and_no_head(tmp_path: Path, family: str) -> None:
    model = rotq.load(checkpoint(tmp_path, family))
    wanted = {name for name, part in model.named_modules() if isinstance(part, QuantLinear)}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
    for adapter in ("default", "second"):
        parts = [name.partition(".lora_A.") for name, _ in model.named_parameters()]
        found = {layer for layer, _, rest in parts if rest == f"{adapter}.weight"}
        assert found == {f"base_model.model.{name}" for name in wanted}


@pytest.mark.parametrize("reentrant", [False, True])
def test_prepared_and_checkpointed(tmp_path: Path, reentrant: bool) -> None:
    """bfloat16 parameters become fp32, as PEFT has it; codes and scales stay as stored."""
    path = checkpoint(tmp_path, dtype=torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(rotq.load(path))
    model.enable_input_require_grads()
    model = adapted(model).train()
    wanted = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    layer = model.get_submodule(f"base_model.model.{layer_name(model)}").get_base_layer()
    assert layer.weight_scale.dtype == torch.float16
    assert layer.weight_packed.dtype == torch.int32


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "mixtral"])
def test_adapters_of_transformers(tmp_path: Path, family: str) -> None:
    """Those of experts too: they are named as modules, and ours are some."""
    from transformers.trainer_utils import validate_quantization_for_training

    path = checkpoint(tmp_path, family)
    model = rotq.load(path)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    validate_quantization_for_training(model)
    model.save_pretrained(tmp_path / "adapter")
    again = rotq.load(path)
    again.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(loss_of(again), loss_of(model))
