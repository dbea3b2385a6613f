"""Pseudo-perplexity against a loop that masks one residue at a time, without batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, sequences

from rotq.calibration.fasta import Record
from rotq.calibration.residues import ResidueCodec
from rotq.errors import RotqError
from rotq.evaluation.groups import load_groups
from rotq.evaluation.pseudo_perplexity import PLLProtocol, evaluate_pll


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ResidueCodec:
    return ResidueCodec(esm_tokenizer(tmp_path_factory.mktemp("esm")))


def records(found: list[str]) -> list[Record]:
    return [Record(name=str(number), sequence=sequence) for number, sequence in enumerate(found)]


def by_hand(
    model: Any, codec: ResidueCodec, found: list[str], *, mask: bool
) -> tuple[float, float]:
    """(perplexity, accuracy), one forward pass for each residue."""
    log_p, correct = [], []
    for sequence in found:
        for place, letter in enumerate(sequence, start=1):
            ids_BT = torch.tensor([codec.encode(sequence)])
            if mask:
                ids_BT[0, place] = codec.mask_id
            logits_V = model(ids_BT).logits[0, place]
            if letter not in "XBZJ":
                log_p.append(float(logits_V.log_softmax(-1)[codec.ids[letter]]))
                correct.append(int(logits_V.argmax()) == codec.ids[letter])
    return math.exp(-sum(log_p) / len(log_p)), sum(correct) / len(correct)


def test_foreign_ids_and_positions_are_settled_before_the_first_pass(codec: ResidueCodec) -> None:
    bounded = tiny_model("bert", dtype=torch.float32)
    passes: list[int] = []
    bounded.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = records(["MKT" * 40, "MK"])
    each = PLLProtocol(positions=1, batch_tokens=1)
    scored = evaluate_pll(bounded, found, codec, protocol=each)
    assert max(passes) == 64
    assert "1 of them cut to 62 residues" in scored.protocol
    passes.clear()
    bounded.resize_token_embeddings(codec.ids["U"])
    with pytest.raises(RotqError, match="is outside the model's"):
        evaluate_pll(bounded, records(["MKTA", "MKU"]), codec, protocol=PLLProtocol(batch_tokens=1))
    assert passes == []


@pytest.mark.parametrize("name", ["esm", "bert"])
def test_equals_one_residue_at_a_time(name: str, codec: ResidueCodec) -> None:
    model = tiny_model(name)
    found = [*sequences(4, shortest=3, longest=9), "MXKBU"]
    scored = evaluate_pll(
        model, records(found), codec, protocol=PLLProtocol(batch_tokens=40, sequences=0)
    )
    masked, accuracy = by_hand(model, codec, found, mask=True)
    assert scored.masked == pytest.approx(masked, rel=1e-5)
    assert scored.accuracy == accuracy
    assert scored.one_pass == pytest.approx(by_hand(model, codec, found, mask=False)[0], rel=1e-5)
    assert scored.residues == sum(map(len, found)) - 2
    assert scored.reference_masked is None
    assert scored.kl is None


def test_protocol_takes_first_sequences_cut_and_some_positions(codec: ResidueCodec) -> None:
    model, found = tiny_model("esm"), sequences(5, shortest=20, longest=30)
    protocol = PLLProtocol(sequences=2, max_length=10)
    scored = evaluate_pll(model, records(found), codec, protocol=protocol)
    cut = [sequence[:10] for sequence in found[:2]]
    assert scored.masked == pytest.approx(by_hand(model, codec, cut, mask=True)[0], rel=1e-5)
    assert "2 sequences, 2 of them cut to 10 residues" in scored.protocol
    some = PLLProtocol(sequences=2, max_length=10, positions=3)
    few = evaluate_pll(model, records(found), codec, protocol=some)
    assert few.residues == 6
    assert few.one_pass == pytest.approx(scored.one_pass)
    assert "3 residues masked" in few.protocol
    assert few == evaluate_pll(model, records(found), codec, protocol=some)


def test_reference(codec: ResidueCodec) -> None:
    model, other, found = tiny_model("esm"), tiny_model("esm", seed=1), sequences(2)
    protocol = PLLProtocol()
    same = evaluate_pll(model, records(found), codec, protocol=protocol, reference=model)
    assert (same.kl, same.top1) == (0, 1)
    assert (same.reference_masked, same.reference_one_pass) == (same.masked, same.one_pass)
    two = evaluate_pll(model, records(found), codec, protocol=protocol, reference=other)
    alone = evaluate_pll(other, records(found), codec, protocol=protocol)
    assert two.reference_masked == pytest.approx(alone.masked, rel=1e-9)
    assert two.reference_one_pass == pytest.approx(alone.one_pass, rel=1e-9)
    assert two.reference_accuracy == alone.accuracy
    assert two.kl is not None
    assert two.kl > 0.1


def test_what_cannot_be_scored(codec: ResidueCodec) -> None:
    model = tiny_model("esm")
    with pytest.raises(RotqError, match="no residue to score"):
        evaluate_pll(model, records(["XXB"]), codec, protocol=PLLProtocol())
    with pytest.raises(ValueError, match="max_length: 0 is not 1 or more"):
        PLLProtocol(max_length=0)
    broken = tiny_model("esm")
    broken.lm_head.bias[5] = torch.inf
    with pytest.raises(RotqError, match="logits are not finite"):
        evaluate_pll(broken, records(["MKT"]), codec, protocol=PLLProtocol())


def test_groups_that_come_with_rotq() -> None:
    groups = load_groups()
    assert list(groups) == ["short-peptide", "transmembrane", "active-site", "disordered"]
    assert [len(group) for group in groups.values()] == [8, 7, 8, 8]
    assert all(record.name.startswith("sp|") for group in groups.values() for record in group)
    lengths = {name: {len(r.sequence) for r in group} for name, group in groups.items()}
    assert max(lengths["short-peptide"]) <= 50
    assert (lengths["transmembrane"], lengths["active-site"]) == ({40}, {51})


def test_file_of_groups_names_source_and_licence() -> None:
    import rotq.evaluation.groups as groups

    text = (Path(groups.__file__).parent / groups.FILE).read_text(encoding="utf-8")
    assert text.startswith("; Pieces of reviewed entries of UniProt")
    assert "CC BY 4.0" in text
