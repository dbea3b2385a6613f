"""A text that says little counts little, and whoever chose it is told; other texts count whole."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.evaluation.kv import evaluate_kv
from rotq.evaluation.perplexity import Protocol
from rotq.evaluation.quantized_history import scheme_of
from rotq.kv.calibration.calibrate import calibrate, data_oblivious
from rotq.kv.calibration.evidence import Evidence, shrunk
from rotq.kv.calibration.file import KVCalibration, load_calibration
from rotq.kv.calibration.fit import fit_layer
from rotq.kv.calibration.layer_constants import kv_format
from rotq.kv.calibration.statistics import LayerStatistics, collect
from rotq.kv.presets import PRESETS, preset
from rotq.models.families.esm import as_decoder

ONE_LETTER = torch.full((2, 48), 5)
ONE_WORD = torch.tensor([7, 3, 9]).repeat(2, 16)


def peaked_model(family: str = "llama") -> Any:
    """Keys of other tokens have other large elements, as trained models have."""
    model = tiny_model(family, dtype=torch.float32)
    layers = model.model.layers if family == "llama" else model.esm.encoder.layer
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        attention = layer.self_attn if family == "llama" else layer.attention.self
        for name in ("k_proj", "q_proj") if family == "llama" else ("key", "query"):
            weight = attention.get_submodule(name).weight
            rows = torch.rand(weight.shape[0], generator=generator) < 0.2
            weight[rows] *= 6
    return model


@pytest.mark.parametrize(
    ("ids_BT", "found"),
    [
        (ONE_LETTER, Evidence(contexts=1, tokens=1, vocabulary=97)),
        (ONE_WORD, Evidence(contexts=3, tokens=3, vocabulary=97)),
        (torch.tensor([[1, 2, 3], [1, 2, 4]]), Evidence(contexts=2, tokens=4, vocabulary=97)),
    ],
)
def test_counts(ids_BT: Tensor, found: Evidence) -> None:
    assert Evidence.of(ids_BT, 97) == found


@pytest.mark.parametrize(
    ("contexts", "tokens", "vocabulary", "weight"),
    [
        (1, 1, 50_000, 1 / 256),
        (64, 500, 50_000, 0.5),
        (1, 1, 768, 1 / 128),
        (128, 256, 50_000, 1),
        (900, 128, 50_000, 0.5),
        (900, 32, 768, 0.25),
        (900, 128, 768, 1),
        (5, 3, 33, 5 / 128),
        (900, 20, 33, 1),
    ],
)
def test_weight_of_heads_of_64(contexts: int, tokens: int, vocabulary: int, weight: float) -> None:
    evidence = Evidence(contexts=contexts, tokens=tokens, vocabulary=vocabulary)
    assert evidence.weight(64) == pytest.approx(weight)
    assert (evidence.note(64) == "") == (weight == 1)


def test_shrunk_moments_keep_their_size() -> None:
    M_HDD = torch.diag(torch.arange(1.0, 9.0)).double()[None]
    assert shrunk(M_HDD, 1) is M_HDD
    half_HDD = shrunk(M_HDD, 0.5)
    assert float(half_HDD.diagonal(dim1=-2, dim2=-1).sum()) == 36
    assert torch.equal(half_HDD[0].diagonal(), 0.5 * torch.arange(1.0, 9.0) + 2.25)


def test_a_text_of_some_variety_is_fitted_as_it_is() -> None:
    model, ids_BT, spec = peaked_model(), random_ids(2, 40), preset("k3v3")
    statistics = collect(model, ids_BT, sinks=4)
    found = calibrate(model, ids_BT, spec, statistics=statistics)
    assert (found.source["weight"], found.source["notes"]) == (1, [])
    for layer, measured in enumerate(statistics):
        assert measured.shrunk() is measured
        plain = fit_layer(measured, spec, kv_format(spec, 16, layer, 2))
        assert torch.equal(plain.key.matrix_HDD, found.layers[layer].key.matrix_HDD)
        assert torch.equal(plain.key.mean_HD, found.layers[layer].key.mean_HD)


def kl(model: Any, *calibrations: KVCalibration) -> list[float]:
    ids_N, protocol = random_ids(4, 64, seed=9).flatten(), Protocol(windows=4, seq_len=64)
    schemes = [scheme_of(calibration) for calibration in calibrations]
    return [found.kl for found in evaluate_kv(model, ids_N, schemes, protocol=protocol)]


def whole(statistics: list[LayerStatistics]) -> Iterator[LayerStatistics]:
    """The same, of a text that is said to be varied."""
    for found in statistics:
        yield replace(found, evidence=Evidence(contexts=10**4, tokens=10**4, vocabulary=97))


@pytest.mark.parametrize("ids_BT", [ONE_LETTER, ONE_WORD], ids=["letter", "word"])
def test_no_worse_than_without_data(ids_BT: Tensor, tmp_path: Path) -> None:
    model, spec = peaked_model(), preset("k3v3")
    statistics = collect(model, ids_BT, sinks=4)
    with pytest.warns(UserWarning, match=r"different runs of 4 tokens .* on more varied text"):
        found = calibrate(model, ids_BT, spec, statistics=statistics)
    believed = calibrate(model, ids_BT, spec, statistics=list(whole(statistics)))
    ours, all_of_it, free = kl(model, found, believed, data_oblivious(model.config, spec))
    assert ours < 1.05 * free
    assert ours < all_of_it
    found.save(tmp_path / "kv")
    source = load_calibration(tmp_path / "kv", model.config).source
    assert 0 < source["weight"] < 0.2
    assert "calibrate on more text" in source["notes"][0]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_sound_file_and_who_needs_data_is_told(
    tmp_path: Path, name: str
) -> None:
    notes: list[str] = []
    found = calibrate(tiny_model("llama"), ONE_LETTER, preset(name), on_note=notes.append)
    found.save(tmp_path / "kv")
    assert load_calibration(tmp_path / "kv", tiny_model("llama").config).source == found.source
    assert len(notes) == preset(name).needs_calibration


@torch.no_grad()
def test_one_residue_repeated() -> None:
    model, spec = tiny_model("esm-wide", dtype=torch.float32), preset("k3v3")
    ids_BT = torch.full((4, 40), 5)
    ids_BT[:, 0], ids_BT[:, -1] = 0, 2
    varied_BT = torch.randint(4, 24, (4, 40), generator=torch.Generator().manual_seed(1))
    notes: list[str] = []
    with as_decoder(model):
        found = calibrate(model, ids_BT, spec, on_note=notes.append)
        whole = calibrate(model, varied_BT, spec, on_note=notes.append)
        ours, free = kl(model, found, data_oblivious(model.config, spec))
    assert ours < free
    assert found.source["weight"] < 0.2
    assert whole.source["weight"] == 1
    assert len(notes) == 1
