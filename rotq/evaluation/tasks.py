"""Downstream tasks through lm-evaluation-harness, on any model that rotq loads.

The harness makes the prompts, scores and standard errors; a model is handed to it as it is, so that
figures are those of ``lm-eval --model hf`` on the same checkpoint. ``task_files`` has the tasks.

With a packed cache log-likelihoods are those of stepwise decoding (see ``quantized_history``): the
harness pads behind the text, which nothing before it sees. What generates has a ``PackedCache``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from rotq.errors import told
from rotq.evaluation.quantized_history import QuantizedHistory
from rotq.evaluation.task_files import quiet
from rotq.kv.calibration.file import KVCalibration
from rotq.models.attention.replaced import replaced_attention
from rotq.ranks import ALONE, Ranks

T = TypeVar("T")

BOOTSTRAP = 100_000
"""Draws behind the standard error of a perplexity: the harness's own number."""
_SEED = 1234


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
    ranks: Ranks = ALONE,
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
        ranks: The processes that call this with the same arguments, and share the questions to
            the model; each has all answers, and the same figures.

    Raises:
        RotqError: the harness cannot score the model.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    served = _served(model, tokenizer, batch_size, history, calibration, ranks)
    with told("lm-eval"), quiet():
        wanted = TaskManager(include_defaults=False).load(list(tasks))
        for task in wanted["tasks"].values():
            _set_shots(task, shots)
        _seed()
        found = evaluate(
            lm=served,
            task_dict=wanted,
            limit=limit,
            bootstrap_iters=BOOTSTRAP if ranks.leads else 0,
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
    ranks: Ranks,
) -> Any:
    """The model as the harness takes one."""
    from lm_eval.models.huggingface import HFLM

    from rotq.kv.cache.packed_cache import PackedCache

    class Shared(HFLM):  # type: ignore[misc]
        """Each process answers a run of the questions, and has the answers to all."""

        def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            return _shared(ranks, super().loglikelihood, requests, *args, **kwargs)

        def loglikelihood_rolling(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            return _shared(ranks, super().loglikelihood_rolling, requests, *args, **kwargs)

        def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            return _shared(ranks, super().generate_until, requests, *args, **kwargs)

    class Packed(Shared):
        """Its keys and values are read from codes."""

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            with replaced_attention(self.model, history):  # type: ignore[arg-type]
                return super()._model_call(inps, *args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            cache = PackedCache(self.model, calibration)  # type: ignore[arg-type]
            return super()._model_generate(*args, past_key_values=cache, **kwargs)

    kind = Shared if history is None else Packed
    with told("lm-eval"), quiet():
        return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _shared(
    ranks: Ranks, answer: Callable[..., list[T]], requests: Sequence[Any], *args: Any, **kwargs: Any
) -> list[T]:
    mine = list(ranks.own(requests))
    answers = answer(mine, *args, **kwargs) if mine else []
    return [each for some in ranks.gathered(answers) for each in some]


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
