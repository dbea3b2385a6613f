"""`rotq quantize`: what reaches the library, and what comes back to the user."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from job_reports import make_report

from rotq.cli.main import main
from rotq.errors import RotqError
from rotq.ranks import ALONE
from rotq.recipe import Recipe
from rotq.report import Estimate, SiteEstimate


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["quantize", *arguments], prog_name="rotq")


class Pipeline:
    """Stands in for the pipeline and the estimate; keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.effect: Callable[[], None] = lambda: None

    def quantize_model(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        self.effect()
        return make_report()

    def estimate(self, *args: Any, **kwargs: Any) -> Estimate:
        self.calls.append((args, kwargs))
        self.effect()
        site = SiteEstimate(name="a.0.q", shape=(4, 4), bits=3, group_size=-1, bits_per_weight=3.5)
        return Estimate(
            sites=(site,),
            bits_per_weight=3.5,
            output_bytes=7,
            peak_memory_bytes=8,
            scratch_disk_bytes=9,
        )

    @property
    def recipe(self) -> Recipe:
        recipe: Recipe = self.calls[-1][0][1]
        return recipe


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    fake = Pipeline()
    monkeypatch.chdir(tmp_path_factory.mktemp("models"))
    for name in ("some/model", "model", "m"):
        Path(name).mkdir(parents=True)
    for module, name in (("pipeline", "quantize_model"), ("estimate", "estimate")):
        stand_in = SimpleNamespace(**{name: getattr(fake, name)})
        monkeypatch.setitem(sys.modules, f"rotq.quantize.{module}", stand_in)
    return fake


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nsolver: {damping: 0.02}\ncalibration: {seed: 5, seq_len: 64}\n")
    return file


def printed(*arguments: str) -> dict[str, Any]:
    result = run("--print-config", *arguments)
    assert result.exit_code == 0, result.stderr
    return dict(yaml.safe_load(result.stdout))


def test_defaults_reach_the_library(pipeline: Pipeline) -> None:
    result = run("some/model", "-o", "out")
    assert result.exit_code == 0, result.stderr
    (model, recipe, output), options = pipeline.calls[0]
    assert (model.path, recipe, output) == (Path("some/model"), Recipe(), Path("out"))
    options.pop("progress")
    assert options == {
        "device": "auto",
        "dtype": "auto",
        "resume": "auto",
        "overwrite": False,
        "trust_remote_code": False,
        "inputs": {},
        "settled": None,
        "ranks": ALONE,
    }


def test_flags_reach_the_library(pipeline: Pipeline) -> None:
    flags = "--device cuda --dtype bfloat16 --resume required --overwrite --trust-remote-code"
    run("m", "-o", "out", *flags.split())
    options = pipeline.calls[0][1]
    options.pop("progress")
    assert list(options.values()).count(True) == 2
    assert (options["device"], options["dtype"], options["resume"]) == (
        "cuda",
        "bfloat16",
        "required",
    )


def test_flag_over_set_over_file_over_default(recipe_file: Path) -> None:
    config = printed(
        *["-c", str(recipe_file), "--set", "calibration.seq_len=32", "--set", "weights.bits=3"],
        *["--num-samples", "9", "--set", "calibration.num_samples=2"],
    )
    assert config["solver"]["damping"] == 0.02
    assert config["calibration"]["seq_len"] == 32
    assert config["weights"]["bits"] == 3
    assert config["calibration"]["num_samples"] == 9
    assert config["weights"]["group_size"] == Recipe().weights.group_size


def test_seed_sets_draw_and_rotation(recipe_file: Path) -> None:
    config = printed("-c", str(recipe_file), "--seed", "0")
    assert (config["calibration"]["seed"], config["rotation"]["seed"]) == (0, 0)
    config = printed("-c", str(recipe_file), "--seed", "7", "--calibration", "x.txt")
    assert (config["calibration"]["seed"], config["rotation"]["seed"]) == (7, 7)
    assert config["calibration"]["source"] == "x.txt"


def test_printed_config_is_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "again.yaml"
    file.write_text(run("--print-config", "-c", "w3").stdout)
    assert printed("-c", str(file)) == printed("-c", "w3")


def test_preset_by_bare_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert printed("-c", "w3")["name"] == "w3"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "w3.yaml").write_text("name: my-own-w3\n")
    assert printed("-c", "w3")["name"] == "my-own-w3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "w33"], "no recipe w33: neither a file nor a preset; presets: "),
        (["-c", "configs/none.yaml"], "no recipe configs/none.yaml"),
        (["--set", "solver.dampin=1"], "unknown key solver.dampin; did you mean solver.damping?"),
        (["--set", "weights.bits=9"], "weights.bits: 9 is not 1 to 8"),
        (["--set", "weights.bits"], "--set weights.bits: expected KEY=VALUE"),
        (["--set", "kv_cache.bits=4"], "kv_cache.bits is applied at run time, which only output."),
        (["--set", "kv_cache.bits=12"], "kv_cache.bits: 12 is not 2 to 8, or 16"),
        (["--set", "activations.bits=8"], "activations.bits: other loaders of compressed-tensors"),
        (["--num-samples", "0"], "calibration.num_samples: 0 is not at least 1"),
        ([], "Missing option '-o'"),
    ],
)
def test_wrong_usage(pipeline: Pipeline, arguments: list[str], message: str) -> None:
    result = run("model", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not pipeline.calls


def test_error_in_a_recipe_names_its_file(pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("solver: {dampin: 1}\n")
    result = run("model", "-o", "out", "-c", str(file))
    assert result.exit_code == 2
    assert f"{file}: unknown key solver.dampin" in result.stderr


def test_missing_model() -> None:
    result = run("-o", "out")
    assert result.exit_code == 2
    assert "Missing argument 'MODEL'" in result.stderr


def test_recipe_that_does_not_fit_the_model_is_wrong_usage(pipeline: Pipeline) -> None:
    def refuse() -> None:
        raise ValueError("group size 100 does not divide 96 columns")

    pipeline.effect = refuse
    for arguments in (["-o", "out"], ["--dry-run"]):
        result = run("model", *arguments)
        assert result.exit_code == 2
        assert "rotq: error: group size 100 does not divide 96 columns" in result.stderr
    assert isinstance(run("model", "--dry-run", "--debug").exception, ValueError)


def test_dry_run(pipeline: Pipeline) -> None:
    result = run("model", "--dry-run", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "bits per weight  3.500" in result.stdout
    assert pipeline.calls[0][1] == {
        "device": "auto",
        "dtype": "bfloat16",
        "trust_remote_code": False,
        "processes": 1,
    }
    found = json.loads(run("model", "--dry-run", "--json").stdout)
    assert found["output_bytes"] == 7


def test_json_is_the_report(pipeline: Pipeline) -> None:
    result = run("model", "-o", "out", "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(make_report().to_dict()))


def test_table_is_the_default(pipeline: Pipeline) -> None:
    result = run("model", "-o", "out/x")
    assert "5.48 all in" in result.stdout
    assert "out/x" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_with_75(pipeline: Pipeline, number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    pipeline.effect = lambda: os.kill(os.getpid(), number)
    result = run("model", "-o", "out")
    assert result.exit_code == 75
    assert result.stderr == "rotq: error: stopped; the same command continues\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_evaluation_goes_into_report_and_table(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rotq.evaluation.perplexity import Evaluation, Protocol

    asked: dict[str, Any] = {}

    def measure(checkpoint: Path, text: str, protocol: Protocol, **options: Any) -> Evaluation:
        asked.update(checkpoint=checkpoint, text=text, protocol=protocol, **options)
        return Evaluation(
            ppl=30.0, kl=0.25, top1=0.5, reference_ppl=20.0, tokens=9, protocol="windowed"
        )

    monkeypatch.setattr("rotq.cli.eval_text.measure", measure)
    result = run("m", "-o", str(tmp_path), "--eval-text", "pydoc-test", "--eval-windows", "3")
    assert result.exit_code == 0, result.stderr
    assert (asked["checkpoint"], asked["reference"].path) == (tmp_path, Path("m"))
    assert (asked["text"], asked["protocol"]) == ("pydoc-test", Protocol(windows=3))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["evaluation"]["kl"] == 0.25
    assert "30, the original's 20" in result.stdout


def test_errors_keep_their_exit_code(pipeline: Pipeline) -> None:
    def fail() -> None:
        raise RotqError("disk is full")

    pipeline.effect = fail
    result = run("model", "-o", "out")
    assert (result.exit_code, result.stderr) == (1, "rotq: error: disk is full\n")
