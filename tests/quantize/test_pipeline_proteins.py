"""Protein models through the whole pipeline: padding, masks, and stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, sequences, write_fasta
from transformers import AutoModelForMaskedLM

import rotq.quantize.publish
from rotq.checkpoint.load import load_model
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import load_recipe
from rotq.report import JobReport

SETTINGS: dict[str, Any] = {
    "weights.bits": 3,
    "weights.group_size": 16,
    "calibration.num_samples": 12,
    "calibration.seq_len": 32,
    "calibration.precision": "highest",
    "solver.target_correction": 0.5,
    "rotation.residual": "hadamard",
    "rotation.value": "hadamard",
}


@pytest.fixture(autouse=True)
def _reload_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process takes seconds; it is tested in tests/checkpoint/test_reload.py."""
    monkeypatch.setattr(rotq.quantize.publish, "check_reload", lambda *_, **__: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("esm")
    tiny_model("esm", dtype=torch.float32).save_pretrained(folder)
    esm_tokenizer(folder).save_pretrained(folder)
    write_fasta(folder / "p.fasta", sequences(12))
    return folder


def run(model: Path, output: Path, **changes: Any) -> JobReport:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    values = {**SETTINGS, "calibration.source": str(model / "p.fasta"), **dotted}
    return quantize_model(model, load_recipe(None, values), output)


@pytest.mark.parametrize("strategy", ["none", "attention", "token_similarity", "token_frequency"])
def test_padding_is_never_counted(strategy: str, model: Path, tmp_path: Path) -> None:
    """One sequence at a time needs no padding; both must see the same moments and weights."""
    reports = [
        run(
            model, tmp_path / str(size), calibration__batch_size=size, importance__strategy=strategy
        )
        for size in (1, 12)
    ]
    alone, padded = ([layer.loss for layer in report.layers] for report in reports)
    first = 3  # q, k and v of the first block; later layers see codes that rounding may flip
    assert padded[:first] == pytest.approx(alone[:first], rel=1e-4)
    assert padded == pytest.approx(alone, rel=0.3)
    shares = [list(report.importance.values()) for report in reports]
    assert shares[0] == pytest.approx(shares[1], rel=1e-2)
    assert reports[0].data["tokens"] == reports[1].data["tokens"]


def test_tuning_on_padded_batches(model: Path, tmp_path: Path) -> None:
    tuning = {"tuning__steps": 12, "tuning__seq_len": 4}
    alone, padded = (
        run(model, tmp_path / str(size), calibration__batch_size=size, **tuning) for size in (1, 12)
    )
    for key in ("kl_first_quarter", "kl_last_quarter"):
        assert padded.tuning[key] == pytest.approx(alone.tuning[key], rel=0.2)
    assert 0 < padded.tuning["kl_first_quarter"] < 0.1


def test_stock_transformers_computes_the_same(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    run(model, tmp_path / "out", weights__symmetric=True, weights__scale_dtype="float32")
    ids_BT = torch.tensor([esm_tokenizer(tmp_path)("MKTAYIAK")["input_ids"]])
    ids_BT[0, 3] = 32
    with torch.no_grad():
        ours = load_model(tmp_path / "out")(ids_BT).logits
        stock = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
        theirs = stock(ids_BT).logits
    assert type(stock).__module__ == "transformers.models.esm.modeling_esm"
    assert torch.equal(ours, theirs)


def test_rotated_and_hardly_rounded_is_the_original(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out", weights__bits=8, weights__group_size=-1)
    ids_BT = torch.tensor([esm_tokenizer(tmp_path)("MKTAYIAKGGHW")["input_ids"]])
    with torch.no_grad():
        before, after = (load_model(path)(ids_BT).logits for path in (model, tmp_path / "out"))
        contacts = [
            AutoModelForMaskedLM.from_pretrained(model, attn_implementation="eager")
            .eval()
            .predict_contacts(ids_BT, torch.ones_like(ids_BT)),
            _eager(tmp_path / "out").predict_contacts(ids_BT, torch.ones_like(ids_BT)),
        ]
    assert (after - before).abs().max() < 0.05 * before.std()
    assert (contacts[1] - contacts[0]).abs().max() < 0.05


def _eager(path: Path) -> Any:
    model = load_model(path)
    model.set_attn_implementation("eager")
    return model


def test_gpt2_is_refused_where_it_cannot_be_expressed(tmp_path: Path) -> None:
    tiny_model("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "gpt2")
    esm_tokenizer(tmp_path / "gpt2").save_pretrained(tmp_path / "gpt2")
    values = {**SETTINGS, "calibration.source": "pydoc"}
    with pytest.raises(ValueError, match=r"GPT-2's layers are Conv1D.*output\.format=rotq"):
        quantize_model(tmp_path / "gpt2", load_recipe(None, values), tmp_path / "out")
