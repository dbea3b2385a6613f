"""Tasks of lm-evaluation-harness: its own, those of YAML files, and rows of JSON lines.

A file is in the form of llm-foundry's, and stands for the harness's task of its name:

    {"query", "choices", "gold"}        multiple choice: log p of each choice behind the query
    {"context", "continuation"}         log p of the continuation, and whether it is the most likely
"""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from rotq.errors import RotqError, told

FILE_SUFFIX = ".jsonl"
_CHOICES = {"query", "choices", "gold"}
_CONTINUATION = {"context", "continuation"}


def harness_version() -> str:
    """Of lm-eval.

    Raises:
        RotqError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise RotqError(
            "tasks need lm-eval; install the extra: pip install 'rotq[tasks]'"
        ) from None
    return version("lm_eval")


def load_tasks(names: Sequence[str], folder: Path | None) -> list[Any]:
    """Tasks of the harness, their rows read.

    Args:
        names: Of its tasks, groups and tags; or of files ``NAME.jsonl`` in ``folder``.
        folder: Also searched for the harness's own YAML definitions; None for its tasks alone.

    Raises:
        ValueError: no such task; says the nearest.
        RotqError: a file is not in the form of one, or rows cannot be fetched.
    """
    files = {} if folder is None else {file.stem: file for file in folder.glob(f"*{FILE_SUFFIX}")}
    manager = _manager(folder, [name for name in names if name not in files])
    found: list[Any] = []
    for name in names:
        if name not in files and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*files, *manager.all_tasks], n=3)
            raise ValueError(f"no task {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
        spec = definition(name, files[name]) if name in files else name
        what = f"task {name}: its rows cannot be read (--task-files takes files)"
        with told(what), quiet():
            loaded = manager.load([spec])
        found += [*loaded["groups"].values()] or [*loaded["tasks"].values()]
    return found


def _manager(folder: Path | None, names: Sequence[str]) -> Any:
    """What knows the definitions of a folder, and the harness's thousands where one is needed."""
    from lm_eval.tasks import TaskManager

    own = None if folder is None else str(folder)
    manager = TaskManager(include_path=own, include_defaults=False)
    if all(name in manager.all_tasks for name in names):
        return manager
    return TaskManager(include_path=own)


def definition(name: str, file: Path) -> dict[str, Any]:
    """A task of the harness over a file of JSON lines, with the prompts of its own task.

    Raises:
        RotqError: the file has neither form.
    """
    keys = _first_row(file).keys()
    shared = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "metadata": {"version": "file"},
    }
    if keys >= _CHOICES:
        return shared | {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query.strip()}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [_metric("acc"), _metric("acc_norm")],
        }
    if keys >= _CONTINUATION:
        return shared | {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}",
            "target_delimiter": "",
            "metric_list": [_metric("perplexity", "perplexity"), _metric("acc")],
        }
    forms = "neither query, choices and gold nor context and continuation"
    raise RotqError(f"{file}: its rows have {forms}")


def _metric(name: str, aggregation: str = "mean") -> dict[str, Any]:
    higher = aggregation == "mean"
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


def _first_row(file: Path) -> Mapping[str, Any]:
    try:
        with open(file, encoding="utf-8") as lines:
            row = json.loads(lines.readline() or "{}")
    except (OSError, ValueError) as error:
        raise RotqError(f"{file}: no JSON lines ({error})") from None
    if not isinstance(row, dict):
        raise RotqError(f"{file}: a row is no JSON object")
    return row


@contextmanager
def quiet() -> Iterator[None]:
    """The harness tells its errors only, and its progress where somebody looks.

    It prints on stdout what it is doing, and warns of what is meant here: a model that is made.
    """
    from datasets.utils import disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    unseen = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
    try:
        with redirect_stdout(StringIO()), unseen:
            yield
    finally:
        enable_progress_bars()
        logger.setLevel(level)
