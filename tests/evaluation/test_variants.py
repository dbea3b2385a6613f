"""Scores of variants against a plain loop over transformers, one pass at a time."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from tiny_models import tiny_model
from tiny_proteins import RESIDUES, esm_tokenizer, saprot_tokenizer, spaced_tokenizer

from rotq.calibration.residues import ResidueCodec
from rotq.errors import RotqError
from rotq.evaluation.assays import Assay, Substitution
from rotq.evaluation.ranks import spearman
from rotq.evaluation.variants import VariantProtocol, score_variants
from rotq.evaluation.window_passes import optimal_window

WILD = "MKTAYIAKQRQISFVKSHFSRQ"
MUTANTS = ("M1A", "K2R:T3S", "Q22W", "A7G:S18T:R21K", "")


def assay(wild: str = WILD, mutants: tuple[str, ...] = MUTANTS) -> Assay:
    changes = tuple(
        tuple(Substitution(one[0], int(one[1:-1]) - 1, one[-1]) for one in m.split(":") if one)
        for m in mutants
    )
    return Assay(
        name="made-up",
        wild_type=wild,
        mutants=mutants,
        substitutions=changes,
        scores=tuple(map(float, range(len(mutants)))),
    )


@pytest.fixture(scope="module", params=["esm", "bert"])
def masked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = tiny_model(request.param, dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp(request.param)
    spaced = request.param == "bert"
    return model, spaced_tokenizer() if spaced else esm_tokenizer(folder)


def log_p(model: Any, ids: list[int], place: int) -> torch.Tensor:
    with torch.inference_mode():
        logits_V = model(input_ids=torch.tensor([ids])).logits[0, place]
    return logits_V.double().log_softmax(-1)


def token(tokenizer: Any, letter: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(letter))


def plain_ids(tokenizer: Any, sequence: str) -> list[int]:
    spaced = " ".join(sequence) if "[CLS]" in tokenizer.get_vocab() else sequence
    return list(tokenizer(spaced)["input_ids"])


def plain(model: Any, tokenizer: Any, given: Assay, kind: str) -> list[float]:
    """ProteinGym's formulae, row by row."""
    found = []
    for variant, changes in enumerate(given.substitutions):
        total = 0.0
        if kind == "pll":
            sequence = given.sequence(variant)
            for position, letter in enumerate(sequence):
                ids = plain_ids(tokenizer, sequence)
                ids[position + 1] = tokenizer.mask_token_id
                total += float(log_p(model, ids, position + 1)[token(tokenizer, letter)])
        for wild, position, mutant in changes if kind != "pll" else ():
            ids = plain_ids(tokenizer, given.wild_type)
            if kind == "masked-marginals":
                ids[position + 1] = tokenizer.mask_token_id
            at = log_p(model, ids, position + 1)
            total += float(at[token(tokenizer, mutant)] - at[token(tokenizer, wild)])
        found.append(total)
    return found


@pytest.mark.parametrize("kind", ["masked-marginals", "wt-marginals", "pll"])
@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_scores_are_those_of_a_plain_loop(masked: Any, kind: Any, batch_tokens: int) -> None:
    model, tokenizer = masked
    protocol = VariantProtocol(kinds=(kind,), batch_tokens=batch_tokens)
    passes: list[tuple[str, int, int]] = []
    codec = ResidueCodec(tokenizer)
    found = score_variants(model, codec, assay(), protocol, lambda *seen: passes.append(seen))
    expected = plain(model, tokenizer, assay(), kind)
    assert found == {kind: pytest.approx(expected, abs=1e-5)}
    assert len(set(expected)) == len(MUTANTS)
    assert all(before[1] < after[1] for before, after in pairwise(passes))
    assert passes[-1][1] == passes[-1][2]


def test_causal_models_read_both_ways(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32).eval()
    tokenizer = esm_tokenizer(tmp_path)
    protocol = VariantProtocol(kinds=("likelihood",))
    found = score_variants(model, ResidueCodec(tokenizer), assay(), protocol)["likelihood"]
    expected = []
    for variant in range(len(MUTANTS)):
        total = 0.0
        for sequence in (assay().sequence(variant), assay().sequence(variant)[::-1]):
            ids = plain_ids(tokenizer, sequence)
            for place in range(len(ids) - 1):
                total += float(log_p(model, ids, place)[ids[place + 1]]) / 2
        expected.append(total)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("place", "length", "expected"),
    [
        (3, 10, (0, 10)),
        (3, 100, (0, 10)),
        (5, 100, (0, 10)),
        (6, 100, (1, 11)),
        (94, 100, (89, 99)),
        (95, 100, (90, 100)),
        (99, 100, (90, 100)),
    ],
)
def test_windows_are_proteingyms(place: int, length: int, expected: tuple[int, int]) -> None:
    assert optimal_window(place, length, 10) == expected


def test_a_protein_longer_than_the_window_is_cut_around_its_mutations(masked: Any) -> None:
    model, tokenizer = masked
    long, position = "".join(RESIDUES[(7 * n) % 20] for n in range(40)), 25
    given = assay(long, (f"{long[position]}{position + 1}W",))
    protocol = VariantProtocol(window=12)
    found = score_variants(model, ResidueCodec(tokenizer), given, protocol)
    ids = plain_ids(tokenizer, long)
    ids[position + 1] = tokenizer.mask_token_id
    at = log_p(model, ids[position + 1 - 6 : position + 1 + 6], 6)
    expected = float(at[token(tokenizer, "W")] - at[token(tokenizer, long[position])])
    assert found["masked-marginals"] == [pytest.approx(expected, abs=1e-5)]
    # of the windows at 0, 6, 12, 18, 24, 30: 18 to 29 has three residues on its poorer side, 24 two
    ids[position + 1] = token(tokenizer, long[position])
    at = log_p(model, ids[18:30], position + 1 - 18)
    expected = float(at[token(tokenizer, "W")] - at[token(tokenizer, long[position])])
    assert found["wt-marginals"] == [pytest.approx(expected, abs=1e-5)]


def test_a_causal_model_scores_each_token_of_a_long_protein_once(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32).eval()
    tokenizer = esm_tokenizer(tmp_path)
    short = VariantProtocol(kinds=("likelihood",), window=10)
    found = score_variants(model, ResidueCodec(tokenizer), assay(mutants=("",)), short)
    total = 0.0
    for sequence in (WILD, WILD[::-1]):
        ids = plain_ids(tokenizer, sequence)
        starts = (0, 5, 10, len(ids) - 10)
        for place in range(1, len(ids)):
            # the first window that has it
            start = next(s for s in starts if place < s + 10)
            total += float(log_p(model, ids[start:place], place - start - 1)[ids[place]]) / 2
    assert found["likelihood"] == [pytest.approx(total, abs=1e-5)]


def test_a_residue_that_the_model_does_not_know(masked: Any) -> None:
    model, _ = masked
    codec = ResidueCodec(spaced_tokenizer())
    with pytest.raises(RotqError, match=r"made-up: the model's vocabulary lacks U$"):
        score_variants(model, codec, assay("MKU", ("M1A",)), VariantProtocol())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_spearman_is_scipys(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, 9, (2, 30), generator=generator).double().tolist()
    assert spearman(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0]], ids=["none", "one", "constant"])
def test_there_is_no_order_without_different_values(values: list[float]) -> None:
    assert spearman(values, values) is None


def test_saprot_scores_as_its_authors_do(tmp_path: Path) -> None:
    """Structure unknown: the residue masked as ##, probabilities summed over its 21 tokens."""
    model = tiny_model("esm", dtype=torch.float32, vocab_size=446, mask_token_id=4)
    tokenizer = saprot_tokenizer(tmp_path)
    given = assay(mutants=("M1A", "K2R", "Q22W"))
    ours = score_variants(model, ResidueCodec(tokenizer), given, VariantProtocol())
    vocabulary = tokenizer.get_vocab()
    for variant, ((wild, position, mutant),) in enumerate(given.substitutions):
        tokens = [f"{letter}#" for letter in WILD]
        tokens[position] = "##"
        ids_BT = torch.tensor([tokenizer(" ".join(tokens))["input_ids"]])
        with torch.inference_mode():
            p_V = model(ids_BT).logits[0, position + 1].double().softmax(-1)
        sums = [float(p_V[vocabulary[f"{a}p"] :][:21].sum().log()) for a in (mutant, wild)]
        assert ours["masked-marginals"][variant] == pytest.approx(sums[0] - sums[1], abs=1e-5)
