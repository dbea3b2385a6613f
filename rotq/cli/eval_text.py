"""``--eval-text`` of ``rotq quantize``: what a job is scored on, before it and after it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rotq.cli.eval import measure, scored_tokens
from rotq.cli.loading import choose, device_map
from rotq.errors import RotqError
from rotq.phases import phase

if TYPE_CHECKING:
    from rotq.checkpoint.location import Location
    from rotq.report import JobReport


@dataclass(frozen=True, kw_only=True)
class EvalText:
    """A text, and how MODEL and the checkpoint that is made of it are scored on it."""

    model: Location
    text: str
    windows: int
    bos: str
    device: str
    dtype: str
    trust_remote_code: bool

    def check(self, dense: Path | None = None) -> None:
        """Refuse now what would be refused after the job.

        Args:
            dense: What a GGUF file was converted to, once it was; of others nothing is asked.

        Raises:
            RotqError: the model predicts no next token, or the text is missing or short.
        """
        from rotq.checkpoint.location import locate
        from rotq.evaluation.perplexity import Protocol

        scored_tokens(
            [locate(dense) if dense is not None and self.model.is_gguf else self.model],
            self.text,
            Protocol(windows=self.windows),
            bos=self.bos,
            trust_remote_code=self.trust_remote_code,
        )

    @phase("evaluation")
    def before(self, dense: Path) -> str:
        """Score the model; returns a line that says so.

        A process of its own does it: the whole model would count as memory of the job.

        Args:
            dense: Its folder, or that of a GGUF file's dense tensors.

        Raises:
            RotqError: the model cannot be scored.
        """
        from rotq.checkpoint.child import run_module

        arguments: list[str | Path] = ["eval", "ppl", dense, "--text", self.text]
        arguments += ["--json"]
        arguments += ["--windows", str(self.windows), "--bos", self.bos, "--dtype", self.dtype]
        arguments += ["--device", self.device]
        arguments += ["--trust-remote-code"] * self.trust_remote_code
        try:
            told = run_module("rotq", arguments, doing=f"evaluating {self.model}")
        except RotqError as error:
            raise RotqError(str(error).replace("rotq: error: ", "")) from None
        return f"before: perplexity {json.loads(told)['ppl']:.4g} on {self.text}"

    @phase("evaluation")
    def after(self, report: JobReport, output: Path) -> JobReport:
        """Score the checkpoint against the model, and put the figures into its report.json."""
        from rotq.checkpoint.files import write_json
        from rotq.checkpoint.inspection import REPORT
        from rotq.evaluation.perplexity import Protocol

        found = measure(
            output,
            self.text,
            Protocol(windows=self.windows),
            bos=self.bos,
            reference=self.model,
            device_map=device_map(choose(self.device)),
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )
        report = dataclasses.replace(report, evaluation={"text": self.text, **found.to_dict()})
        write_json(output / REPORT, report.to_dict())
        return report
