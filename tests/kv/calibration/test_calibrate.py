"""Constants fitted to a model: each step pays on the model's own keys and values."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_model

from rotq.kv.calibration.calibrate import calibrate, data_oblivious
from rotq.kv.calibration.fit import balanced, centred_keys, coding_error
from rotq.kv.calibration.layer_constants import boost_of
from rotq.kv.calibration.statistics import LayerStatistics, collect
from rotq.kv.presets import PRESETS, KVSpec, preset

PLAIN = replace(
    preset("k3v3"), name="plain", mean="none", value_mean=False, alpha=0.0, beta=0.0,
    value_metric=False, search=0,
)  # fmt: skip


def skewed_model(family: str = "llama") -> Any:
    """Keys and values with a mean, as trained models have."""
    model = tiny_model(family, dtype=torch.float32)
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.k_proj, attention.v_proj, attention.q_proj):
            scale = torch.logspace(0.5, -0.5, linear.weight.shape[0])
            linear.weight.mul_(scale[:, None])
        if attention.k_proj.bias is not None:
            attention.k_proj.bias.mul_(4)
    return model


MODEL = skewed_model("llama-biases")
IDS_BT = random_ids(6, 64)
STATISTICS = collect(MODEL, IDS_BT, sinks=4)


def error_of(spec: KVSpec, layer: int = 1) -> float:
    """Cost of key errors on the samples."""
    transform = calibrate(MODEL, IDS_BT, spec, statistics=STATISTICS).layers[layer]
    found: LayerStatistics = STATISTICS[layer]
    x_HND = centred_keys(found, spec)
    error_H = coding_error(x_HND, transform.key, spec.k_bits, spec.norm, found.query_moment_HDD)
    return float(error_H.sum())


def test_each_part_pays() -> None:
    specs = [
        PLAIN,
        replace(PLAIN, mean="static"),
        replace(PLAIN, mean="rope"),
        replace(PLAIN, mean="rope", alpha=0.5),
        replace(PLAIN, mean="rope", alpha=0.5, beta=1.0),
        replace(PLAIN, mean="rope", alpha=None, beta=1.0, search=4),
    ]
    errors = [error_of(spec) for spec in specs]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_open_alpha_is_the_best_of_those_tried() -> None:
    spec = replace(PLAIN, mean="rope", beta=1.0)
    chosen = error_of(replace(spec, alpha=None))
    assert chosen <= min(error_of(replace(spec, alpha=alpha)) for alpha in (0.1, 0.3, 0.5))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_fitted(name: str) -> None:
    found = calibrate(MODEL, IDS_BT, preset(name), statistics=STATISTICS)
    assert sorted(found.layers) == [0, 1]
    for transform in found.layers.values():
        for side in (transform.key, transform.value):
            product = side.matrix_HDD @ side.inverse_HDD
            if side.boost_HC is not None:
                bits = preset(name).k_bits if side is transform.key else preset(name).v_bits
                product = product / boost_of(side.boost_HC, bits)[:, None, None]
            torch.testing.assert_close(product, torch.eye(16).expand(2, -1, -1), rtol=0, atol=1e-3)
        assert (transform.inv_freq_R is not None) == (preset(name).mean == "rope")


def test_mean_is_where_the_spec_says() -> None:
    static = calibrate(MODEL, IDS_BT, replace(PLAIN, mean="static"), statistics=STATISTICS)
    rope = calibrate(MODEL, IDS_BT, replace(PLAIN, mean="rope"), statistics=STATISTICS)
    for layer, found in enumerate(STATISTICS):
        for calibration, expected in (
            (static, found.turned_key_mean_HD),
            (rope, found.key_mean_HD),
        ):
            mean_HD = calibration.layers[layer].key.mean_HD
            torch.testing.assert_close(mean_HD, expected.float())
        assert not rope.layers[layer].value.mean_HD.any()
    assert rope.layers[0].mean == "rope"


def test_unknown_rope_becomes_a_static_mean_and_is_reported() -> None:
    unknown = [replace(found, rotary=None) for found in STATISTICS]
    found = calibrate(MODEL, IDS_BT, preset("k3v3"), statistics=unknown)
    assert [transform.mean for transform in found.layers.values()] == ["static", "static"]
    assert found.source["static_mean_layers"] == [0, 1]
    expected = STATISTICS[0].turned_key_mean_HD.float()
    torch.testing.assert_close(found.layers[0].key.mean_HD, expected)


def test_turboesm_has_no_norm_and_its_mean_residual() -> None:
    transform = calibrate(MODEL, IDS_BT, preset("turboesm"), statistics=STATISTICS).layers[0]
    assert (transform.format.norm, transform.format.bytes_per_token) == ("none", 4 * (3 + 3 + 1))
    key = transform.key
    y_HND = STATISTICS[0].k_HND @ key.matrix_HDD.mT
    for head in range(2):
        book_L = key.levels_HL[head].float() * 2 ** key.base_H[head]
        code = torch.searchsorted(key.thresholds_HL[head], y_HND[head].contiguous())
        left = (y_HND[head] - book_L[code]).abs().mean() / 2 ** key.base_H[head]
        assert transform.residual_scale_H is not None
        assert float(transform.residual_scale_H[head]) == pytest.approx(float(left), rel=0.01)
    identity = torch.eye(16).expand(2, -1, -1)
    assert torch.equal(transform.value.matrix_HDD, identity)


@pytest.mark.parametrize("residual", ["sign", "qjl"])
def test_residual_bit_pays(residual: str) -> None:
    def error(spec: KVSpec) -> float:
        from rotq.kv.codec import KVCodec

        transform = calibrate(MODEL, IDS_BT, spec, statistics=STATISTICS).layers[1]
        k_BHTD, v_BHTD = STATISTICS[1].k_HND[None], STATISTICS[1].v_HND[None]
        position_BT = STATISTICS[1].position_N[None]
        k_hat_BHTD, _ = KVCodec(transform).fake_quantize(k_BHTD, v_BHTD, position_BT)
        return float((k_hat_BHTD - k_BHTD).square().sum())

    spec = replace(PLAIN, mean="rope", residual=residual)
    fitted = error(spec)
    assert fitted < 0.7 * error(replace(spec, residual="none"))
    if residual == "qjl":
        unbiased = error(replace(spec, residual_scale="unbiased"))
        gaussian = error(replace(spec, residual_scale="unbiased", sketch="gaussian"))
        assert fitted < unbiased < gaussian


def test_basis_and_metric() -> None:
    x_HND = torch.randn(1, 400, 8, generator=torch.Generator().manual_seed(0)).double()
    x_HND *= torch.arange(1.0, 9.0)
    C_HDD, eye_HDD = x_HND.mT @ x_HND / 400, torch.eye(8).double()[None]
    assert balanced(eye_HDD, C_HDD, eye_HDD, 0.0, 0.0) is eye_HDD
    A_HDD = balanced(eye_HDD, C_HDD, eye_HDD, 0.0, 1.0)
    spread = x_HND @ A_HDD.mT
    ratio = spread.std(1).max() / spread.std(1).min()
    assert ratio < 2.5


def test_data_oblivious_is_plain() -> None:
    found = data_oblivious(MODEL.config, preset("k4v3"))
    assert found.spec.name == "k4v3-oblivious"
    transform = found.layers[1]
    assert (transform.mean, transform.key.search, transform.format.k_bits) == ("none", 0, 4)
    identity = (transform.key.matrix_HDD @ transform.key.matrix_HDD.mT)[0]
    torch.testing.assert_close(identity, torch.eye(16), rtol=0, atol=1e-5)
