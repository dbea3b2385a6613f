"""Models by their name on the hub: what is fetched when, and what is said where it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, hub_server, use_hub
from tiny_models import tiny_model

from rotq.checkpoint.hub import HubName
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.checkpoint.location import locate
from rotq.checkpoint.opening import describe_source, open_source
from rotq.errors import RotqError

REPO = "tiny-org/tiny-llama"
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
OTHERS = {
    "README.md": b"a card",
    "pytorch_model.bin": b"pickled",
    "tf_model.h5": b"others",
    "onnx/model.onnx": b"others",
    "original/consolidated.safetensors": b"others",
    "modeling_tiny.py": b"raise SystemExit('code was run')",
}
"""What lies in a repository, and is not needed."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    for name, content in OTHERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Letters as words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {chr(ord("a") + index): index for index in range(16)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a").save_pretrained(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    with hub_server() as found:
        use_hub(monkeypatch, found.url, cache, offline=False)
        yield found


@pytest.mark.parametrize(
    ("name", "repo", "revision", "file"),
    [
        ("a/b", "a/b", None, None),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None, None),
        ("a/b@v1.0", "a/b", "v1.0", None),
        ("a/b@refs/pr/1", "a/b", "refs/pr/1", None),
        ("a/b/x.Q4_K_M.gguf", "a/b", None, "x.Q4_K_M.gguf"),
        ("a/b@refs/pr/1/q/x.gguf", "a/b", "refs/pr/1", "q/x.gguf"),
        ("a/b@main/q/x.gguf", "a/b", "main", "q/x.gguf"),
    ],
)
def test_names(name: str, repo: str, revision: str | None, file: str | None) -> None:
    assert HubName.parse(name) == HubName(repo=repo, revision=revision, file=file)


OTHER_NAMES = ["gpt2", "./a/b", "/a/b", "a/b/c", "a/b@", "a b/c", "a/..", "-a/b"]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names(name: str) -> None:
    assert HubName.parse(name) is None
    with pytest.raises(RotqError, match=r"no folder and no \.gguf file here, and no hub id"):
        locate(name)


def test_a_folder_of_the_name_wins(
    model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny-org").mkdir()
    model.rename(tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    assert locate(REPO).hub is None
    load_model(REPO)
    assert not hub.requests


def test_only_what_is_needed_is_fetched(model: Path, hub: Hub) -> None:
    commit = hub.add(REPO, model)
    found = locate(REPO)
    assert found.hub is not None
    assert found.hub.commit == commit
    assert hub.fetched() == NEEDED
    assert not found.is_complete
    load_tokenizer(found)
    assert hub.fetched() == NEEDED
    loaded = load_model(found)
    assert hub.fetched() == NEEDED | {"model.safetensors"}
    expected = load_model(model)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


def test_a_second_time_nothing_is_fetched(model: Path, hub: Hub) -> None:
    hub.add(REPO, model)
    load_model(REPO)
    hub.requests.clear()
    load_model(REPO)
    assert not hub.fetched()


def test_a_revision(model: Path, hub: Hub) -> None:
    first = hub.add(REPO, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    second = hub.add(REPO, model)
    assert load_model(f"{REPO}@{first}").config.rms_norm_eps != 0.5
    assert load_model(REPO).config.rms_norm_eps == 0.5
    assert load_model(f"{REPO}@{second}").config.rms_norm_eps == 0.5


def test_shards_are_those_of_the_index(model: Path, hub: Hub) -> None:
    (model / "model.safetensors").unlink()
    tiny_model("llama", dtype=torch.float32).save_pretrained(model, max_shard_size="20KB")
    shards = {file.name for file in model.glob("model-*.safetensors")}
    assert len(shards) > 1
    (model / "model-00009-of-00009.safetensors").write_bytes(b"left over")
    hub.add(REPO, model)
    open_source(REPO)
    assert hub.fetched() == NEEDED | shards | {"model.safetensors.index.json"}


def test_code_comes_where_the_settings_name_it(model: Path, hub: Hub) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_tiny.Tiny"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_tiny.py").write_text("TABLE = 'table.dat'")
    (model / "table.dat").write_text("of the code")
    hub.add(REPO, model)
    locate(REPO)
    assert hub.fetched() == NEEDED | {"modeling_tiny.py", "table.dat"}


def test_a_broken_connection_is_continued(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add(REPO, model)
    hub.breaks["model.safetensors"] = [5000, 7000]
    source = open_source(REPO)
    assert hub.ranges == ["model.safetensors bytes=5000-", "model.safetensors bytes=12000-"]
    expected = open_source(model)
    assert source.fingerprint() == expected.fingerprint()


def test_half_a_file_is_no_file(
    model: Path, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add(REPO, model)
    hub.breaks["model.safetensors"] = [5000, *[0] * 20]
    with pytest.raises(RotqError, match=f"^{REPO}: the connection to {hub.url} broke"):
        load_model(REPO)
    large = [file for file in cache.rglob("*") if file.is_file() and file.stat().st_size >= 5000]
    assert not [file for file in large if file.suffix != ".json" and "tokenizer" not in file.name]
    hub.breaks.clear()
    load_model(REPO)


def test_what_is_refused_is_so_before_the_weights(model: Path, hub: Hub) -> None:
    config = json.loads((model / "config.json").read_text())
    for change, message in (
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
        ({"model_type": "no-such-model"}, "no-such-model"),
    ):
        (model / "config.json").write_text(json.dumps(config | change))
        hub.add(REPO, model)
        with pytest.raises(RotqError, match=message):
            describe_source(REPO)
        with pytest.raises(RotqError, match=message if "model_type" in change else "gptq"):
            load_model(REPO)
    assert "model.safetensors" not in hub.fetched()


def test_headers_stand_in_for_weights(model: Path, hub: Hub) -> None:
    hub.add(REPO, model)
    described, opened = describe_source(REPO), open_source(model)
    assert hub.ranges == ["model.safetensors bytes=0-100000"]
    assert described.names() == opened.names()
    for name in opened.names():
        assert described.shape(name) == opened.shape(name)
    assert described.dtype == opened.dtype


@pytest.mark.parametrize("reader", [open_source, describe_source])
def test_pickled_weights_are_not_fetched_to_be_refused(
    model: Path, hub: Hub, reader: object
) -> None:
    (model / "model.safetensors").unlink()
    hub.add(REPO, model)
    assert callable(reader)
    with pytest.raises(RotqError, match=r"pytorch_model\.bin must be converted to safetensors"):
        reader(REPO)
    assert "pytorch_model.bin" not in hub.fetched()


@pytest.mark.parametrize(
    ("part", "refusal", "message"),
    [
        ("/resolve/", "GatedRepo", "is gated: ask for access at"),
        ("/api/", "RepoNotFound", "is no folder here, and http.* has no such model; for a private"),
        ("/api/", "RevisionNotFound", "has no such revision"),
        ("/api/", 401, "refuses access|no such model"),
        ("/api/", 403, "refuses access"),
        ("/api/", 429, "takes no more requests for now"),
        ("/api/", 503, "not in the hub's cache, and http.* answers 503"),
        ("/api/", 418, "answers 418"),
    ],
)
def test_refusals_in_one_line(
    model: Path, hub: Hub, part: str, refusal: str | int, message: str
) -> None:
    hub.add(REPO, model)
    hub.refusals[part] = refusal
    with pytest.raises(RotqError, match=message) as caught:
        load_model(REPO)
    assert str(caught.value).startswith(REPO)
    assert "\n" not in str(caught.value)


def test_a_name_that_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(
        RotqError, match=r"models/llama is no folder here, and .* has no such model"
    ):
        load_model("models/llama")


def test_no_network(monkeypatch: pytest.MonkeyPatch, cache: Path, model: Path, hub: Hub) -> None:
    hub.add(REPO, model)
    load_model(REPO)
    use_hub(monkeypatch, "http://127.0.0.1:9", cache, offline=False)
    found = locate(REPO)
    assert found.hub is not None
    assert "cannot be reached" in found.hub.unreached
    load_model(found)
    with pytest.raises(RotqError, match=r"^a/b is no folder here and not in the hub's cache, and"):
        load_model("a/b")


def test_weights_are_redirected_to_another_host(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is the hub's, and stays with it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.cdn = hub.url.replace("127.0.0.1", "localhost")
    hub.add(REPO, model)
    source = open_source(locate(REPO))
    assert source.entries["model.norm.weight"].file.stat().st_size
    kinds = {path.split("/")[1]: token for path, token in hub.tokens.items()}
    assert kinds["api"] == kinds["tiny-org"] == "Bearer hf_secret"
    assert kinds["cdn"] is None


def test_the_other_host_is_not_there(model: Path, hub: Hub, cache: Path) -> None:
    hub.cdn = "http://127.0.0.1:9"
    hub.add(REPO, model)
    found = locate(REPO)
    with pytest.raises(RotqError, match=rf"^{REPO}: the connection .* broke") as caught:
        found.fetch_weights()
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize("installed", [True, False])
def test_half_a_file_from_xet_is_no_file(
    model: Path, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    from huggingface_hub import constants, file_download

    def half(*, incomplete_path: Path, **_: object) -> None:
        content = (model / "model.safetensors").read_bytes()
        incomplete_path.write_bytes(content[: len(content) // 2])

    hub.xet, hub.cdn = True, hub.url.replace("127.0.0.1", "localhost")
    hub.add(REPO, model)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not installed)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SHARED_BLOBS", True)
    monkeypatch.setattr(file_download, "is_xet_available", lambda: installed)
    monkeypatch.setattr(file_download, "xet_get", half)
    if not installed:
        # HTTP brings it in its place
        assert open_source(locate(REPO)).entries
        return
    with pytest.raises(RotqError, match=r"model.safetensors came with \d+ of its \d+ bytes"):
        open_source(locate(REPO))
    assert not list(cache.rglob("*.safetensors"))
    monkeypatch.setattr(file_download, "is_xet_available", lambda: False)
    assert load_model(REPO).config.model_type == "llama"


def test_a_full_disk(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, model)
    found = locate(REPO)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("rotq.checkpoint.hub.shutil.disk_usage", lambda _: usage)
    with pytest.raises(RotqError, match=r"GB are to be fetched, and .* GB free; HF_HOME names"):
        load_model(found)
    assert "model.safetensors" not in hub.fetched()


def test_a_disk_that_fails(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    hub.add(REPO, model)
    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", fail)
    with pytest.raises(RotqError, match=r"cannot write to .*cache: No space left on device$"):
        load_model(REPO)


def lay_out(cache: Path, model: Path, names: set[str], commit: str = "0123456789" * 4) -> None:
    """A repository in the cache, as huggingface_hub lays it out, by hand."""
    storage = cache / f"models--{REPO.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    (storage / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(commit)
    for name in names:
        (storage / "blobs" / f"blob-{name}").write_bytes((model / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / f"blob-{name}")


def test_a_cache_laid_out_by_hand(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", cache, offline=True)
    lay_out(cache, model, NEEDED | {"model.safetensors"})
    found = locate(REPO)
    assert found.hub is not None
    assert found.hub.unreached == "HF_HUB_OFFLINE is set"
    assert (found.hub.commit, found.is_complete) == ("0123456789" * 4, True)
    assert open_source(REPO).fingerprint() == open_source(model).fingerprint()
    load_model(f"{REPO}@{found.hub.commit}")
    load_tokenizer(REPO)


def test_half_a_cache_without_network(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", cache, offline=True)
    with pytest.raises(RotqError, match="not in the hub's cache, and HF_HUB_OFFLINE is set"):
        load_model(REPO)
    lay_out(cache, model, NEEDED)
    for reader in (load_model, open_source, describe_source):
        with pytest.raises(RotqError, match=r"model\.safetensors"):
            reader(REPO)


def test_files_of_other_programs_decide_nothing(model: Path, hub: Hub) -> None:
    hub.add(REPO, model)
    source = open_source(REPO)
    before = source.deciding_files()
    assert set(before) == NEEDED - {"config.json"}
    (source.path / "notes.json").write_text("{}")
    assert source.deciding_files() == before
