"""How a tokenizer spells proteins is found out, not assumed."""

from pathlib import Path

import pytest
import torch
from tiny_proteins import RESIDUES, esm_tokenizer, saprot_tokenizer, spaced_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from rotq.calibration.residues import ResidueCodec, reads_residues
from rotq.errors import RotqError


def test_esm_spelling(tmp_path: Path) -> None:
    tokenizer = esm_tokenizer(tmp_path)
    codec = ResidueCodec(tokenizer)
    assert codec.separator == ""
    assert codec.encode("MKTXU") == tokenizer("MKTXU")["input_ids"]
    assert codec.around == ([0], [2])
    assert (codec.mask_id, codec.pad_id, codec.num_special) == (32, 1, 2)
    assert codec.encode("J") == [0, codec.ids["X"], 2]


def test_spaced_spelling() -> None:
    tokenizer = spaced_tokenizer()
    codec = ResidueCodec(tokenizer)
    assert codec.separator == " "
    assert codec.encode("MKT") == tokenizer("M K T")["input_ids"]
    assert codec.encode("MXT")[2] == tokenizer.unk_token_id
    assert tokenizer.unk_token_id not in codec.scored


def test_saprot_with_structures_not_known(tmp_path: Path) -> None:
    tokenizer = saprot_tokenizer(tmp_path)
    codec = ResidueCodec(tokenizer)
    assert (codec.separator, codec.suffix) == ("", "#")
    assert codec.encode("MKT") == tokenizer("M#K#T#")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(codec.mask_id) == "##"
    assert codec.around == ([0], [2])
    assert set(codec.ids) == set(RESIDUES)
    logits_MV = torch.randn(3, 446, generator=torch.Generator().manual_seed(0)).double()
    found_MV = codec.by_residue(logits_MV).log_softmax(-1)
    p_MV = logits_MV.softmax(-1)
    vocabulary = tokenizer.get_vocab()
    for letter in "AMY":
        # as its authors sum: all tokens from the residue's first on
        first = vocabulary[f"{letter}p"]
        wanted_M = p_MV[:, first : first + 21].sum(-1).log()
        torch.testing.assert_close(found_MV[:, codec.ids[letter]], wanted_M)
    assert codec.by_residue(logits_MV)[:, codec.mask_id].equal(logits_MV[:, codec.mask_id])


def test_other_models_logits_are_given_back(tmp_path: Path) -> None:
    logits_MV = torch.randn(3, 33)
    assert ResidueCodec(esm_tokenizer(tmp_path)).by_residue(logits_MV) is logits_MV


def test_what_is_scored(tmp_path: Path) -> None:
    codec = ResidueCodec(esm_tokenizer(tmp_path))
    scored = {letter for letter, id in codec.ids.items() if id in codec.scored}
    assert scored == set(RESIDUES) | {"U", "O"}


def test_words_are_no_residues() -> None:
    vocab = {letter: number for number, letter in enumerate(RESIDUES)} | {"AC": 20}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab, [("A", "C")])))
    assert not reads_residues(tokenizer)
    with pytest.raises(RotqError, match="each residue a token of its own"):
        ResidueCodec(tokenizer)


def test_no_mask_and_no_unknown_token() -> None:
    vocab = {letter: number for number, letter in enumerate(RESIDUES)}
    codec = ResidueCodec(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab, []))))
    assert codec.encode("AC") == [0, 1]
    with pytest.raises(RotqError, match="knows neither 'X' nor X"):
        codec.encode("AX")
    with pytest.raises(RotqError, match="no mask token"):
        _ = codec.mask_id
