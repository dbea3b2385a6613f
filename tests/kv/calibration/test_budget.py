"""Bits by layer: what is chosen, what it takes, and what a file says of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model

from rotq.errors import RotqError
from rotq.evaluation.quantized_history import scheme_of
from rotq.kv.calibration.budget import budgeted, check_average, side_losses
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.calibration.file import KVCalibration, load_calibration
from rotq.kv.presets import averaged, preset

MODEL = tiny_model("llama", dtype=torch.float32)
UNIFORM = calibrate(MODEL, random_ids(4, 64), preset("k2v2"), on_note=lambda _: None)
LAYERS = UNIFORM.layers
LEAST = scheme_of(UNIFORM).stored_bits
MORE = LEAST + 0.4 * (scheme_of(UNIFORM.under(preset("k3v3"))).stored_bits - LEAST)


def test_more_bits_are_felt_less() -> None:
    losses = side_losses(MODEL, random_ids(2, 48), LAYERS, sinks=4)
    assert losses.keys() == LAYERS.keys()
    for sides in losses.values():
        for side in sides:
            assert side[0] > 2 * side[1] > 4 * side[2] > 0


def test_bits_go_where_they_are_felt() -> None:
    flat = [1.0, 0.3, 0.1]
    losses = dict.fromkeys(LAYERS, (flat, flat))
    losses[1] = (flat, [100.0, 30.0, 10.0])
    chosen = budgeted(LAYERS, losses, MORE)
    bits = [(held.format.k_bits, held.format.v_bits) for held in chosen.values()]
    assert bits[1][1] == max(max(pair) for pair in bits) > 2
    assert LEAST < scheme_of(replace(UNIFORM, layers=chosen)).stored_bits <= MORE


def test_too_few_bits_are_refused() -> None:
    with pytest.raises(RotqError, match=r"--kv-bits 2 is below"):
        check_average(MODEL.config, averaged(2.0))


def mixed(average: float = MORE) -> KVCalibration:
    flat = {layer: ([2.0, 1.0, 0.9], [1.0, 0.9, 0.8]) for layer in LAYERS}
    spec = replace(averaged(2.5), average_bits=average)
    source = {**UNIFORM.source, "losses": list(flat.values())}
    return replace(UNIFORM, spec=spec, layers=budgeted(LAYERS, flat, MORE), source=source)


def test_a_file_keeps_what_was_chosen(tmp_path: Path) -> None:
    held = mixed()
    held.save(tmp_path / "mixed")
    again = load_calibration(tmp_path / "mixed", MODEL.config)
    assert [c.format for c in again.layers.values()] == [c.format for c in held.layers.values()]
    other = replace(held.spec, average_bits=LEAST + 0.01)
    assert again.serves(other)
    assert {c.format.v_bits for c in again.under(other).layers.values()} == {2}
    again.source["losses"] = [1.0]
    assert not again.serves(other)
    assert again.under(held.spec).layers[0].format == held.layers[0].format
    assert {c.format.v_bits for c in again.under(preset("k3v3")).layers.values()} == {3}
    assert not UNIFORM.serves(held.spec)


def test_a_file_of_more_bits_than_it_says_is_refused(tmp_path: Path) -> None:
    mixed(LEAST).save(tmp_path / "mixed")
    with pytest.raises(RotqError, match="its layers take"):
        load_calibration(tmp_path / "mixed", MODEL.config)


@pytest.mark.parametrize("bits", [1.9, 8.5])
def test_averages_have_a_range(bits: float) -> None:
    with pytest.raises(ValueError, match="average_bits"):
        averaged(bits)


def test_an_average_has_no_constants_without_data() -> None:
    assert preset("kv2.5") == averaged(2.5)
    with pytest.raises(ValueError, match="does not exist without calibration"):
        averaged(2.5).oblivious()


def test_a_model_without_gradients_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(RotqError, match="need gradients"):
        side_losses(MODEL, random_ids(1, 16), LAYERS, sinks=4)
