"""Models in their makers' layouts: files written as fair-esm and ESM-C write them, read back."""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import CodeGenConfig, CodeGenForCausalLM, GPTJConfig, GPTJForCausalLM

from rotq.calibration.residues import RESIDUES, ResidueCodec
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.checkpoint.progen import read_progen
from rotq.cli.main import main
from rotq.models.families.esm import contact_regression

FAIR = (
    (r"^esm\.embeddings\.word_embeddings", "embed_tokens"),
    (r"^esm\.embeddings\.position_embeddings", "embed_positions"),
    (r"^esm\.embeddings\.layer_norm", "emb_layer_norm_before"),
    (r"^esm\.encoder\.emb_layer_norm_after", "emb_layer_norm_after"),
    (r"^esm\.encoder\.layer\.(\d+)\.attention\.LayerNorm", r"layers.\1.self_attn_layer_norm"),
    (r"^esm\.encoder\.layer\.(\d+)\.attention\.self\.query", r"layers.\1.self_attn.q_proj"),
    (r"^esm\.encoder\.layer\.(\d+)\.attention\.self\.key", r"layers.\1.self_attn.k_proj"),
    (r"^esm\.encoder\.layer\.(\d+)\.attention\.self\.value", r"layers.\1.self_attn.v_proj"),
    (r"^esm\.encoder\.layer\.(\d+)\.attention\.output\.dense", r"layers.\1.self_attn.out_proj"),
    (r"^esm\.encoder\.layer\.(\d+)\.LayerNorm", r"layers.\1.final_layer_norm"),
    (r"^esm\.encoder\.layer\.(\d+)\.intermediate\.dense", r"layers.\1.fc1"),
    (r"^esm\.encoder\.layer\.(\d+)\.output\.dense", r"layers.\1.fc2"),
    (r"^lm_head\.decoder\.weight", "lm_head.weight"),
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="rotq")


def convert(file: Path) -> Path:
    folder = file.with_name(f"{file.stem}-folder")
    done = run("convert", file, "-o", folder)
    assert done.exit_code == 0, done.output
    return folder


def fair_name(name: str) -> str:
    for ours, theirs in FAIR:
        name = re.sub(ours, theirs, name)
    outer = "encoder." if name.startswith("lm_head") else "encoder.sentence_encoder."
    return outer + name


def fair_esm(folder: Path, kind: str, *, contacts: bool = True) -> tuple[Path, Any]:
    """A file of fair-esm, and the model that it holds."""
    changes: dict[str, Any] = {"vocab_size": 33, "pad_token_id": 1}
    if kind == "esm1b":
        changes |= {"position_embedding_type": "absolute", "emb_layer_norm_before": True}
    model = tiny_model("esm", dtype=torch.float32, **changes)
    stored: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "inv_freq" in name:
            layers = range(model.config.num_hidden_layers)
            stored |= {
                f"encoder.sentence_encoder.layers.{n}.self_attn.rot_emb.inv_freq": tensor
                for n in layers
            }
        elif "contact_head" not in name and name != "lm_head.decoder.bias":
            stored[fair_name(name)] = tensor
    settings = {"layers": 2, "embed_dim": 48, "ffn_embed_dim": 80, "attention_heads": 4}
    named = {f"encoder_{name}": value for name, value in settings.items()}
    if kind == "esm2":
        content = {"cfg": {"model": Namespace(**named, token_dropout=True)}, "model": stored}
    else:
        content = {"args": Namespace(**named, arch="roberta_large"), "model": stored}
    file = folder / f"{kind}.pt"
    torch.save(content, file)
    if contacts:
        head = model.esm.contact_head.state_dict()
        held = {f"contact_head.{name}": tensor for name, tensor in head.items()}
        torch.save({"model": held}, folder / f"{kind}-contact-regression.pt")
    return file, model


def esmc(folder: Path) -> tuple[Path, Any]:
    """A file of EvolutionaryScale's, and the model that it holds."""
    model = tiny_model(
        "esmc", dtype=torch.float32, vocab_size=64, hidden_size=128, num_attention_heads=2,
        mask_token_id=32,
    )  # fmt: skip
    own = model.state_dict()
    stored = {
        "embed.weight": own["esmc.embed_tokens.weight"],
        "transformer.norm.weight": own["esmc.norm.weight"],
    }
    for number, name in ((0, "dense"), (2, "layer_norm"), (3, "decoder")):
        for kind in ("weight", "bias"):
            stored[f"sequence_head.{number}.{kind}"] = own[f"lm_head.{name}.{kind}"]
    for layer in range(2):
        block = {
            name.removeprefix(f"esmc.layers.{layer}."): tensor
            for name, tensor in own.items()
            if name.startswith(f"esmc.layers.{layer}.")
        }
        sides = [block[f"self_attn.{side}_proj.weight"] for side in "qkv"]
        both = [block[f"mlp.{side}_proj.weight"] for side in ("gate", "up")]
        found = {
            "attn.layernorm_qkv.0.weight": block["input_layernorm.weight"],
            "attn.layernorm_qkv.0.bias": block["input_layernorm.bias"],
            "attn.layernorm_qkv.1.weight": torch.cat(sides),
            "attn.out_proj.weight": block["self_attn.o_proj.weight"],
            "attn.q_ln.weight": block["self_attn.q_norm.weight"],
            "attn.k_ln.weight": block["self_attn.k_norm.weight"],
            "ffn.0.weight": block["post_attention_layernorm.weight"],
            "ffn.0.bias": block["post_attention_layernorm.bias"],
            "ffn.1.weight": torch.cat(both),
            "ffn.3.weight": block["mlp.down_proj.weight"],
        }
        stored |= {f"transformer.blocks.{layer}.{name}": t for name, t in found.items()}
    torch.save(stored, folder / "esmc_tiny.pth")
    return folder / "esmc_tiny.pth", model


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["esm2", "esm1b", "esmc"])
def test_the_same_logits_and_the_makers_tokens(kind: str, tmp_path: Path) -> None:
    file, model = esmc(tmp_path) if kind == "esmc" else fair_esm(tmp_path, kind)
    folder = convert(file)
    codec = ResidueCodec(load_tokenizer(folder))
    assert (codec.around, codec.mask_id, codec.pad_id) == (([0], [2]), 32, 1)
    ids_BT = torch.tensor([codec.encode(RESIDUES)])
    assert ids_BT[0, 1:4].tolist() == [5, 23, 13]  # A, C, D in the order of "LAGV..."
    ids_BT[0, 4] = codec.mask_id
    found = load_model(folder)
    assert torch.equal(found(ids_BT).logits, model(ids_BT).logits)
    assert [file.name for file in tmp_path.glob(".rotq*")] == []
    if kind != "esmc":
        ours = contact_regression(found)
        assert ours is not None
        assert torch.equal(ours.weight, model.esm.contact_head.regression.weight)


def test_a_folder_that_quantize_reads(tmp_path: Path) -> None:
    folder = convert(fair_esm(tmp_path, "esm2")[0])
    fasta = tmp_path / "p.fasta"
    fasta.write_text(">a\nMKTAYIAKQR\n")
    small = ["--set", "weights.group_size=16", "--calibration", fasta, "--dry-run"]
    done = run("quantize", folder, "-o", tmp_path / "out", *small)
    assert done.exit_code == 0, done.output


def test_without_a_contact_head_there_is_none(tmp_path: Path) -> None:
    file, _ = fair_esm(tmp_path, "esm2", contacts=False)
    done = run("convert", file, "-o", tmp_path / "out")
    assert "esm2-contact-regression.pt is not beside it: without a contact head" in done.stderr
    assert contact_regression(load_model(tmp_path / "out")) is None


class _Code:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"args": Namespace(arch="msa_transformer"), "model": {}}, "architecture is msa_transf"),
        ({"weight": torch.zeros(1)}, "laid out neither as fair-esm's models nor as ESM-C's"),
        ([1], "holds a list, no named tensors"),
        ({"model": _Code()}, "no file of tensors, or holds code"),
        (
            {"args": Namespace(arch="roberta_large"), "model": {"odd.weight": torch.zeros(1)}},
            "its tensor odd.weight is of no known layer",
        ),
        ({"cfg": {}, "model": {}}, "not as fair-esm or ESM-C write it: KeyError"),
    ],
)
def test_what_is_no_model_of_theirs(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    done = run("convert", tmp_path / "x.pt", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert message in done.stderr
    assert "run" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file, _ = fair_esm(tmp_path, "esm2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    done = run("convert", file, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "exists; choose another output" in done.stderr
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine"]


SMALL = {
    "vocab_size": 32, "n_embd": 64, "n_layer": 2, "n_head": 16, "n_positions": 64, "n_ctx": 64,
    "rotary_dim": 4, "activation_function": "gelu_new", "tie_word_embeddings": False,
}  # fmt: skip


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.inference_mode()
def test_cores_are_spread_as_in_codegen() -> None:
    """transformers' CodeGen has ProGen2's code with 4 cores; GPT-J with its parts is the same."""
    codegen = randomized(CodeGenForCausalLM(CodeGenConfig(**SMALL)))
    found = read_progen(codegen.config.to_dict(), codegen.state_dict(), cores=4)
    settings = {key: value for key, value in found.config.items() if key != "architectures"}
    gptj = GPTJForCausalLM(GPTJConfig(**settings)).eval()
    gptj.load_state_dict(found.tensors, strict=True)
    ids_BT = torch.arange(3, 23)[None]
    torch.testing.assert_close(gptj(ids_BT).logits, codegen(ids_BT).logits, rtol=1e-4, atol=1e-5)


def progen(folder: Path) -> tuple[Path, Any]:
    """A folder of ProGen2 with 8 cores, and the model that it holds."""
    model = randomized(GPTJForCausalLM(GPTJConfig(**SMALL)))
    own, stored = model.state_dict(), {}
    for name, tensor in own.items():
        if "attn.q_proj" in name:
            sides = [own[name.replace("q_proj", f"{side}_proj")] for side in "qvk"]
            parts = torch.stack([side.unflatten(0, (8, -1)) for side in sides], dim=1)
            stored[name.replace("q_proj", "qkv_proj")] = parts.flatten(0, 2)
        elif not re.search("[kv]_proj", name):
            stored[name] = tensor
    stored["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    (folder / "progen2").mkdir()
    torch.save(stored, folder / "progen2" / "pytorch_model.bin")
    config = {**SMALL, "model_type": "progen"}
    (folder / "progen2" / "config.json").write_text(json.dumps(config))
    words = ["<|pad|>", "<|bos|>", "<|eos|>", "1", "2", *RESIDUES, *"BOUXZ"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="X"))
    tokenizer.save(str(folder / "progen2" / "tokenizer.json"))
    return folder / "progen2", model


@torch.inference_mode()
def test_progen2_as_gptj(tmp_path: Path) -> None:
    file, model = progen(tmp_path)
    folder = convert(file)
    codec = ResidueCodec(load_tokenizer(folder))
    ids_BT = torch.tensor([codec.encode("MKTAYIAKQRG")])
    assert ids_BT[0, 1] == 5 + RESIDUES.index("K")
    assert torch.equal(load_model(folder)(ids_BT).logits, model(ids_BT).logits)
    config = json.loads((file / "config.json").read_text())
    for changes, message in (
        ({"n_head": 4}, "4 heads are not spread over 8 cores"),
        ({"model_type": "gpt2"}, "holds a gpt2, no ProGen2"),
    ):
        (file / "config.json").write_text(json.dumps({**config, **changes}))
        assert message in run("convert", file, "-o", tmp_path / "out").stderr
    (file / "config.json").write_text(json.dumps(config))
    (file / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in run("convert", file, "-o", tmp_path / "out").stderr
