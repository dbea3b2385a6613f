"""``rotq eval pll`` and how the other commands meet masked language models."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, sequences, write_fasta

import rotq.quantize.publish
from rotq.cli.main import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="rotq")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("esm")
    tiny_model("esm", dtype=torch.float32).save_pretrained(folder)
    esm_tokenizer(folder).save_pretrained(folder)
    write_fasta(folder / "p.fasta", sequences(12))
    return folder


@pytest.fixture(scope="module")
def quantized(model: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        # a fresh process takes seconds; it is tested in tests/checkpoint/test_reload.py
        patch.setattr(rotq.quantize.publish, "check_reload", lambda *_, **__: None)
        yield quantized_folder(model)


def quantized_folder(model: Path) -> Path:
    small = ["--num-samples", "8", "--seq-len", "32", "--set", "weights.group_size=16"]
    turned = ["--set", "rotation.residual=hadamard", "--set", "weights.bits=8"]
    calibration = ["--calibration", model / "p.fasta"]
    out = model.with_name(f"{model.name}-out")
    done = run("quantize", model, *small, *turned, *calibration, "-o", out)
    assert done.exit_code == 0, done.output
    assert "12 sequences" in done.stderr
    return out


def test_figures_as_json(model: Path, quantized: Path) -> None:
    arguments = ["--fasta", model / "p.fasta", "--reference", model, "--json", "--sequences", "3"]
    done = run("eval", "pll", quantized, *arguments, "--representations")
    assert done.exit_code == 0, done.output
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    figures = found["p.fasta"]
    assert figures["sequences"] == 3
    assert figures["masked"] == pytest.approx(figures["reference_masked"], rel=0.02)
    assert 0 < figures["kl"] < 0.01
    # the rotation is taken back before embeddings are compared
    assert figures["embedding_cosine"] > 0.999
    assert figures["contact_correlation"] > 0.99


def test_a_checkpoint_of_an_older_recipe_still_tells_its_basis(
    model: Path, quantized: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(quantized, older)
    recipe = older / "rotq_recipe.yaml"
    recipe.write_text(recipe.read_text() + "\nforgotten: {key: 1}\n")
    one = ["--positions", "2", "--representations", "--json", "--groups", "--reference", model]
    told = [run("eval", "pll", checkpoint, *one) for checkpoint in (quantized, older)]
    assert told[0].exit_code == told[1].exit_code == 0, told[1].output
    assert told[0].stdout == told[1].stdout


def test_groups_as_a_table(model: Path) -> None:
    done = run("eval", "pll", model, "--groups", "--positions", "2")
    assert done.exit_code == 0, done.output
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert {"short-peptide", "transmembrane", "active-site", "disordered"} <= set(rows)
    assert "reference" not in done.stdout
    assert "2 residues masked one at a time in each of 8 sequences" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give either --fasta or --groups"),
        (["--groups", "--fasta", "p.fasta"], 2, "give either --fasta or --groups"),
        (["--groups", "--representations"], 2, "--representations compares with --reference"),
        (["--fasta", "missing.fasta"], 1, "cannot read missing.fasta: No such file"),
    ],
)
def test_wrong_use(model: Path, arguments: list[str], code: int, message: str) -> None:
    done = run("eval", "pll", model, *arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_masked_and_causal_models_are_sent_to_their_commands(model: Path, tmp_path: Path) -> None:
    done = run("eval", "ppl", model, "--text", "pydoc-test")
    assert done.exit_code == 1
    assert "is a masked language model; score it with rotq eval pll" in done.stderr
    out = tmp_path / "out"
    calibration = ["--calibration", model / "p.fasta", "--set", "weights.group_size=16"]
    done = run("quantize", model, *calibration, "-o", out, "--eval-text", "pydoc-test")
    assert done.exit_code == 1
    assert "score it with rotq eval pll" in done.stderr
    assert not out.exists()
    import torch

    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "llama")
    esm_tokenizer(tmp_path / "llama").save_pretrained(tmp_path / "llama")
    done = run("eval", "pll", tmp_path / "llama", "--groups")
    assert done.exit_code == 1
    assert "is no masked language model; use rotq eval ppl" in done.stderr


def test_a_protein_model_wants_proteins(model: Path, tmp_path: Path) -> None:
    small = ["--set", "weights.group_size=16"]
    done = run("quantize", model, "-o", tmp_path / "out", "--calibration", "pydoc", *small)
    assert done.exit_code == 1
    assert "the model reads proteins, so calibration.source must be a file of them" in done.stderr


def test_a_model_is_spread_as_eval_ppl_spreads_it(model: Path) -> None:
    """Not by the commands that take a model's device for one."""
    text = ["--fasta", model / "p.fasta", "--sequences", "2", "--positions", "3", "--json"]
    spread = run("eval", "pll", model, *text, "--device-map", "auto")
    assert spread.exit_code == 0, spread.output
    assert "device map auto: cpu\n" in spread.stderr
    assert "device: " not in spread.stderr
    assert spread.stdout == run("eval", "pll", model, *text, "--device", "cpu").stdout
    for command in ("eval pll", "eval kv"):
        other = ["--groups"] if command == "eval pll" else ["--kv", "k3v3", "--text", "pydoc-test"]
        both = run(*command.split(), model, *other, "--device-map", "auto", "--device", "cpu")
        assert (both.exit_code, "give either --device or --device-map" in both.stderr) == (2, True)
        nowhere = run(*command.split(), model, *other, "--device-map", "nowhere")
        assert nowhere.exit_code == 1
        assert nowhere.stderr.startswith("rotq: error: --device-map nowhere: neither a device")
    for command in ("quantize", "serve-kv", "bench serve", "calibrate-kv"):
        refused = run(*command.split(), model, "--device-map", "auto")
        assert refused.exit_code == 2
        assert refused.stderr.startswith("rotq: error: No such option '--device-map'")
        assert refused.stderr.count("\n") == 1


def test_a_trained_basis_is_not_taken_for_the_drawn_one(
    model: Path, quantized: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(quantized, trained)
    recipe = trained / "rotq_recipe.yaml"
    recipe.write_text(recipe.read_text().replace("method: fixed", "method: optrot"))
    for asked in (
        ["eval", "pll", trained, "--groups", "--reference", model, "--representations"],
        ["embed", trained, "--fasta", model / "p.fasta", "-o", tmp_path / "o.npz"],
    ):
        done = run(*asked)
        assert done.exit_code == 1
        assert "was trained (transform.method=optrot) and is not kept" in done.stderr
