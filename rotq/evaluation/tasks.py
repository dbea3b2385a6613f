"""Downstream tasks through lm-evaluation-harness, on any model that rotq loads.

The harness makes the prompts, scores and standard errors; a model is handed to it as it is, so that
figures are those of ``lm-eval --model hf`` on the same checkpoint. A task's rows come from the hub,
or from a file in the form of llm-foundry's JSON lines:

    {"query", "choices", "gold"}        multiple choice: log p of each choice behind the query
    {"context", "continuation"}         log p of the continuation, and whether it is the most likely

With a packed cache log-likelihoods are those of stepwise decoding (see ``quantized_history``): the
harness pads behind the text, which nothing before it sees. What generates has a ``PackedCache``.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rotq.errors import RotqError, told
from rotq.evaluation.quantized_history import QuantizedHistory
from rotq.kv.calibration.file import KVCalibration
from rotq.models.attention.replaced import replaced_attention

FILE_SUFFIX = ".jsonl"
BOOTSTRAP = 100_000
"""Draws behind the standard error of a perplexity: the harness's own number."""
_SEED = 1234
_CHOICES = {"query", "choices", "gold"}
_CONTINUATION = {"context", "continuation"}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a task."""

    name: str
    """The harness's, with its filter where there is one: ``exact_match,strict-match``."""
    value: float
    stderr: float | None
    """Standard error; None where the harness has none."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A task's figures."""

    task: str
    rows: int
    """That were scored."""
    shots: int
    version: str
    """Of the task's definition, as the harness counts them."""
    metrics: tuple[Metric, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"metrics": [asdict(metric) for metric in self.metrics]}


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
        with told(what), _quiet():
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


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
    history: QuantizedHistory | None = None,
    calibration: KVCalibration | None = None,
) -> list[TaskScore]:
    """Figures of each task, and of each group.

    Args:
        model: A causal language model of transformers, on any device.
        tokenizer: Its own.
        tasks: From ``load_tasks``.
        limit: Rows of each task, from its start; None takes all.
        shots: Examples in front of each row; None takes each task's own number.
        batch_size: Rows of a forward pass.
        history: What reads keys and values in place of the model's attention; None leaves it.
        calibration: Behind ``history``, for the caches of what generates.

    Raises:
        RotqError: the harness cannot score the model.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    served = _served(model, tokenizer, batch_size, history, calibration)
    with told("lm-eval"), _quiet():
        wanted = TaskManager(include_defaults=False).load(list(tasks))
        for task in wanted["tasks"].values():
            _set_shots(task, shots)
        _seed()
        found = evaluate(
            lm=served,
            task_dict=wanted,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    return [
        TaskScore(
            task=name,
            rows=int(found["n-samples"][name]["effective"]) if name in found["n-samples"] else 0,
            shots=int(found["n-shot"].get(name, 0)),
            version=str(found["versions"].get(name, "")),
            metrics=tuple(_metrics(values)),
        )
        for name, values in found["results"].items()
    ]


def _set_shots(task: Any, shots: int | None) -> None:
    """As the harness does: a task whose definition says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def _seed() -> None:
    """The generators that the harness seeds, with its own seeds."""
    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _served(
    model: Any,
    tokenizer: Any,
    batch_size: int,
    history: QuantizedHistory | None,
    calibration: KVCalibration | None,
) -> Any:
    """The model as the harness takes one."""
    from lm_eval.models.huggingface import HFLM

    from rotq.kv.cache.packed_cache import PackedCache

    class Packed(HFLM):  # type: ignore[misc]
        """Its keys and values are read from codes."""

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            with replaced_attention(self.model, history):  # type: ignore[arg-type]
                return super()._model_call(inps, *args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            cache = PackedCache(self.model, calibration)  # type: ignore[arg-type]
            return super()._model_generate(*args, past_key_values=cache, **kwargs)

    kind = HFLM if history is None else Packed
    with told("lm-eval"), _quiet():
        return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextmanager
def _quiet() -> Iterator[None]:
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


def _metrics(values: Mapping[str, Any]) -> Iterable[Metric]:
    """Of the harness's row, whose keys are ``acc,none`` and ``acc_stderr,none``."""
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or isinstance(value, str):
            continue
        stderr = values.get(f"{name}_stderr,{filtered}")
        yield Metric(
            name=name if filtered == "none" else key,
            value=float(value),
            stderr=None if stderr is None or isinstance(stderr, str) else float(stderr),
        )
