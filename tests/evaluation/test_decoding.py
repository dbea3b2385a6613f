"""Figures of decoding ESM-2 with caches."""

import pytest
import torch
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, sequences

from rotq.calibration.fasta import Record
from rotq.calibration.residues import ResidueCodec
from rotq.evaluation.decoding import baselines, evaluate_decoding, packed_caches
from rotq.evaluation.groups import grouped
from rotq.kv.presets import preset


def test_rows(tmp_path):
    model = tiny_model("esm-wide", dtype=torch.float32)
    codec = ResidueCodec(esm_tokenizer(tmp_path))
    ids_BT = torch.randint(4, 24, (8, 48), generator=torch.Generator().manual_seed(1))
    caches = packed_caches(model, [preset("k3v3"), preset("k8v3")], ids_BT)
    found = sequences(2, shortest=20, longest=30)
    rows = evaluate_decoding(model, found, codec, caches | baselines(3))
    by_name = {row.cache: row for row in rows}
    assert list(by_name) == ["dense", "k3v3", "k8v3", "int8"]
    dense = by_name["dense"]
    assert dense.cosine == pytest.approx(1)
    assert (dense.ratio, dense.bits_per_element) == (1, 32)
    assert dense.tokens == sum(len(sequence) + 1 for sequence in found)
    assert dense.bytes == max(len(s) + 2 for s in found) * 2 * 3 * 64 * 4
    cosines = [by_name[name].cosine for name in ("k3v3", "k8v3", "int8", "dense")]
    assert cosines == sorted(cosines)
    assert by_name["int8"].bits_per_element == pytest.approx(9)
    assert by_name["k3v3"].worst_cosine <= by_name["k3v3"].cosine < 0.9999
    assert by_name["k3v3"].ratio != 1


def test_groups_are_named_in_headers():
    headers = ("organism=x group=loops", "subgroup=no", "", "group=loops")
    records = [Record(name=str(n), sequence="MK", description=d) for n, d in enumerate(headers)]
    found = grouped(records, "f.fasta")
    assert {group: [r.name for r in kept] for group, kept in found.items()} == {
        "loops": ["0", "3"],
        "f.fasta": ["1", "2"],
    }
