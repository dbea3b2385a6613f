"""What users may ask of the plugin."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_model

import rotq.vllm
from rotq.errors import RotqError
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.presets import preset
from rotq.vllm.settings import Settings, load_kv, read_settings


def test_keys() -> None:
    assert read_settings({}) == Settings(kv=None, linear="tiles")
    assert read_settings(object()) == Settings()
    asked = {"rotq_kv": "k3v3", "rotq_linear": "once", "other": 1}
    assert read_settings(asked) == Settings(kv="k3v3", linear="once")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rotq_vk": "k3v3"}, "no rotq_vk; did you mean rotq_kv"),
        ({"rotq_kv": 3}, "rotq_kv is a preset or a file, got 3"),
        ({"rotq_kv": ""}, "rotq_kv is a preset or a file"),
        ({"rotq_linear": "dense"}, "rotq_linear is tiles or once, got 'dense'"),
    ],
)
def test_keys_that_are_none(given: dict[str, object], message: str) -> None:
    with pytest.raises(RotqError, match=message):
        read_settings(given)


def test_a_preset_and_a_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert load_kv("k3v3", model.config).spec.name == "k3v3-oblivious"
    data_oblivious(model.config, preset("k3v3")).save(tmp_path / "kv.safetensors")
    assert load_kv(str(tmp_path / "kv.safetensors"), model.config).spec.k_bits == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("k3v4", "no KV preset 'k3v4'; did you mean .* or a file of rotq calibrate-kv"),
        ("turboesm", "does not exist without calibration; run rotq calibrate-kv"),
        ("nowhere.safetensors", "no such file"),
    ],
)
def test_neither(name: str, message: str) -> None:
    with pytest.raises(RotqError, match=message):
        load_kv(name, tiny_model("llama").config)


def test_another_models_file_and_recent_windows(tmp_path: Path) -> None:
    file = tmp_path / "kv.safetensors"
    data_oblivious(tiny_model("qwen3").config, preset("k3v3")).save(file)
    with pytest.raises(RotqError, match="another model"):
        load_kv(str(file), tiny_model("llama").config)
    file = tmp_path / "recent.safetensors"
    spec = replace(preset("k3v3"), recent=3)
    data_oblivious(tiny_model("llama").config, spec).save(file)
    with pytest.raises(RotqError, match="no recent window"):
        load_kv(str(file), tiny_model("llama").config)


def test_a_vllm_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rotq.vllm.registration", None)
    with pytest.raises(RotqError, match=r"tested with vLLM 0\.32\.0\. VLLM_PLUGINS=''"):
        rotq.vllm.register()
