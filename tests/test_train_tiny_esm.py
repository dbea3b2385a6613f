"""The script that trains small protein models: split, determinism, learning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import load_script
from tiny_proteins import sequences, write_fasta

from rotq.calibration.fasta import Record, read_fasta
from rotq.checkpoint.load import load_model, load_tokenizer

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def script() -> Any:
    module = load_script("train_tiny_esm")
    module.SIZES, module.SEQ_LEN, module.BATCH = SMALL, 34, 16
    return module


def patterned(number: int) -> list[str]:
    """Proteins with something to learn: L follows A, D follows K."""
    found = sequences(number, shortest=45, longest=70)
    return [sequence.replace("A", "AL").replace("K", "KD") for sequence in found]


def test_relatives_are_on_one_side(script: Any) -> None:
    families = sequences(60, shortest=60, longest=60)
    records = [
        Record(name=f"{family}-{member}", sequence=families[family][member : 50 + member])
        for family in range(60)
        for member in range(1 + family % 3)
    ]
    training, held_out = script.split(records)
    assert len(training) + len(held_out) == len(records)
    assert len(held_out) >= script.HELD_OUT * len(records)
    sides = [{record.name.split("-")[0] for record in side} for side in (training, held_out)]
    assert not sides[0] & sides[1]


def test_short_and_ambiguous_sequences_are_left_out(script: Any) -> None:
    usable = script.usable
    assert usable(Record(name="a", sequence="ACDEF" * 8))
    assert not usable(Record(name="a", sequence="ACDEF" * 7))
    assert not usable(Record(name="a", sequence="ACDEF" * 8 + "X"))


def test_models_learn_and_are_the_same_again(script: Any, tmp_path: Path) -> None:
    file = write_fasta(tmp_path / "p.fasta", patterned(60))
    losses = script.make_tiny_plm(tmp_path / "a", file, 60)
    for kind in ("esm", "causal"):
        first, last = losses[kind][:10], losses[kind][-10:]
        assert sum(last) < sum(first) - 3
        assert load_tokenizer(tmp_path / "a" / kind)("MK")["input_ids"] == [0, 20, 15, 2]
    model = load_model(tmp_path / "a" / "esm")
    assert model.config.position_embedding_type == "rotary"
    assert model.config.token_dropout
    script.make_tiny_plm(tmp_path / "b", file, 3)
    script.make_tiny_plm(tmp_path / "c", file, 3)
    weights = [(tmp_path / x / "esm" / "model.safetensors").read_bytes() for x in "bc"]
    assert weights[0] == weights[1]
    held_out = read_fasta(tmp_path / "a" / "heldout.fasta").records
    assert 0 < len(held_out) < 6


def test_sanity_tells_proteins_from_shuffled_ones(script: Any, tmp_path: Path) -> None:
    file = write_fasta(tmp_path / "p.fasta", patterned(60))
    script.make_tiny_plm(tmp_path / "a", file, 60)
    found = script.sanity(tmp_path / "a")
    # sixty steps are too few for the masked model, which is asked for 15 % of the residues only
    assert all(10 < figure < 30 for figure in found["esm"])
    assert found["causal"][0] < found["causal"][1] - 0.3


def test_shuffling_keeps_composition(script: Any) -> None:
    record = Record(name="a", sequence="ACDEFGHIKL")
    shuffled = script.shuffled([record], torch.Generator().manual_seed(0))[0]
    assert sorted(shuffled.sequence) == sorted(record.sequence)
    assert shuffled.sequence != record.sequence
