"""``rotq eval tasks``: figures are those of lm-eval run by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tiny_served import byte_tokenizer, served_model

from rotq.cli.main import main
from rotq.evaluation.task_files import load_tasks

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.tasks")

CHOICES = [
    {"query": f"Question: what is {n} and {n}?\n", "choices": [str(n), str(2 * n)], "gold": n % 2}
    for n in range(6)
]
ENDINGS = [{"context": f"The number {n} is called", "continuation": "so"} for n in range(5)]

BY_HAND: dict[str, dict[str, Any]] = {
    "sums": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}Answer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "endings": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
}
WRITES = {
    "task": "writes",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
DRAWS = 2000
FILES = ["--task-files", "files"]
BOTH = ["--tasks", "sums,endings", *FILES]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", "tasks", *map(str, arguments)], prog_name="rotq")


def scores(*arguments: str | Path) -> dict[str, dict[str, Any]]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["tasks"]
    return {
        one["task"]: {metric["name"]: metric for metric in one["metrics"]} | {"rows": one["rows"]}
        for one in found
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``files`` with the rows of two tasks and the definition of one that writes."""
    folder = tmp_path_factory.mktemp("tasks")
    served_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "files").mkdir()
    for name, rows in (("sums", CHOICES), ("endings", ENDINGS)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"files/{name}.jsonl").write_text(lines)
    rows_of = {"dataset_kwargs": {"data_files": {"test": str(folder / "files/endings.jsonl")}}}
    (folder / "files/writes.yaml").write_text(yaml.safe_dump(WRITES | rows_of))
    return folder


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder)
    # the harness would start a process on each core for a bootstrap
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    monkeypatch.setattr("rotq.evaluation.tasks.BOOTSTRAP", DRAWS)
    # by hand it asks pip and the machine for a page of facts that nothing here reads
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda *_: None)


def by_hand(folder: Path, name: str, limit: int | None) -> dict[str, Any]:
    """lm-eval's own loading, with a definition that is written out here."""
    from lm_eval.tasks import TaskManager

    task = BY_HAND[name] | {"task": f"{name}_by_hand", "dataset_path": "json"}
    task |= {"test_split": "test"}
    task["dataset_kwargs"] = {"data_files": {"test": str(folder / f"files/{name}.jsonl")}}
    arguments = {"pretrained": str(folder / "model"), "dtype": "float32"}
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        device="cpu",
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=DRAWS,
    )
    return dict(found["results"][f"{name}_by_hand"])


@pytest.mark.filterwarnings("ignore")  # of the harness's own loading
@pytest.mark.parametrize(("name", "limit"), [("sums", None), ("sums", 3), ("endings", 4)])
def test_figures_are_those_of_the_harness_by_hand(folder: Path, name: str, limit: int) -> None:
    chosen = [] if limit is None else ["--limit", str(limit)]
    ours = scores("model", "--tasks", name, *FILES, *chosen)[name]
    theirs = by_hand(folder, name, limit)
    assert ours.pop("rows") == (limit or len(CHOICES))
    assert {f"{metric},none" for metric in ours} <= theirs.keys()
    for metric, found in ours.items():
        assert found["value"] == theirs[f"{metric},none"]
        assert found["stderr"] == theirs[f"{metric}_stderr,none"]


def test_a_table_has_standard_errors() -> None:
    done = run("model", *BOTH, "--limit", "4")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["task", "metric", "value", "std.", "error", "rows", "shots"]
    assert lines[2][:2] == ["sums", "acc"]
    assert all(float(line[3]) >= 0 for line in lines[2:6])
    assert "scored by  lm-eval" in done.stdout
    assert "bootstrapping" not in done.stdout


def test_a_packed_cache_moves_them_and_says_so() -> None:
    done = run("model", *BOTH, "--kv", "turboquant", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["kv"]["preset"] == "turboquant"
    assert min(found["kv"]["attention_error"]) > 0
    whole, packed = scores("model", *BOTH), scores("model", *BOTH, "--kv", "turboquant")
    assert whole["endings"]["perplexity"]["value"] != packed["endings"]["perplexity"]["value"]


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    one = scores("model", *BOTH, "--kv", "turboquant")
    many = scores("model", *BOTH, "--kv", "turboquant", "--batch-size", "4")
    value = one["endings"]["perplexity"]["value"]
    assert many["endings"]["perplexity"]["value"] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("kv", [[], ["--kv", "turboquant"]], ids=["whole", "packed"])
def test_what_generates_has_a_cache_of_its_own(kv: list[str]) -> None:
    found = scores("model", "--tasks", "writes", *FILES, *kv, "--batch-size", "2", "--limit", "4")
    assert found["writes"]["exact_match"]["value"] == 0.0
    assert found["writes"]["rows"] == 4


def test_a_file_stands_for_the_harness_task_of_its_name(tmp_path: Path) -> None:
    """Rows are the file's; prompts are those of lm-eval's own definition."""
    file = tmp_path / "arc_easy.jsonl"
    file.write_text(json.dumps({"query": "Question: Why?", "choices": ["a", "b"], "gold": 1}))
    [task] = load_tasks(["arc_easy"], tmp_path)
    row = task.test_docs()[0]
    assert (task.doc_to_text(row), task.doc_to_target(row)) == ("Question: Why?\nAnswer:", 1)
    assert task.doc_to_choice(row) == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["model", "--tasks", "sum", *FILES], 2, "no task 'sum'; near: sums"),
        (["model", "--tasks", "sums", "--task-files", "none"], 2, "does not exist"),
        (["model", *BOTH, "--kv", "k9v9"], 2, "no KV preset 'k9v9'"),
        (["model", *BOTH, "--kv", "k3v3,k4v3"], 2, "give one preset"),
        (["model", *BOTH, "--kv-calibration", "x"], 2, "--kv-calibration without --kv"),
        (["none", *BOTH], 1, "none does not exist"),
        (["model", "--tasks", "odd", *FILES], 1, "neither query, choices and gold"),
        (["model", "--tasks", "broken", *FILES], 1, "no JSON lines"),
    ],
)
def test_wrong_use(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    # reading all of the harness's definitions takes ten seconds
    own = lm_eval.tasks.TaskManager(include_path=str(folder / "files"), include_defaults=False)
    monkeypatch.setattr("rotq.evaluation.task_files._manager", lambda *_: own)
    (folder / "files/odd.jsonl").write_text('{"text": "a"}\n')
    (folder / "files/broken.jsonl").write_text("{")
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    done = run("model", *BOTH)
    assert done.exit_code == 1
    assert "pip install 'rotq[tasks]'" in done.stderr
