"""Embeddings and contact maps of a model against its reference."""

from pathlib import Path

import pytest
import torch
from tiny_models import MemorySource, tiny_model
from tiny_proteins import esm_tokenizer, sequences

from rotq.calibration.residues import ResidueCodec
from rotq.evaluation.contact_maps import Readout, contact_map
from rotq.evaluation.contacts import map_agreement
from rotq.evaluation.representations import OriginalBasis, compare_representations
from rotq.fusion.draw import build_basis
from rotq.fusion.fuse import fuse_block, fuse_outer
from rotq.models.skeleton import Skeleton
from rotq.recipe import Rotation

FOUND = sequences(2, shortest=12, longest=15)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ResidueCodec:
    return ResidueCodec(esm_tokenizer(tmp_path_factory.mktemp("esm")))


def rotated():
    """A rotated copy of the tiny ESM, and its basis."""
    original = tiny_model("esm")
    source = MemorySource(original)
    skeleton = Skeleton.open(source)
    basis = build_basis(Rotation(residual="hadamard"), skeleton.adapter, skeleton.config)
    tensors = fuse_outer(skeleton.load_outer(source, dtype=torch.float64), skeleton.adapter, basis)
    for index in range(skeleton.num_blocks):
        block = skeleton.load_block(index, source, device="cpu", dtype=torch.float64)
        fuse_block(block, skeleton.adapter, basis, index)
        prefix = skeleton.block_name(index)
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
    model = tiny_model("esm")
    model.load_state_dict(tensors, assign=True)
    norm = original.esm.encoder.emb_layer_norm_after
    basis_back = OriginalBasis(R_DD=basis.residual_DD, gain_D=norm.weight, added_D=norm.bias)
    return original, model, basis_back


def test_a_rotated_model_is_the_same_in_the_original_basis(codec: ResidueCodec) -> None:
    original, model, basis = rotated()
    back = compare_representations(model, original, FOUND, codec, basis=basis)
    assert back.embedding_cosine == pytest.approx(1, abs=1e-6)
    assert back.contact_overlap == 1
    assert back.contact_correlation == pytest.approx(1, abs=1e-6)
    assert compare_representations(model, original, FOUND, codec).embedding_cosine < 0.9


@pytest.mark.parametrize("readout", ["head", "average"])
def test_contacts_of_a_rotated_model_are_the_originals(
    readout: Readout, codec: ResidueCodec
) -> None:
    original, model, _ = rotated()
    maps = [contact_map(each, codec, FOUND[0], readout) for each in (original, model)]
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-9, atol=1e-11)


def test_another_model_is_another(codec: ResidueCodec) -> None:
    found = compare_representations(tiny_model("esm", seed=1), tiny_model("esm"), FOUND, codec)
    assert abs(found.embedding_cosine) < 0.5
    assert found.contact_overlap is not None
    assert found.contact_overlap < 1
    assert set(found.to_dict()) == {"embedding_cosine", "contact_overlap", "contact_correlation"}


def test_models_without_a_contact_head(codec: ResidueCodec) -> None:
    model = tiny_model("bert")
    found = compare_representations(model, model, FOUND, codec)
    assert found.embedding_cosine == pytest.approx(1)
    assert found.contact_overlap is None
    assert model.config._attn_implementation == "sdpa"


def test_map_agreement_by_hand() -> None:
    maps = torch.zeros(2, 9, 9, dtype=torch.float64)
    for index, pairs in enumerate(([(0, 6), (0, 7), (1, 8)], [(0, 6), (0, 8), (1, 8)])):
        for i, j in pairs:
            maps[index, i, j] = 1
    # six pairs are at least 6 apart, all of them among the top 9
    overlap, correlation = map_agreement(maps[0], maps[1])
    assert overlap == 1
    assert correlation == pytest.approx(1 / 3)
    near = maps.clone()
    near[:, 0, 5] = 99  # too near to be a contact
    assert map_agreement(near[0], near[1]) == (overlap, correlation)


def test_the_contact_head_sees_eager_attention(codec: ResidueCodec, tmp_path: Path) -> None:
    model = tiny_model("esm")
    compare_representations(model, model, FOUND, codec)
    assert model.config._attn_implementation == "sdpa"
