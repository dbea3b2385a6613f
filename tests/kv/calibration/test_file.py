"""The file of constants: whole, of this model, or refused."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import random_ids, tiny_model

from rotq.errors import RotqError
from rotq.kv.calibration.calibrate import calibrate, data_oblivious
from rotq.kv.calibration.file import KVCalibration, load_calibration
from rotq.kv.presets import PRESETS, preset

MODEL = tiny_model("llama", dtype=torch.float32)
IDS_BT = random_ids(2, 40)


def made(name: str = "k3v3") -> KVCalibration:
    return calibrate(MODEL, IDS_BT, preset(name), source={"text": "none"})


def rewrite(path: Path, **changes: Any) -> None:
    """Change metadata, or tensors by name."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["rotq-kv-calibration"])
    for name, value in changes.items():
        if name in facts:
            facts[name] = value
        elif value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path, metadata={"rotq-kv-calibration": json.dumps(facts)})


def assert_equal(first: Any, second: Any) -> None:
    """Bitwise, through nested dataclasses."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif hasattr(first, "__dataclass_fields__"):
        for field in fields(first):
            assert_equal(getattr(first, field.name), getattr(second, field.name))
    else:
        assert first == second


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_is_bitwise(tmp_path: Path, name: str) -> None:
    calibration = made(name)
    calibration.save(tmp_path / "kv.safetensors")
    found = load_calibration(tmp_path / "kv.safetensors", MODEL.config)
    assert (found.spec, found.model_hash) == (calibration.spec, calibration.model_hash)
    assert found.source == calibration.source
    assert found.layers.keys() == calibration.layers.keys()
    for layer, transform in calibration.layers.items():
        assert_equal(transform, found.layers[layer])
    assert [path.name for path in tmp_path.iterdir()] == ["kv.safetensors"]


def test_equal_heads_are_stored_once(tmp_path: Path) -> None:
    data_oblivious(MODEL.config, preset("k3v3")).save(tmp_path / "kv")
    with safe_open(tmp_path / "kv", framework="pt") as file:
        assert file.get_slice("0.key.matrix_HDD").get_shape() == [1, 16, 16]


def test_another_model(tmp_path: Path) -> None:
    made().save(tmp_path / "kv")
    with pytest.raises(RotqError, match=r"kv was calibrated for another model .* calibrate-kv"):
        load_calibration(tmp_path / "kv", tiny_model("qwen3").config)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(RotqError, match="kv: no such file"):
        load_calibration(tmp_path / "kv", MODEL.config)


@pytest.mark.parametrize("kept", [0, 7, 300, -40])
def test_truncated(tmp_path: Path, kept: int) -> None:
    made().save(tmp_path / "kv")
    (tmp_path / "kv").write_bytes((tmp_path / "kv").read_bytes()[:kept])
    with pytest.raises(RotqError, match=r"cannot read .*kv"):
        load_calibration(tmp_path / "kv", MODEL.config)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RotqError, match="cannot read"):
        load_calibration(tmp_path, MODEL.config)


def test_another_kind_of_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "kv")
    with pytest.raises(RotqError, match="is not a file of rotq calibrate-kv"):
        load_calibration(tmp_path / "kv", MODEL.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "has version 99, known is 2"),
        ({"spec": {"name": "x"}}, "is damaged"),
        ({"spec": 3}, "is damaged"),
        ({"1.key.levels_HL": None}, "is damaged: 1.key.levels_HL is missing"),
        ({"0.value.mean_HD": torch.full((2, 16), torch.nan)}, "0.value.mean_HD is not finite"),
        ({"layers": {}}, "does not hold every layer"),
    ],
    ids=["version", "spec", "type", "tensor", "nan", "layers"],
)
def test_damaged(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made().save(tmp_path / "kv")
    rewrite(tmp_path / "kv", **changes)
    with pytest.raises(RotqError, match=message):
        load_calibration(tmp_path / "kv", MODEL.config)


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    with pytest.raises(RotqError, match=r"cannot write .*kv"):
        made().save(tmp_path / "kv")
    with pytest.raises(RotqError, match=r"cannot write .*missing"):
        made().save(tmp_path / "missing" / "kv")
    assert [path.name for path in tmp_path.iterdir()] == ["kv"]


def test_other_bits_with_normal_codebooks() -> None:
    spec = replace(preset("k3v3"), codebook="gaussian", alpha=0.5)
    wanted = replace(spec, name="k4v2", k_bits=4, v_bits=2, recent=7)
    fitted = calibrate(MODEL, IDS_BT, spec)
    assert fitted.serves(wanted)
    found, expected = fitted.under(wanted), calibrate(MODEL, IDS_BT, wanted)
    assert found.recent == 7
    for layer, transform in expected.layers.items():
        assert found.layers[layer].format == transform.format
        for side in ("key", "value"):
            ours, theirs = getattr(found.layers[layer], side), getattr(transform, side)
            assert torch.equal(ours.levels_HL, theirs.levels_HL)
            assert torch.equal(ours.thresholds_HL, theirs.thresholds_HL)
            assert torch.equal(ours.matrix_HDD, theirs.matrix_HDD)
            torch.testing.assert_close(ours.base_H, theirs.base_H)


@pytest.mark.parametrize(
    "changes",
    [
        {"codebook": "kmeans", "norm": "none", "search": 0, "boost": False},
        {"residual": "sign"},
    ],
    ids=["codebook", "residual"],
)
def test_what_was_fitted_to_other_bits_is_refused(changes: dict[str, Any]) -> None:
    fitted = calibrate(MODEL, IDS_BT, replace(preset("k3v3"), **changes))
    wanted = replace(fitted.spec, name="k4v2", k_bits=4, v_bits=2)
    assert not fitted.serves(wanted)
    assert fitted.serves(replace(fitted.spec, sinks=0))
    with pytest.raises(ValueError, match="a calibration for k3v3 does not serve k4v2"):
        fitted.under(wanted)
