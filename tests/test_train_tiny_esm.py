"""The script that trains small protein models: split, determinism, learning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import load_script
from tiny_proteins import sequences, write_fasta

from rotq.calibration.fasta import Record
from rotq.calibration.sequences import read_proteins
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
    module.SIZES, module.KMER = SMALL, 7
    module.WINDOWS = {"esm": (16, 34), "causal": (8, 74)}
    return module


def patterned(number: int) -> list[str]:
    """One family, by a common end, with something to learn: L follows A, D follows K."""
    found = sequences(number, shortest=45, longest=70)
    return [sequence.replace("A", "AL").replace("K", "KD") + "WWHWWMWWCWW" for sequence in found]


def relatives(script: Any, members: int) -> list[Record]:
    """Two families: pieces of two ancestors, each with its own changes, and some strangers."""
    records = []
    generator = torch.Generator().manual_seed(0)
    for family, ancestor in enumerate(sequences(2, shortest=120, longest=120)):
        for member in range(members):
            letters = list(ancestor)
            for place in torch.randint(0, 120, (3 * member,), generator=generator).tolist():
                letters[place] = "ACDEFGHIKLMNPQRSTVWY"[place % 20]
            records.append(Record(name=f"{family}-{member}", sequence="".join(letters)))
    strangers = sequences(5, shortest=100, longest=100, seed=9)
    return records + [Record(name=f"stranger-{n}", sequence=s) for n, s in enumerate(strangers)]


def names(sides: Any) -> set[str]:
    return {record.name[:8] for side in sides for record in side}


def test_families_and_what_is_held_out_of_them(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "FAMILIES", 2)
    records = relatives(script, 12)
    found = sorted(script.families(records), key=len)
    assert [len(family) for family in found] == [1, 1, 1, 1, 1, 12, 12]
    training, held_out = script.split(records)
    assert len(training) + len(held_out) == 24
    assert 2 <= len(held_out) <= 8
    assert not {record.name for record in training} & {record.name for record in held_out}
    known = set().union(*(script.kmers(record.sequence) for record in training))
    for record in held_out:
        own = script.kmers(record.sequence)
        assert len(own & known) <= script.KNOWN * len(own)
    # families whose median is long, and those that are chains rather than families, are not taken
    monkeypatch.setattr(script, "MEDIAN_LENGTH", 110)
    assert names(script.split(records)) == {"stranger"}
    monkeypatch.setattr(script, "MEDIAN_LENGTH", 300)
    monkeypatch.setattr(script, "LARGEST", 5)
    assert names(script.split(records)) == {"stranger"}


def test_short_and_ambiguous_sequences_are_left_out(script: Any) -> None:
    usable = script.usable
    assert usable(Record(name="a", sequence="ACDEF" * 8))
    assert not usable(Record(name="a", sequence="ACDEF" * 7))
    assert not usable(Record(name="a", sequence="ACDEF" * 8 + "X"))


def test_models_learn_and_are_the_same_again(script: Any, tmp_path: Path) -> None:
    file = write_fasta(tmp_path / "p.fasta", patterned(60))
    losses = script.make_tiny_plm(tmp_path / "a", file, dict.fromkeys(script.WINDOWS, 60))
    for kind in ("esm", "causal"):
        first, last = losses[kind][:10], losses[kind][-10:]
        assert sum(last) < sum(first) - 3
        assert load_tokenizer(tmp_path / "a" / kind)("MK")["input_ids"] == [0, 20, 15, 2]
    model = load_model(tmp_path / "a" / "esm")
    assert model.config.position_embedding_type == "rotary"
    assert model.config.token_dropout
    script.make_tiny_plm(tmp_path / "b", file, dict.fromkeys(script.WINDOWS, 3))
    script.make_tiny_plm(tmp_path / "c", file, dict.fromkeys(script.WINDOWS, 3))
    weights = [(tmp_path / x / "esm" / "model.safetensors").read_bytes() for x in "bc"]
    assert weights[0] == weights[1]
    held_out = read_proteins(tmp_path / "a" / "heldout.fasta").records
    assert 0 < len(held_out) <= 16


def test_both_models_leave_the_residue_frequencies(script: Any, tmp_path: Path) -> None:
    file = write_fasta(tmp_path / "p.fasta", patterned(60))
    script.make_tiny_plm(tmp_path / "a", file, dict.fromkeys(script.WINDOWS, 150))
    found = script.sanity(tmp_path / "a")
    assert found["frequencies"]["held out"] == pytest.approx(found["frequencies"]["shuffled"])
    for kind in ("esm", "causal"):
        # without ``look_nearby`` the masked model has 19.3 on both
        assert found[kind]["held out"] < 14 < 16 < found["frequencies"]["held out"]
        assert found[kind]["shuffled"] > 20
        assert found[kind]["trained on"] < 14


def test_each_head_starts_at_a_neighbour(script: Any, tmp_path: Path) -> None:
    codec = script.ResidueCodec(script.make_tokenizer(tmp_path))
    model = script.make_models(codec)["esm"].eval()
    model.set_attn_implementation("eager")
    ids_BT = torch.tensor([codec.encode("ACDEFGHIKLMNPQRSTVWY")])
    with torch.inference_mode():
        layers = model(input_ids=ids_BT, output_attentions=True).attentions
    first, last = 4, ids_BT.shape[1] - 4
    found = [
        [(head_TT.argmax(-1) - torch.arange(len(head_TT)))[first:last].unique().tolist()]
        for attention_BHTT in layers
        for head_TT in attention_BHTT[0]
    ]
    assert found == [[[-1]], [[1]], [[-2]], [[2]]]


def test_shuffling_keeps_composition(script: Any) -> None:
    record = Record(name="a", sequence="ACDEFGHIKL")
    shuffled = script.shuffled([record], torch.Generator().manual_seed(0))[0]
    assert sorted(shuffled.sequence) == sorted(record.sequence)
    assert shuffled.sequence != record.sequence
