"""What computes on a GPU keeps to it, and what has no fp64 gets none: with emulated devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_device import Emulated, emulated, moved
from tiny_models import VOCAB, tiny_model
from tiny_proteins import esm_tokenizer, sequences

from rotq.calibration.fasta import Record
from rotq.calibration.residues import ResidueCodec
from rotq.errors import RotqError
from rotq.evaluation.kv import evaluate_kv
from rotq.evaluation.perplexity import Protocol, evaluate
from rotq.evaluation.pseudo_perplexity import PLLProtocol, evaluate_pll
from rotq.evaluation.quantized_history import scheme_of
from rotq.evaluation.representations import OriginalBasis, compare_representations
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.presets import preset
from rotq.solvers.gptq import eliminate
from rotq.solvers.statistics import corrected_target

IDS = torch.randint(1, VOCAB, (400,), generator=torch.Generator().manual_seed(0))
DEVICES = ["cuda:0", "mps:0"]


def model_on(name: str | None, family: str = "llama", seed: int = 0) -> Any:
    model = tiny_model(family, seed=seed, dtype=torch.float32)
    model.set_attn_implementation("eager")
    return model if name is None else moved(model, name)


@pytest.mark.parametrize("name", DEVICES)
def test_calibration_of_a_cache(name: str) -> None:
    ids_BT = IDS[:256].view(2, 128)
    expected = calibrate(model_on(None), ids_BT, preset("k3v3"))
    with emulated(name):
        found = calibrate(model_on(name), ids_BT, preset("k3v3"))
    for index in expected.layers:
        ours, theirs = found.layers[index], expected.layers[index]
        for side in ("key", "value"):
            matrices = [getattr(layer, side).matrix_HDD for layer in (ours, theirs)]
            assert torch.allclose(*matrices, atol=1e-5)
        assert ours.key.matrix_HDD.device.type == "cpu"


@pytest.mark.parametrize("name", DEVICES)
def test_evaluation_of_a_cache(name: str) -> None:
    schemes = [scheme_of(calibrate(model_on(None), IDS[:256].view(2, 128), preset("k3v3")))]
    protocol = Protocol(windows=2, seq_len=96)
    expected = evaluate_kv(model_on(None), IDS, schemes, protocol=protocol)
    with emulated(name):
        found = evaluate_kv(model_on(name), IDS, schemes, protocol=protocol)
    assert found[0].kl == pytest.approx(expected[0].kl, rel=1e-4)
    assert found[0].attention_error == pytest.approx(expected[0].attention_error, rel=1e-4)


@pytest.mark.parametrize("name", DEVICES)
def test_perplexity(name: str) -> None:
    protocol = Protocol(windows=2, seq_len=96)
    expected = evaluate(model_on(None), IDS, protocol=protocol, reference=model_on(None))
    with emulated(name):
        found = evaluate(model_on(name), IDS, protocol=protocol, reference=model_on(name))
    assert found.ppl == pytest.approx(expected.ppl, rel=1e-6)


@pytest.mark.parametrize("name", DEVICES)
def test_proteins(name: str, tmp_path: Path) -> None:
    codec, texts = ResidueCodec(esm_tokenizer(tmp_path)), sequences(2, shortest=20, longest=30)
    records = [Record(name="p", sequence=text) for text in texts]

    def measured(device: str | None) -> tuple[Any, Any]:
        ours, theirs = model_on(device, "esm", seed=1), model_on(device, "esm")
        norm = theirs.esm.encoder.emb_layer_norm_after
        R_DD = torch.eye(norm.weight.numel(), dtype=torch.float64)
        basis = OriginalBasis(R_DD=R_DD, gain_D=norm.weight, added_D=norm.bias)
        return (
            evaluate_pll(ours, records, codec, protocol=PLLProtocol(positions=3), reference=theirs),
            compare_representations(ours, theirs, texts, codec, basis=basis),
        )

    expected = measured(None)
    with emulated(name):
        on_device = measured(name)
    for ours, theirs in zip(on_device, expected, strict=True):
        for key, value in theirs.to_dict().items():
            assert getattr(ours, key) == (
                value if key == "protocol" else pytest.approx(value, 1e-4)
            )


def test_solving_without_double() -> None:
    """Factors are the CPU's, and come back to where the Hessian is."""
    x_MK = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    weight_NK, hessian_KK, cross_KK = x_MK[:4], x_MK.T @ x_MK, x_MK[:16] @ x_MK.T[:, :16]
    factored = eliminate(hessian_KK, "activation", 0.1)
    expected_NK = corrected_target(weight_NK, cross_KK, factored, 0.5)
    with emulated("mps") as device:
        held = [Emulated(x, device) for x in (weight_NK, hessian_KK, cross_KK)]
        found = eliminate(held[1], "activation", 0.1)
        found_NK = corrected_target(held[0], held[2], found, 0.5)
        pairs = ((found_NK, expected_NK), (found.factor_KK, factored.factor_KK))
        for ours, expected in (*pairs, (found.spread[0], factored.spread[0])):
            assert ours.device.type == "mps"
            assert torch.equal(ours.cpu(), expected)


def test_a_packed_cache_without_kernels_is_refused() -> None:
    model = model_on(None)
    calibration = calibrate(model, IDS[:256].view(2, 128), preset("k3v3"))
    with emulated("mps"), pytest.raises(RotqError, match=r"kernels for CPUs and CUDA; .* on mps"):
        PackedCache(model_on("mps"), calibration)
