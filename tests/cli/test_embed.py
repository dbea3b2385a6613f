"""``rotq embed``: the original model's embeddings, also of rotated checkpoints; files; resuming."""

import bz2
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, sequences, write_fasta

import rotq.cli.embed
import rotq.evaluation.embeddings
import rotq.quantize.publish
from rotq.cli.main import main

PROTEINS = sequences(9)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="rotq")


def embed(*arguments: str | Path) -> Result:
    done = run("embed", *arguments)
    assert done.exit_code == 0, done.output
    return done


def arrays(file: Path) -> dict[str, Any]:
    with np.load(file) as archive:
        return {name: archive[name] for name in archive}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("fasta") / "p.fasta", PROTEINS)


@pytest.fixture(scope="module", params=["esm", "esmc", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With gains and biases of its own in every norm."""
    folder = tmp_path_factory.mktemp(request.param)
    found = tiny_model(request.param, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.rand(parameter.shape, generator=generator)
    found.save_pretrained(folder)
    esm_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rotated(model: Path, fasta: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        # a fresh process takes seconds; it is tested in tests/checkpoint/test_reload.py
        patch.setattr(rotq.quantize.publish, "check_reload", lambda *_, **__: None)
        out = model.with_name(f"{model.name}-out")
        small = ["--num-samples", "8", "--seq-len", "32", "--set", "weights.group_size=16"]
        turned = ["--set", "rotation.residual=hadamard", "--set", "weights.bits=8"]
        turned += ["--set", "output.format=rotq"]
        done = run("quantize", model, *small, *turned, "--calibration", fasta, "-o", out)
        assert done.exit_code == 0, done.output
        yield out


def plain(folder: Path, layer: int) -> dict[str, Any]:
    """Hidden states one protein at a time, special tokens cut off."""
    import rotq

    model = rotq.load(folder)
    tokenizer = esm_tokenizer(folder)
    found = {}
    for number, sequence in enumerate(PROTEINS):
        ids = torch.tensor([tokenizer(sequence)["input_ids"]])
        with torch.inference_mode():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        found[f"s{number}"] = states[layer][0, 1:-1].numpy()
    return found


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_embeddings_are_the_models_own(
    model: Path, fasta: Path, tmp_path: Path, layer: int
) -> None:
    out = tmp_path / "out.npz"
    embed(model, "--fasta", fasta, "-o", out, "--pooling", "residue", "--layer", str(layer))
    embed(model, "--fasta", fasta, "-o", tmp_path / "mean.npz", "--layer", str(layer))
    expected = plain(model, layer)
    found, mean = arrays(out), arrays(tmp_path / "mean.npz")
    assert list(found) == list(mean) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(mean[name], array.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_a_rotated_checkpoint_gives_the_original_basis(
    model: Path, rotated: Path, fasta: Path, tmp_path: Path, layer: int
) -> None:
    out = tmp_path / "out.npz"
    reference = ["--reference", model] if layer in (-1, 2) else []  # of two blocks
    embed(rotated, "--fasta", fasta, "-o", out, "--layer", str(layer), *reference)
    found = arrays(out)
    for name, array in plain(model, layer).items():
        mean = array.mean(0)
        assert np.linalg.norm(found[name] - mean) < 0.03 * np.linalg.norm(mean)


def test_the_last_layer_of_a_rotated_checkpoint_needs_the_norm(
    rotated: Path, fasta: Path, tmp_path: Path
) -> None:
    done = run("embed", rotated, "--fasta", fasta, "-o", tmp_path / "out.npz")
    assert done.exit_code == 1
    assert "the last layer needs --reference, the original model" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_model("esm", dtype=torch.float32).save_pretrained(folder)
    esm_tokenizer(folder).save_pretrained(folder)
    return folder


def test_hdf5_holds_the_same(esm: Path, fasta: Path, tmp_path: Path) -> None:
    facts = json.loads(embed(esm, "--fasta", fasta, "-o", tmp_path / "o.h5", "--json").stdout)
    assert facts["proteins"] == 9
    assert facts["residues"] == sum(map(len, PROTEINS))
    embed(esm, "--fasta", fasta, "-o", tmp_path / "o.npz")
    archive = arrays(tmp_path / "o.npz")
    with h5py.File(tmp_path / "o.h5") as stored:
        assert sorted(stored) == sorted(archive)
        for name in archive:
            np.testing.assert_array_equal(stored[name][:], archive[name])


@pytest.mark.parametrize("misses", [True, False])
def test_a_cpu_without_products_of_bytes_is_told(
    esm: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, misses: bool
) -> None:
    monkeypatch.setattr("rotq.layers.quant_linear.multiply_integers", lambda _: misses)
    said = embed(esm, "--fasta", fasta, "-o", tmp_path / "o.npz").stderr
    assert ("this CPU multiplies no 8-bit integers" in said) is misses


@pytest.mark.parametrize("ending", ["npz", "h5"])
def test_a_run_goes_on_where_it_stopped(
    esm: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(rotq.cli.embed, "GROUP", 4)
    out = tmp_path / f"o.{ending}"
    groups: list[int] = []
    stop = [True]
    whole = rotq.evaluation.embeddings.embed

    def stopping(model: Any, codec: Any, records: Any, *rest: Any) -> Any:
        if groups and stop.pop():
            raise KeyboardInterrupt
        groups.append(len(records))
        return whole(model, codec, records, *rest)

    monkeypatch.setattr(rotq.evaluation.embeddings, "embed", stopping)
    assert run("embed", esm, "--fasta", fasta, "-o", out).exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{out.name}.partial"]
    other = run("embed", esm, "--fasta", fasta, "-o", out, "--layer", "0")
    assert other.exit_code == 1
    assert "is no unfinished run of this command" in other.stderr
    stop[:] = [False, False]
    embed(esm, "--fasta", fasta, "-o", out)
    assert groups == [4, 4, 1]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    again = tmp_path / f"again.{ending}"
    stop[:] = [False] * 3
    embed(esm, "--fasta", fasta, "-o", again)
    if ending == "npz":
        first, second = arrays(out), arrays(again)
        assert list(first) == list(second)
        assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("ending", ["npz", "h5"])
def test_files_of_others_stay(esm: Path, fasta: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"o.{ending}"
    if ending == "npz":
        np.savez(out, mine=np.zeros(3))
    else:
        with h5py.File(out, "w") as stored:
            stored["mine"] = np.zeros(3)
    before = out.read_bytes()
    done = run("embed", esm, "--fasta", fasta, "-o", out)
    assert done.exit_code == 1
    assert "exists and is not rotq's" in done.stderr
    assert out.read_bytes() == before
    out.unlink()
    for _ in range(2):
        embed(esm, "--fasta", fasta, "-o", out)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (">a\nMKT\n>a\nMKV\n", [], "record 2 has the name a again; embeddings are found by name"),
        (">\nMKT\n", [], "record 1 has no name"),
        (">a\nMKT\n", ["--layer", "9"], "layer 9: the model has hidden states -"),
        (">a\nMKT\n", ["-o", "o.pt"], "o.pt: embeddings are written as .npz or .h5"),
    ],
    ids=["twice", "nameless", "layer", "ending"],
)
def test_what_is_refused(
    esm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "p.fasta").write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    done = run("embed", esm, "--fasta", "p.fasta", "-o", "o.npz", *arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.fasta"]


def test_proteins_from_standard_input(model: Path, tmp_path: Path, fasta: Path) -> None:
    packed = bz2.compress(fasta.read_bytes())
    arguments = ["embed", model, "--fasta", "-", "-o", tmp_path / "o.npz"]
    done = CliRunner().invoke(main, list(map(str, arguments)), input=packed)
    assert done.exit_code == 0, done.output
    assert list(arrays(tmp_path / "o.npz")) == [f"s{n}" for n in range(len(PROTEINS))]
