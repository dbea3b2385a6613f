"""AntiBERTy's folder, from a package that is looked up and never imported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import ROOT, load_script
from tiny_proteins import RESIDUES
from transformers import BertConfig, BertForMaskedLM

from rotq.calibration.residues import ResidueCodec
from rotq.calibration.sequences import read_proteins
from rotq.checkpoint.load import load_model, load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package's two files, with a tiny model and heads that are not wanted."""
    folder = tmp_path / "antiberty" / "AntiBERTy_md_smooth"
    folder.mkdir(parents=True)
    config = BertConfig(
        vocab_size=25,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=160,
        architectures=["AntiBERTy"],
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    torch.nn.init.normal_(model.cls.predictions.bias)
    config.save_pretrained(folder)
    more = {"cls.species.weight": torch.zeros(6, 16), "bert.pooler.dense.bias": torch.zeros(16)}
    torch.save({**model.state_dict(), **more}, folder / "pytorch_model.bin")
    (tmp_path / "antiberty" / "vocab.txt").write_text("\n".join(WORDS))
    return tmp_path / "antiberty"


def fetch(package: Path | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    script = load_script("fetch_antiberty")

    def find(ending: str) -> Path | None:
        return None if package is None else package / ending

    monkeypatch.setattr(script, "find", find)
    monkeypatch.setattr("sys.argv", ["fetch_antiberty.py", str(folder)])
    script.main()
    return script


def test_folder(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(package, tmp_path / "model", monkeypatch)
    stored = torch.load(package / "AntiBERTy_md_smooth" / "pytorch_model.bin", weights_only=True)
    model, tokenizer = load_model(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    assert torch.equal(model.cls.predictions.bias, stored["cls.predictions.bias"])
    assert model.config.architectures == ["BertForMaskedLM"]
    assert tokenizer("EVQ")["input_ids"] == [2, 8, 22, 18, 3]
    assert ResidueCodec(tokenizer).num_special == 2
    drawn = [r.sequence for r in read_proteins(tmp_path / "model" / "calibration.fasta").records]
    assert len(set(drawn)) == len(drawn) == 96
    held_out = {r.sequence for r in read_proteins(tmp_path / "model" / "heldout.fasta").records}
    assert len(held_out) == 10
    assert not held_out & set(drawn)


def test_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fetch(None, tmp_path / "model", monkeypatch)
    assert stopped.value.code == 4
    assert "pip install --no-deps antiberty==0.1.3" in capsys.readouterr().err


def test_antibodies_are_ten_and_ten_and_of_residues() -> None:
    records = read_proteins(ROOT / "scripts" / "antibodies.fasta").records
    splits = [record.description for record in records]
    assert splits.count("split=calibration") == splits.count("split=heldout") == 10
    assert all(100 < len(record.sequence) < 130 for record in records)
    assert all(set(record.sequence) <= set(RESIDUES) for record in records)
    # both chains of an antibody are on one side
    sides = {(record.name.split("-")[0], record.description) for record in records}
    assert len(sides) == 10
