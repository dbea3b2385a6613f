"""What a model writes: drawn from its own distribution, and the same again."""

import pytest
import torch
from tiny_models import VOCAB, tiny_model

from rotq.calibration.data import load_windows
from rotq.calibration.limits import Limits
from rotq.calibration.sampled import sample_text, sampled_first, writer
from rotq.errors import RotqError
from rotq.recipe import Calibration


class Tokenizer:
    """Folded bytes, behind a BOS or without."""

    def __init__(self, bos=None, eos=None, adds_bos=False):
        self.bos_token_id, self.eos_token_id, self._adds = bos, eos, adds_bos

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [1 + byte % (VOCAB - 1) for byte in text.encode()]
        return {
            "input_ids": [self.bos_token_id, *ids] if add_special_tokens and self._adds else ids
        }


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", dtype=torch.float32)


def write(model, **changes):
    options = {"num_windows": 3, "length": 12, "seed": 0, **changes}
    return sample_text(model, (5, 7), **options)


def test_tokens_come_as_often_as_the_model_says(model):
    ids_BT = write(model, num_windows=4000, length=4).ids_BT
    with torch.no_grad():
        p_V = model(torch.tensor([[5, 7]])).logits[0, -1].softmax(-1)
    found_V = torch.bincount(ids_BT[:, 2], minlength=VOCAB) / len(ids_BT)
    assert (found_V - p_V).abs().sum() < 1.5 * (p_V * (1 - p_V) / len(ids_BT)).sqrt().sum()
    # and behind what was written, not behind the first tokens
    most = int(ids_BT[:, 2].mode().values)
    behind = ids_BT[ids_BT[:, 2] == most]
    with torch.no_grad():
        q_V = model(torch.tensor([[5, 7, most]])).logits[0, -1].softmax(-1)
    again_V = torch.bincount(behind[:, 3], minlength=VOCAB) / len(behind)
    assert (again_V - q_V).abs().sum() < 1.5 * (q_V * (1 - q_V) / len(behind)).sqrt().sum()
    assert (again_V - q_V).abs().sum() < 0.7 * (again_V - p_V).abs().sum()


def test_windows_begin_as_told_and_are_the_same_again(model):
    first, again = write(model), write(model)
    assert first.ids_BT.shape == (3, 12)
    assert (first.ids_BT[:, :2] == torch.tensor([5, 7])).all()
    assert torch.equal(first.ids_BT, again.ids_BT)
    assert first.sha256 == again.sha256
    assert len({tuple(row) for row in first.ids_BT.tolist()}) == 3
    other = write(model, seed=1)
    assert other.sha256 != first.sha256
    assert not torch.equal(other.ids_BT, first.ids_BT)


def test_more_windows_than_are_written_together(model):
    told = []
    ids_BT = write(model, num_windows=19, on_batch=lambda *done: told.append(done)).ids_BT
    assert ids_BT.shape == (19, 12)
    assert torch.equal(ids_BT[:16], write(model, num_windows=16).ids_BT)
    assert told == [(16, 19), (19, 19)]


def test_nothing_ends_a_window_and_the_models_settings_are_as_before(model):
    before = model.generation_config
    before.eos_token_id, before.temperature, before.top_k = list(range(VOCAB)), 0.01, 1
    state = torch.random.get_rng_state()
    ids_BT = write(model, length=30).ids_BT
    assert ids_BT.shape == (3, 30)
    assert ids_BT.unique().numel() > 10
    assert model.generation_config is before
    assert torch.equal(torch.random.get_rng_state(), state)
    before.eos_token_id = None


@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt2", "mixtral"])
def test_other_families_write(name):
    other = tiny_model(name, dtype=torch.float32)
    assert write(other, length=20).ids_BT.shape == (3, 20)


def test_logits_that_are_not_finite_are_refused():
    broken = tiny_model("llama", dtype=torch.float32)
    broken.model.norm.weight.data[:] = torch.nan
    with pytest.raises(RotqError, match="logits are not finite"):
        write(broken)


def test_what_cannot_generate_is_refused():
    with pytest.raises(RotqError, match="EsmForMaskedLM cannot generate text; name a calibration"):
        write(tiny_model("esm", dtype=torch.float32))


@pytest.mark.parametrize(
    ("tokenizer", "bos", "first"),
    [
        (Tokenizer(bos=3, adds_bos=True), "auto", (3,)),
        (Tokenizer(bos=3), "auto", (3,)),
        (Tokenizer(bos=3, eos=4), "no", (3,)),
        (Tokenizer(eos=4), "auto", (4,)),
    ],
    ids=["adds-bos", "has-bos", "no", "eos"],
)
def test_a_window_begins_with_what_begins_or_parts_texts(tokenizer, bos, first):
    assert sampled_first(tokenizer, bos) == first


def test_a_tokenizer_without_either_is_refused():
    with pytest.raises(RotqError, match="neither BOS nor EOS"):
        sampled_first(Tokenizer())


def drawn(model, tmp_path, monkeypatch, masked=False, writes=True, **changes):
    monkeypatch.chdir(tmp_path)
    settings = Calibration(**{"source": "self", "num_samples": 5, "seq_len": 12, **changes})
    write = writer(model) if writes else None
    limits = Limits(embeddings=VOCAB, positions=10)
    return load_windows(settings, Tokenizer(bos=3), limits, masked=masked, write=write)


def test_windows_of_a_recipe(model, tmp_path, monkeypatch):
    windows = drawn(model, tmp_path, monkeypatch, batch_size=2)
    assert [batch.ids_BT.shape[0] for batch in windows.batches] == [2, 2, 1]
    assert windows.ids_BT.shape == (5, 10)
    assert (windows.ids_BT[:, 0] == 3).all()
    assert windows.source == "self"
    assert "cut from 12 to 10" in windows.notes[0]


def test_before_it_is_written_zeros_stand_for_a_text_of_another_digest(
    model, tmp_path, monkeypatch
):
    found = {
        seed: drawn(model, tmp_path, monkeypatch, writes=False, seed=seed).sha256 for seed in (0, 1)
    }
    assert found[0] != found[1]
    assert drawn(model, tmp_path, monkeypatch, writes=False).ids_BT.shape == (5, 10)
    assert drawn(model, tmp_path, monkeypatch).sha256 not in found.values()


def test_a_masked_model_is_refused(model, tmp_path, monkeypatch):
    with pytest.raises(RotqError, match="a masked language model does not write; name a text"):
        drawn(model, tmp_path, monkeypatch, masked=True)


def test_a_file_of_that_name_wins_and_other_commands_refuse_it(model, tmp_path, monkeypatch):
    from rotq.calibration.texts import read_text

    monkeypatch.chdir(tmp_path)
    with pytest.raises(RotqError, match="text self is what a model writes for its own calibration"):
        read_text("self")
    (tmp_path / "self").write_text("some text of a file " * 20)
    windows = drawn(model, tmp_path, monkeypatch)
    assert not torch.equal(windows.ids_BT[0], drawn(model, tmp_path, monkeypatch).ids_BT[1])
    assert windows.tokens == 400


def test_shares_of_a_mix(model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some text of a file " * 20)
    mix = ({"source": "text.txt", "share": 3}, {"source": "self", "share": 1})
    from rotq.recipe import load_recipe

    settings = load_recipe(None, {"calibration.mix": list(mix)}).calibration
    windows = drawn(model, tmp_path, monkeypatch, mix=settings.mix, num_samples=8, batch_size=1)
    assert sum(int(batch.ids_BT[0, 0]) == 3 for batch in windows.batches) >= 2
    assert windows.source == "text.txt, self"
