"""`rotq quantize` from end to end: bad input, a full disk, and signals in mid-job."""

import json
import resource
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from fork_server import Fork, ForkServer
from safetensors.torch import load_file, save_file
from tiny_jobs import SMALL, W3, files_of, make_checkpoint, quantize
from transformers import AutoModelForCausalLM

from rotq.cli.main import main

DAMAGED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a job that nothing happened to."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    result = quantize(model, *W3, "-o", output)
    assert result.exit_code == 0, result.stderr
    return output


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The model, to be damaged."""
    shutil.copytree(model, tmp_path / "copy")
    return tmp_path / "copy"


def assert_fails(result: Result, exit_code: int, *parts: str) -> None:
    """One line on stderr with each of ``parts``, nothing on stdout."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("rotq: error: ")]
    assert result.exit_code == exit_code, result.stderr
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "unexpected" not in errors[0]
    for part in parts:
        assert part in errors[0]
    assert result.stdout == ""


def test_checkpoint_is_whole(unbroken: Path, model: Path) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(unbroken), "--verify", "--json"])
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["report"]["recipe"] == found["recipe"]
    assert len(found["report"]["layers"]) == 21
    assert len(found["report"]["blocks"]) == 3
    assert found["verified_files"] >= 5
    assert found["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not unbroken.with_name("out.partial").exists()


def test_checkpoint_is_close_to_the_model(unbroken: Path, model: Path) -> None:
    arguments = ["eval", "ppl", unbroken, "--reference", model, "--text", "pydoc-test", "--json"]
    short = ["--windows", "2", "--seq-len", "64"]
    scored = CliRunner().invoke(main, [*map(str, arguments), *short])
    assert scored.exit_code == 0, scored.stderr
    found = json.loads(scored.stdout)
    assert 0 < found["kl"] < 0.1
    assert found["ppl"] == pytest.approx(found["reference_ppl"], rel=0.05)


def test_a_changed_byte_is_found(unbroken: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(unbroken, changed)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    result = CliRunner().invoke(main, ["inspect", str(changed), "--verify"])
    assert_fails(result, 3, "model.safetensors was changed")


def test_missing_model(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert_fails(quantize(missing, "-o", tmp_path / "out"), 1, str(missing))
    assert_fails(quantize(missing, "--dry-run"), 1, str(missing))


def test_weights_in_float64(copy: Path, tmp_path: Path) -> None:
    """The job computes in fp32 and says so; asked for by name, it stores so too."""
    wide = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float64)
    wide.save_pretrained(copy)
    assert {tensor.dtype for tensor in load_file(copy / "model.safetensors").values()} == {
        torch.float64
    }
    small = ["-c", "gptq", "--num-samples", "2", "--seq-len", "32"]
    for name, more in (("auto", []), ("named", ["--dtype", "float32"])):
        result = quantize(copy, *small, "-o", tmp_path / name, *more)
        assert result.exit_code == 0, result.stderr
        assert "is in float64; the job computes in float32" in result.stderr
        stored = "weights that stay dense are stored in bfloat16; --dtype float32 keeps them"
        assert (stored in result.stderr) == (name == "auto")
    auto, named = (load_file(tmp_path / n / "model.safetensors") for n in ("auto", "named"))
    assert torch.float64 not in {tensor.dtype for tensor in (auto | named).values()}
    embedding = "model.embed_tokens.weight"
    assert auto[embedding].dtype == torch.bfloat16
    assert torch.equal(auto[embedding], named[embedding].bfloat16())


def test_unsupported_family(copy: Path, tmp_path: Path) -> None:
    config = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_layer": 1}
    (copy / "config.json").write_text(json.dumps(config))
    result = quantize(copy, "-c", "w3-channel", "--dry-run")
    assert_fails(result, 1, "BloomForCausalLM", "docs/models.md", "rotation.residual=none")


def test_unknown_model_type(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "nonesuch"}')
    assert_fails(quantize(copy, "-c", "w3", "-o", tmp_path / "out"), 1, "nonesuch")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(copy: Path, tmp_path: Path, value: float) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors[DAMAGED][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    result = quantize(copy, *W3, "-o", tmp_path / "out")
    assert_fails(result, 1, DAMAGED)
    assert not (tmp_path / "out").exists()


def test_truncated_weights(copy: Path, tmp_path: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    result = quantize(copy, *W3, "-o", tmp_path / "out")
    assert_fails(result, 1, "model.safetensors")


@pytest.mark.parametrize("damage", ["length", "json", "offsets", "dtype"])
def test_tampered_header(copy: Path, tmp_path: Path, damage: str) -> None:
    file = copy / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    if damage == "offsets":
        header[DAMAGED]["data_offsets"][1] += 4
    elif damage == "dtype":
        header[DAMAGED]["dtype"] = "F16"
    text = json.dumps(header).encode()
    if damage == "json":
        text = b"!" + text[1:]
    size = 2**60 if damage == "length" else len(text)
    file.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])
    result = quantize(copy, *W3, "-o", tmp_path / "out")
    assert_fails(result, 1, "model.safetensors")


def test_text_too_short(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    result = quantize(model, *W3, "--calibration", text, "-o", tmp_path / "out")
    assert_fails(result, 1, f"calibration text {text} is too short", "at least 66")


def test_text_that_is_not_utf8(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"x" * 500 + b"\xff")
    result = quantize(model, *W3, "--calibration", text, "-o", tmp_path / "out")
    assert_fails(result, 1, str(text), "not UTF-8: byte 0xff at offset 500")


def test_unknown_recipe_key(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("solver: {dampin: 0.1}\n")
    result = quantize(model, "-c", recipe, "-o", tmp_path / "out")
    assert_fails(result, 2, str(recipe), "did you mean solver.damping?")


@pytest.mark.parametrize("ending", [["--dry-run"], [*SMALL, "-o", "OUT"]])
def test_group_size_that_does_not_divide(model: Path, tmp_path: Path, ending: list[str]) -> None:
    ending = [str(tmp_path / "out") if part == "OUT" else part for part in ending]
    result = quantize(model, "--set", "weights.group_size=64", *ending)
    assert_fails(
        result, 2, "model.layers.0.self_attn.q_proj", "group size 64", "16, 24, 32, 48, 96"
    )


def test_output_that_exists(model: Path, unbroken: Path, tmp_path: Path) -> None:
    before = files_of(unbroken)
    result = quantize(model, "-c", "w4", *SMALL, "-o", unbroken)
    assert_fails(result, 1, f"{unbroken} exists", "--overwrite")
    assert files_of(unbroken) == before


def test_overwrite_replaces_the_output(model: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = quantize(model, "-c", "rtn", *SMALL, "-o", output)
    assert first.exit_code == 0, first.stderr
    result = quantize(model, *W3, "-o", output, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert files_of(output) == files_of(unbroken)


@pytest.fixture
def _small_files() -> Iterator[None]:
    """No file of this process may grow beyond 10 kB: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_small_files")
def test_full_disk(model: Path, tmp_path: Path) -> None:
    result = quantize(model, *W3, "-o", tmp_path / "out")
    assert_fails(result, 1, "cannot write")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors*"))


def start(server: ForkServer, model: Path, output: Path) -> Fork:
    """`rotq quantize` in a process of its own, that has finished its first block."""
    process = server.start("rotq", ["quantize", *map(str, (model, *W3, "-o", output))])
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("block 1/3"):
            return process
    process.communicate()
    raise AssertionError(f"the job ended before its first block: {''.join(seen)}")


def assert_continues(model: Path, output: Path, unbroken: Path) -> None:
    """The job goes on after its first block, and ends with the same bytes."""
    result = quantize(model, *W3, "-o", output, "--resume", "required")
    assert result.exit_code == 0, result.stderr
    blocks = [line for line in result.stderr.splitlines() if line.startswith("block ")]
    assert "worst" not in blocks[0], "the first block was solved again"
    assert "worst" in blocks[2]
    assert files_of(output) == files_of(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_job_continues(
    model: Path,
    unbroken: Path,
    tmp_path: Path,
    number: signal.Signals,
    fresh_processes: ForkServer,
) -> None:
    output = tmp_path / "out"
    process = start(fresh_processes, model, output)
    process.send_signal(number)
    out, err = process.communicate()
    assert out == ""
    assert process.returncode == 75
    assert "rotq: error: stopped" in err
    assert f"{output}.partial" in err
    assert not output.exists()
    assert_continues(model, output, unbroken)


@pytest.fixture(scope="module")
def partial(
    model: Path, tmp_path_factory: pytest.TempPathFactory, fresh_processes: ForkServer
) -> Path:
    """The folder of a job that was killed after its first block."""
    output = tmp_path_factory.mktemp("killed") / "out"
    process = start(fresh_processes, model, output)
    process.kill()
    out, _ = process.communicate()
    assert out == ""
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    return output.with_name("out.partial")


@pytest.fixture
def killed(partial: Path, tmp_path: Path) -> Path:
    """An output whose job was killed."""
    shutil.copytree(partial, tmp_path / "out.partial")
    return tmp_path / "out"


def test_killed_job_continues(model: Path, unbroken: Path, killed: Path) -> None:
    assert_continues(model, killed, unbroken)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "1"], "recipe"),
        (["--set", "solver.damping=0.02"], "recipe"),
        (["--dtype", "bfloat16"], "dtype"),
    ],
)
def test_job_of_another_recipe_is_not_continued(
    model: Path, killed: Path, change: list[str], named: str
) -> None:
    before = sorted(killed.with_name("out.partial").iterdir())
    result = quantize(model, *W3, "-o", killed, *change)
    assert_fails(result, 1, f"another {named}", "--resume never")
    assert sorted(killed.with_name("out.partial").iterdir()) == before


def test_job_of_another_model_is_not_continued(copy: Path, killed: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors[DAMAGED][3, 5] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    result = quantize(copy, *W3, "-o", killed)
    assert_fails(result, 1, "another model")


def test_resume_never_starts_again(model: Path, unbroken: Path, killed: Path) -> None:
    result = quantize(model, *W3, "-o", killed, "--resume", "never")
    assert result.exit_code == 0, result.stderr
    blocks = [line for line in result.stderr.splitlines() if line.startswith("block ")]
    assert all("worst" in line for line in blocks)
    assert files_of(killed) == files_of(unbroken)


def test_nothing_to_resume(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = quantize(model, *W3, "-o", output, "--resume", "required")
    assert_fails(result, 1, f"nothing to resume in {output}.partial")
    assert not output.with_name("out.partial").exists()
