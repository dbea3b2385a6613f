"""Contacts: transformers' own head, structures as gemmi writes them, precision by hand."""

import bz2
from pathlib import Path
from typing import Any

import gemmi
import pytest
import torch
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, sequences
from torch import Tensor

from rotq.calibration.residues import ResidueCodec
from rotq.errors import RotqError
from rotq.evaluation.contact_maps import contact_map
from rotq.evaluation.contacts import contact_figures, mean_figures, precisions
from rotq.evaluation.structures import Structure, read_contacts, read_structure

PROTEIN = sequences(1, shortest=30, longest=30)[0]


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ResidueCodec:
    return ResidueCodec(esm_tokenizer(tmp_path_factory.mktemp("esm")))


@torch.inference_mode()
def test_the_head_is_transformers_own(codec: ResidueCodec) -> None:
    model = tiny_model("esm")
    ours_LL = contact_map(model, codec, PROTEIN, "head")
    ids_BT = torch.tensor([codec.encode(PROTEIN)])
    model.set_attn_implementation("eager")
    theirs_LL = model.predict_contacts(ids_BT, torch.ones_like(ids_BT))[0]
    torch.testing.assert_close(ours_LL, theirs_LL.double(), rtol=1e-9, atol=1e-9)
    assert ours_LL.std() > 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("name", ["esm", "esmc", "bert"])
def test_the_average_is_that_of_all_heads(name: str, codec: ResidueCodec) -> None:
    model = tiny_model(name)
    ours_LL = contact_map(model, codec, PROTEIN, "average")
    model.set_attn_implementation("eager")
    output = model(torch.tensor([codec.encode(PROTEIN)]), output_attentions=True)
    map_HLL = torch.cat([layer[0] for layer in output.attentions])[:, 1:-1, 1:-1]
    map_HLL = map_HLL + map_HLL.mT
    product_HLL = map_HLL.sum(-1, keepdim=True) * map_HLL.sum(-2, keepdim=True)
    wanted_HLL = map_HLL - product_HLL / map_HLL.sum((-1, -2), keepdim=True)
    torch.testing.assert_close(ours_LL, wanted_HLL.mean(0).double(), rtol=1e-9, atol=1e-9)


def test_a_model_without_a_head_says_what_there_is(codec: ResidueCodec) -> None:
    with pytest.raises(RotqError, match=r"EsmcForMaskedLM has no contact head .*--readout average"):
        contact_map(tiny_model("esmc"), codec, PROTEIN, "head")


def test_precision_by_hand() -> None:
    length = 30
    score_LL = torch.zeros(length, length, dtype=torch.float64)
    contact_LL = torch.zeros(length, length, dtype=torch.bool)
    for rank, (i, j, true) in enumerate(
        [(0, 6, True), (1, 8, False), (2, 9, True), (3, 12, True), (0, 29, False), (1, 28, True)]
    ):
        score_LL[i, j] = 9 - rank
        contact_LL[i, j] = contact_LL[j, i] = true
    contact_LL[5, 5] = contact_LL[0, 5] = True  # too near to count
    known_L = torch.ones(length, dtype=torch.bool)
    known_L[20:] = False
    known_L[28:] = True
    structure = Structure(name="s", sequence="A" * 30, contact_LL=contact_LL, known_L=known_L)
    found = precisions(score_LL, structure)
    # 22 known residues: the first 4 of the short range, of which 3 are contacts
    assert found["short"]["P@L/5"] == 3 / 4
    assert found["medium"] == {"P@L": None, "P@L/5": None}
    # long: of 20 pairs in reach of the two known residues at the end, the first 4 hold 1
    assert found["long"]["P@L/5"] == 1 / 4


def test_means_leave_out_what_no_protein_has() -> None:
    first = {"model": {"long": {"P@L": 0.5}}, "agreement": {"overlap": 1.0}}
    second = {"model": {"long": {"P@L": None}}}
    assert mean_figures({"a": first, "b": second}) == {
        "model": {"long": {"P@L": 0.5}},
        "agreement": {"overlap": 1.0},
    }


def helix(names: list[str], *, missing: tuple[int, ...] = ()) -> Any:
    """A chain on a helix that turns every 3.6 residues, with its whole sequence."""
    structure = gemmi.Structure()
    structure.add_model(gemmi.Model(1))
    water = gemmi.Chain("W")
    structure[0].add_chain(water)
    chain = gemmi.Chain("B")
    for number, name in enumerate(names):
        if number in missing:
            continue
        residue = gemmi.Residue()
        residue.name, residue.seqid = name, gemmi.SeqId(number + 1, " ")
        residue.het_flag = "A"
        for atom_name in ["CA"] if name == "GLY" else ["CA", "CB"]:
            atom = gemmi.Atom()
            atom.name, atom.element = atom_name, gemmi.Element("C")
            angle, radius = number * 100 * torch.pi / 180, 2.3 if atom_name == "CA" else 3.3
            x, y = (radius * float(f(torch.tensor(angle))) for f in (torch.cos, torch.sin))
            atom.pos = gemmi.Position(x, y, 1.5 * number)
            residue.add_atom(atom)
        chain.add_residue(residue)
    structure[0].add_chain(chain)
    structure.setup_entities()
    for entity in structure.entities:
        if entity.entity_type == gemmi.EntityType.Polymer:
            entity.full_sequence = names
    return structure


NAMES = ["MET", "LYS", "GLY", "MSE", "ALA", "TYR", "ILE", "TRP", "GLY", "GLU"]
LETTERS = "MKGMAYIWGE"


@pytest.mark.parametrize("name", ["x.pdb", "x.cif", "x.cif.bz2"])
def test_structures_as_gemmi_writes_them(name: str, tmp_path: Path) -> None:
    structure = helix(NAMES, missing=(0, 6))
    text = structure.make_pdb_string()
    if "cif" in name:
        text = structure.make_mmcif_document().as_string()
    packed = bz2.compress(text.encode()) if name.endswith("bz2") else text.encode()
    (tmp_path / name).write_bytes(packed)
    found = read_structure(tmp_path / name)
    assert (found.name, found.sequence) == ("x", LETTERS)
    assert found.known_L.tolist() == [number not in (0, 6) for number in range(10)]
    assert found.contact_LL[1, 5]  # 4 apart on a helix
    assert not found.contact_LL[1, 9]
    assert not found.contact_LL[0].any()
    assert read_structure(tmp_path / name, chain="B").sequence == LETTERS
    with pytest.raises(RotqError, match="has no chain A that is a protein; it has B"):
        read_structure(tmp_path / name, chain="A")


def test_a_structure_without_its_whole_sequence(tmp_path: Path) -> None:
    structure = helix(NAMES, missing=(0, 6))
    for entity in structure.entities:
        entity.full_sequence = []
    (tmp_path / "x.pdb").write_text(structure.make_pdb_string())
    found = read_structure(tmp_path / "x.pdb")
    assert found.sequence == "KGMAYWGE"
    assert found.known_L.all()


def test_what_is_no_structure(tmp_path: Path) -> None:
    (tmp_path / "x.cif").write_text("data_x\nloop_\n_a.b\n")
    with pytest.raises(RotqError, match=r"x\.cif"):
        read_structure(tmp_path / "x.cif")
    (tmp_path / "y.pdb").write_text("nothing\n")
    with pytest.raises(RotqError, match=r"y\.pdb: wrong format"):
        read_structure(tmp_path / "y.pdb")
    (tmp_path / "w.pdb").write_text(
        "HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00  0.00           O\nEND\n"
    )
    with pytest.raises(RotqError, match=r"w\.pdb has no protein chain; it has none"):
        read_structure(tmp_path / "w.pdb")
    with pytest.raises(RotqError, match=r"cannot read .*z\.pdb"):
        read_structure(tmp_path / "z.pdb")


def test_lists_of_contacts(tmp_path: Path) -> None:
    file = tmp_path / "x.rr"
    file.write_text("PFRMAT RR\n# made up\nMKTAYIA\nGGG\n1 8 0 8 0.9\n2 10\nEND\n")
    found = read_contacts(file)
    assert found.sequence == "MKTAYIAGGG"
    assert [tuple(p) for p in found.contact_LL.nonzero().tolist()] == [
        (0, 7),
        (1, 9),
        (7, 0),
        (9, 1),
    ]
    file.write_text("1 8\n")
    assert read_contacts(file, PROTEIN).sequence == PROTEIN
    with pytest.raises(RotqError, match="has no sequence; give it with --fasta"):
        read_contacts(file)
    file.write_text("1 31\n")
    with pytest.raises(RotqError, match="line 1: residues 1 and 31, and the protein has 30"):
        read_contacts(file, PROTEIN)
    file.write_text("1 2 x\n")
    with pytest.raises(RotqError, match="line 1: no contact such as '12 40'"):
        read_contacts(file, PROTEIN)


def test_both_models_and_their_agreement() -> None:
    ours_LL: Tensor = torch.rand(30, 30, generator=torch.Generator().manual_seed(0)).double()
    known_L = torch.ones(30, dtype=torch.bool)
    structure = Structure(name="s", sequence=PROTEIN, contact_LL=ours_LL > 0.9, known_L=known_L)
    found = contact_figures([ours_LL, ours_LL], structure)
    assert found["model"] == found["reference"]
    assert found["model"]["long"]["P@L/5"] is None or found["model"]["long"]["P@L/5"] > 0
    assert found["agreement"]["overlap"] == 1
    assert found["agreement"]["correlation"] == pytest.approx(1)
    assert "agreement" not in contact_figures([ours_LL], structure)
