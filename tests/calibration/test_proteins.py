"""Windows of proteins: drawn, cut, masked, put into batches of like length."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_proteins import esm_tokenizer, sequences, spaced_tokenizer, write_fasta

from rotq.calibration.batches import Batch, bucketed, padded
from rotq.calibration.data import load_windows
from rotq.calibration.limits import Limits
from rotq.calibration.texts import read_text
from rotq.calibration.tokenized import tokenize
from rotq.errors import RotqError
from rotq.recipe import Calibration


def windows(tmp_path: Path, found: list[str], **changes: Any) -> Any:
    settings = {"num_samples": 50, "seq_len": 40, "batch_size": 4, "masked": 0.0, **changes}
    file = write_fasta(tmp_path / "p.fasta", found)
    calibration = Calibration(source=str(file), **settings)
    return load_windows(calibration, esm_tokenizer(tmp_path), Limits(), masked=True)


def rows(batches: Any) -> list[list[int]]:
    return [
        batch.ids_BT[row, :length].tolist()
        for batch in batches
        for row, length in enumerate(batch.lengths())
    ]


def test_each_sequence_once_between_its_special_tokens(tmp_path: Path) -> None:
    found = sequences(11)
    drawn = windows(tmp_path, found)
    tokenizer = esm_tokenizer(tmp_path)
    assert sorted(rows(drawn.batches)) == sorted(tokenizer(s)["input_ids"] for s in found)
    assert drawn.num_tokens == sum(len(s) + 2 for s in found)
    assert drawn.tokens == sum(map(len, found))
    assert drawn.first_BT.shape == (1, max(map(len, found)) + 2)


def test_batches_are_of_like_length_and_padded_on_the_right(tmp_path: Path) -> None:
    drawn = windows(tmp_path, sequences(11))
    lengths = [length for batch in drawn.batches for length in batch.lengths()]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch.ids_BT) for batch in drawn.batches] == [4, 4, 3]
    for batch in drawn.batches:
        assert batch.ids_BT.shape[1] == batch.lengths()[0]
        real_BT = batch.real_M.view_as(batch.ids_BT)
        assert (batch.ids_BT[~real_BT] == 1).all()
        assert (batch.special_BT == (real_BT & ((batch.ids_BT == 0) | (batch.ids_BT == 2)))).all()


def test_long_sequences_give_a_piece_from_anywhere(tmp_path: Path) -> None:
    found = sequences(30, shortest=60, longest=60)
    drawn = windows(tmp_path, found, seq_len=12, batch_size=50)
    assert drawn.batches[0].mask_BT is None
    assert drawn.batches[0].ids_BT.shape == (30, 12)
    tokenizer = esm_tokenizer(tmp_path)
    whole = ["".join(tokenizer.convert_ids_to_tokens(row[1:-1])) for row in rows(drawn.batches)]
    places = [next(s.find(piece) for s in found if piece in s) for piece in whole]
    assert len(set(places)) > 15
    assert max(places) > 40


def test_share_of_masked_residues(tmp_path: Path) -> None:
    found = [s + "X" for s in sequences(40, shortest=30, longest=30)]
    drawn = windows(tmp_path, found, masked=0.25, batch_size=64)
    ids_BT = drawn.batches[0].ids_BT
    assert 0.2 < (ids_BT == 32).double().mean() < 0.3
    assert (ids_BT[:, 0] == 0).all()
    assert (ids_BT[:, -2:] == torch.tensor([24, 2])).all()  # an X is never asked for
    again = windows(tmp_path, found, masked=0.25, batch_size=64)
    assert torch.equal(again.batches[0].ids_BT, ids_BT)


def test_fewer_windows_than_sequences_are_drawn_by_seed(tmp_path: Path) -> None:
    found = sequences(20)
    first, second = (windows(tmp_path, found, num_samples=5, seed=seed) for seed in (0, 1))
    assert len(rows(first.batches)) == len(rows(second.batches)) == 5
    assert sorted(rows(first.batches)) != sorted(rows(second.batches))


def test_a_protein_model_wants_fasta_and_room(tmp_path: Path) -> None:
    with pytest.raises(RotqError, match=r"pydoc: the model reads proteins.*FASTA"):
        load_windows(Calibration(source="pydoc"), esm_tokenizer(tmp_path), Limits(), masked=True)
    with pytest.raises(RotqError, match=r"seq_len=2 leaves no room for a residue between 2"):
        windows(tmp_path, ["MKT"], seq_len=2)


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    drawn = windows(tmp_path, ["MKT", "", "A*C"])
    assert drawn.notes[-1].endswith("1 sequences, 3 residues; left out: 1 empty, 1 with stops")


def test_causal_models_read_sequences_between_special_tokens(tmp_path: Path) -> None:
    text = read_text(str(write_fasta(tmp_path / "p.fasta", ["MKT", "ACD"])))
    tokenizer = esm_tokenizer(tmp_path)
    wanted = tokenizer("MKT")["input_ids"] + tokenizer("ACD")["input_ids"]
    assert tokenize(text, tokenizer).tolist() == wanted
    spaced = spaced_tokenizer()
    both = spaced("M K T")["input_ids"] + spaced("A C D")["input_ids"]
    assert tokenize(text, spaced).tolist() == both


def test_batches_of_equal_length_have_no_mask() -> None:
    batch = padded([[1, 2], [3, 4]], 0, frozenset())
    assert batch.mask_BT is None
    assert batch.special_BT is None
    assert batch.real_M is None
    assert (batch.num_tokens, batch.lengths()) == (4, [2, 2])
    ragged = bucketed([[1], [2, 3, 4], [5, 6]], 2, 9, frozenset({5}))
    assert [b.ids_BT.tolist() for b in ragged] == [[[2, 3, 4], [5, 6, 9]], [[1]]]
    assert ragged[0].num_tokens == 5
    assert ragged[0].special_BT.tolist() == [[False] * 3, [True, False, False]]
    assert Batch(ids_BT=torch.zeros(2, 3)).lengths() == [3, 3]
