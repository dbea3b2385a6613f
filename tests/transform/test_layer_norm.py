"""Learned transforms where norms take the mean out: R1 leaves the ones alone, jobs are exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import fused_logits
from tiny_models import LAYER_NORM, MemorySource, random_ids, tiny_model
from tiny_proteins import esm_tokenizer, sequences, write_fasta
from tiny_transforms import W4A4KV4

import rotq.quantize.publish
from rotq.checkpoint.load import load_model
from rotq.errors import RotqError
from rotq.fusion.draw import build_basis
from rotq.fusion.layernorm import leave_ones_alone
from rotq.models.skeleton import Skeleton
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import Rotation, load_recipe
from rotq.rotations.basis import Basis
from rotq.rotations.orthogonal import Cayley, polish, with_ones_kept
from rotq.transform.parameters import Parameters
from rotq.transform.search import check_transform

ROTATED = {
    "rotation.residual": "hadamard",
    "rotation.value": "hadamard",
    "calibration.precision": "highest",
    "transform.steps": 6,
}
SCALINGS = {
    "esm": ["qkv", "gate_up", "value", "query_key"],
    "esmc": ["qkv", "gate_up", "value", "up"],
}


def start(n: int) -> torch.Tensor:
    """Orthogonal, with the ones left alone."""
    generator = torch.Generator().manual_seed(0)
    random_nn = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return leave_ones_alone(torch.linalg.qr(random_nn).Q)


def test_every_free_matrix_leaves_the_ones_alone() -> None:
    n = 24
    one = Cayley(start(n), keeps_ones=True)
    with torch.no_grad():
        one.free.copy_(torch.randn(n, n, generator=torch.Generator().manual_seed(1)))
    moved_nn = one.matrix()
    assert (moved_nn - one.start_nn).abs().max() > 0.1
    assert (moved_nn.sum(0) - 1).abs().max() < 1e-5
    exact_nn = polish(with_ones_kept(moved_nn.detach()))
    assert (exact_nn.sum(0) - 1).abs().max() < 1e-13
    assert (exact_nn.mT @ exact_nn - torch.eye(n)).abs().max() < 1e-12
    assert (exact_nn - moved_nn).abs().max() < 1e-5


@pytest.mark.parametrize("name", LAYER_NORM)
def test_trained_parameters_preserve_the_function(name: str) -> None:
    """Free parameters far from the start, as a training leaves them, fused in fp64."""
    source = MemorySource(tiny_model(name))
    skeleton = Skeleton.open(source)
    drawn = build_basis(
        Rotation(residual="hadamard", value="none" if name == "gpt2" else "hadamard"),
        skeleton.adapter,
        skeleton.config,
    )
    parameters = Parameters(
        drawn,
        skeleton,
        scaled=SCALINGS.get(name, SCALINGS["esm"]) if name != "gpt2" else [],
        factors={},
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for free in parameters.free().values():
            free.copy_(0.5 * torch.randn(free.shape, generator=generator))
    basis = parameters.finished()
    assert drawn.residual_DD is not None
    assert basis.residual_DD is not None
    assert (basis.residual_DD - drawn.residual_DD).abs().max() > 0.05
    ids_BT = random_ids(2, 11)
    before = fused_logits(skeleton, source, ids_BT, Basis())
    after = fused_logits(skeleton, source, ids_BT, basis)
    assert (after - before).abs().max() < 1e-9


@pytest.fixture(autouse=True)
def _reload_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process takes seconds; it is tested in tests/checkpoint/test_reload.py."""
    monkeypatch.setattr(rotq.quantize.publish, "check_reload", lambda *_, **__: None)


@pytest.fixture(scope="module", params=["esm", "esmc"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, dtype=torch.float32).save_pretrained(folder)
    esm_tokenizer(folder).save_pretrained(folder)
    write_fasta(folder / "p.fasta", sequences(12))
    return folder


def run(model: Path, output: Path, **changes: Any) -> Any:
    values = {
        "weights.group_size": 16,
        "calibration.num_samples": 12,
        "calibration.seq_len": 32,
        "calibration.source": str(model / "p.fasta"),
        "output.format": "rotq",
        **ROTATED,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return quantize_model(model, load_recipe(None, values), output)


@pytest.mark.parametrize("method", ["learned", "optrot"])
def test_a_learned_basis_is_the_original_where_little_is_rounded(
    method: str, model: Path, tmp_path: Path
) -> None:
    name = "esmc" if (model / "config.json").read_text().count("esmc") else "esm"
    scaled = {"transform__scalings": SCALINGS[name]} if method == "learned" else {}
    report = run(model, tmp_path / "out", transform__method=method, weights__bits=8, **scaled)
    found = report.transform
    assert found["residual_angle"] > 1e-3
    ids_BT = torch.tensor([esm_tokenizer(tmp_path)("MKTAYIAKGGHW")["input_ids"]])
    with torch.no_grad():
        before, after = (load_model(path)(ids_BT).logits for path in (model, tmp_path / "out"))
    assert (after - before).abs().max() < 0.05 * before.std()


def test_training_lowers_the_loss_at_low_bits(model: Path, tmp_path: Path) -> None:
    report = run(
        model, tmp_path / "out", transform__method="learned", transform__steps=48,
        weights__bits=2,
    )  # fmt: skip
    found = report.transform["model"]
    assert found["loss_last_quarter"] < found["loss_first_quarter"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transform.layer_steps": 3}, r"transform\.layer_steps=0"),
        ({"transform.objective": "cross_entropy"}, r"set transform\.objective=kl_top"),
        (
            {"transform.scalings": ["value"], "transform.balance": ["value"]},
            r"transform\.balance=\[\]",
        ),
    ],
)
def test_what_knows_no_layer_norm_is_refused(changes: dict[str, Any], message: str) -> None:
    skeleton = Skeleton.open(MemorySource(tiny_model("esm")))
    recipe = load_recipe(None, {**W4A4KV4, "transform.method": "learned", **changes})
    with pytest.raises(RotqError, match=message):
        check_transform(recipe.transform, skeleton)
