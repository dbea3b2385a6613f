"""Calibration by itself: once, kept by what decides it, and said where it cannot be kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_served import byte_tokenizer, served_model

from rotq.disk.user_cache import user_cache
from rotq.errors import RotqError
from rotq.evaluation.kv import evaluate_kv
from rotq.evaluation.perplexity import Protocol
from rotq.evaluation.quantized_history import scheme_of
from rotq.kv import PackedCache
from rotq.kv.calibration.automatic import BRIEF, Calibrator, calibrated
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.calibration.model_hash import hash_model
from rotq.kv.presets import preset

SMALL = replace(BRIEF, source="words.txt", num_samples=2, seq_len=96)


@pytest.fixture(autouse=True)
def _text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = torch.randint(32, 127, (4000,), generator=torch.Generator().manual_seed(0))
    Path("words.txt").write_bytes(bytes(words.tolist()))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def calibrator(said: list[str], **changes: object) -> Calibrator:
    given = {"model": served_model(), "tokenizer": byte_tokenizer(), "calibration": SMALL}
    return Calibrator(**{**given, "say": said.append, **changes})  # type: ignore[arg-type]


def test_the_second_time_nothing_is_computed(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = calibrator(said).kept([preset("k3v3")], kept)[0]
    assert "calibrated on words.txt, 2 windows of 96 tokens; kept as" in said[0]
    monkeypatch.setattr("rotq.kv.calibration.automatic.collect", None)
    second = calibrator(said).kept([preset("k3v3")], kept)[0]
    assert [line for line in said if "calibrated on" in line] == said[:1]
    assert second.spec == first.spec
    for layer, constants in first.layers.items():
        again = second.layers[layer]
        assert torch.equal(constants.key.matrix_HDD, again.key.matrix_HDD)
        assert torch.equal(constants.value.mean_HD, again.value.mean_HD)


@pytest.mark.parametrize("what", ["weight", "seed", "preset"])
def test_what_decides_a_calibration_is_calibrated_again(kept: Path, what: str) -> None:
    calibrator([]).kept([preset("k3v3")], kept)
    model = served_model()
    if what == "weight":
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    calibration = replace(SMALL, seed=1) if what == "seed" else SMALL
    spec = preset("k4v3" if what == "preset" else "k3v3")
    calibrator([], model=model, calibration=calibration).kept([spec], kept)
    assert len(list(kept.iterdir())) == 2


def test_a_damaged_file_is_made_anew_and_said(kept: Path) -> None:
    said: list[str] = []
    calibrator(said).kept([preset("k3v3")], kept)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    said.clear()
    calibrator(said).kept([preset("k3v3")], kept)
    assert "calibrated again" in said[0]


def test_a_file_that_rotq_did_not_write_stays(kept: Path) -> None:
    calibrator([]).kept([preset("k3v3")], kept)
    (file,) = kept.iterdir()
    file.write_text("mine")
    said: list[str] = []
    calibrator(said).kept([preset("k3v3")], kept)
    assert file.read_text() == "mine"
    assert "not kept" in said[1]


def test_a_folder_that_cannot_be_made_costs_the_keeping_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    found = calibrator(said).kept([preset("k3v3")], tmp_path / "file" / "kv")
    assert found[0].source["text"] == "words.txt"
    assert "and not kept: " in said[0]


def test_a_poor_text_is_said_each_time(tmp_path: Path) -> None:
    text = tmp_path / "letters.txt"
    text.write_text("a" * 4000)
    for _ in range(2):
        said: list[str] = []
        poor = replace(SMALL, source=str(text))
        calibrator(said, calibration=poor).kept([preset("k3v3")], tmp_path / "kv")
        assert "warning: the calibration windows hold 1 different runs" in said[-1]


def test_schemes_come_back_in_their_order(kept: Path) -> None:
    calibrator([]).kept([preset("k4v3")], kept)
    specs = [preset(name) for name in ("k2v2", "k4v3", "turboesm")]
    found = calibrator([]).kept(specs, kept)
    assert [held.spec for held in found] == specs


def biased_model() -> Any:
    """Keys have biases of 100 beside parts of size 1; queries are small, as trained ones are."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen2Config(vocab_size=258, **sizes, **heads)
    model = transformers.Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        for block in model.model.layers:
            block.self_attn.k_proj.bias.copy_(100 * torch.randn(32, generator=generator))
            block.self_attn.q_proj.bias.zero_()
            block.self_attn.q_proj.weight.mul_(0.02)
    return model


def test_large_biases_of_keys_cost_little_without_being_asked(kept: Path) -> None:
    model, spec = biased_model(), preset("k3v3")
    brief = replace(SMALL, num_samples=4, seq_len=128)
    own = calibrator([], model=model, calibration=brief).kept([spec], kept)[0]
    text = torch.randint(32, 127, (512,), generator=torch.Generator().manual_seed(1))
    schemes = [scheme_of(held) for held in (own, data_oblivious(model.config, spec))]
    ours, without = evaluate_kv(model, text, schemes, protocol=Protocol(windows=4, seq_len=128))
    assert ours.kl < 0.03
    assert ours.kl < without.kl / 4


def test_a_model_is_known_by_its_weights_and_not_by_where_they_are() -> None:
    model, other = served_model(), served_model()
    assert hash_model(model) == hash_model(other)
    with torch.no_grad():
        other.model.embed_tokens.weight += 1e-3
    assert hash_model(model) != hash_model(other)
    assert hash_model(served_model().to("meta")) is None


def test_a_cache_calibrates_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = type(served_model()).from_pretrained(tmp_path).eval()
    monkeypatch.setattr("rotq.kv.calibration.automatic.BRIEF", SMALL)
    with pytest.warns(UserWarning, match="k3v3: calibrated on words.txt, 2 windows of 96 tokens"):
        cache = PackedCache(model)
    assert cache.calibration.source["text"] == "words.txt"
    again = calibrated(model, byte_tokenizer(), preset("k3v3"))
    assert torch.equal(again.layers[0].key.inverse_HDD, cache.calibration.layers[0].key.inverse_HDD)


def test_a_cache_without_a_tokenizer_says_what_to_do() -> None:
    with pytest.raises(RotqError, match=r"no tokenizer is known: give PackedCache a calibration"):
        PackedCache(served_model())


@pytest.mark.parametrize("given", ["", "relative/folder"])
def test_a_folder_that_is_no_absolute_path_counts_as_not_set(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert user_cache() == Path.home() / ".cache" / "rotq"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/rotq")
