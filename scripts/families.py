"""Which causal families of transformers rotq quantizes, refuses, or fails on.

    python scripts/families.py [FAMILY ...] [-c RECIPE] [--json FILE]

Of each family a tiny random model is made (tests/support/tiny_families.py) and given to the dry run
and to a job without rotation. Every family is a process of its own, forked from this one, so that
nothing of it is left for the next.

    quantized   the job has made a checkpoint, which loads and reproduces the model in memory
    refused     the dry run refuses it in one line, and the job too
    late        the job refuses it and the dry run does not
    crash       anything else
    not made    transformers cannot make it so small; rotq was not asked
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")]

import tiny_families  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import rotq.quantize.publish  # noqa: E402
from rotq.checkpoint.load import load_model  # noqa: E402
from rotq.errors import CheckFailed, RotqError  # noqa: E402
from rotq.quantize.estimate import estimate  # noqa: E402
from rotq.quantize.pipeline import quantize_model  # noqa: E402
from rotq.recipe import Recipe, load_recipe  # noqa: E402

SECONDS = 240
"""A family may take."""


def main() -> None:
    """Print a line for each family, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("-c", "--config", default="rtn", help="preset; default: rtn")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write the outcomes here too")
    arguments = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    for family in arguments.families or tiny_families.FAMILIES:
        found[family] = in_a_fork(try_family, family, arguments.config, tuple(arguments.set))
        print(f"{family:28} {found[family]['outcome']:10} {found[family]['why'][:200]}", flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    counts = Counter(entry["outcome"] for entry in found.values())
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.most_common()))


def try_family(family: str, config: str, assignments: tuple[str, ...]) -> dict[str, str]:
    """What became of one family, and why."""
    with tempfile.TemporaryDirectory(prefix="rotq-family-") as folder:
        model, text = Path(folder) / "model", Path(folder) / "text.txt"
        try:
            tiny_families.tiny_family(family).save_pretrained(model)
        except Exception as error:
            return {"outcome": "not made", "why": _line(error)}
        tiny_families.byte_tokenizer().save_pretrained(model)
        text.write_text("The cat sat on the mat, and dogs ran over the hills. " * 20)
        recipe = small_recipe(config, text, assignments)
        dry = _attempt(lambda: estimate(model, recipe))
        real = _attempt(lambda: quantize_model(model, recipe, Path(folder) / "out"))
        return _outcome(dry, real)


def small_recipe(config: str, text: Path, assignments: tuple[str, ...]) -> Recipe:
    """A preset on two windows of 32 tokens."""
    changes: dict[str, Any] = {
        "calibration.source": str(text),
        "calibration.num_samples": 2,
        "calibration.seq_len": 32,
        "weights.group_size": 16,
        "weights.group_fallback": "auto",
    }
    given = dict(assignment.split("=", 1) for assignment in assignments)
    return load_recipe(ROOT / "configs" / f"{config}.yaml", {**changes, **given})


def _attempt(run: Callable[[], object]) -> tuple[str, str]:
    """(ok, refused or crash, why)."""
    try:
        run()
    except CheckFailed as error:
        return "crash", str(error)
    except (RotqError, ValueError) as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("crash", _line(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return "crash", f"{type(error).__name__}: {_line(error)} ({where})"
    return "ok", ""


def _outcome(dry: tuple[str, str], real: tuple[str, str]) -> dict[str, str]:
    if "crash" in (dry[0], real[0]):
        why = real[1] if real[0] == "crash" else f"dry run: {dry[1]}"
        return {"outcome": "crash", "why": why}
    if real[0] == "ok":
        why = "" if dry[0] == "ok" else f"the dry run refuses it: {dry[1]}"
        return {"outcome": "quantized" if dry[0] == "ok" else "crash", "why": why}
    return {"outcome": "refused" if dry == real else "late", "why": real[1]}


def reload_here(out: Path, ids_BT: Any, logits_BTV: Any, **options: Any) -> None:
    """``check_reload`` in this process, which is a fresh one for each family."""
    found = load_model(out, **options)(ids_BT, use_cache=False).logits
    if not torch.equal(found, logits_BTV):
        difference = (found.double() - logits_BTV.double()).abs().max()
        raise CheckFailed(f"it does not reproduce the quantized model: {difference:.3g}")


def in_a_fork(function: Callable[..., dict[str, str]], *arguments: Any) -> dict[str, str]:
    """What ``function`` returns in a forked process, which has ``SECONDS``."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        with os.fdopen(writer, "w") as pipe:
            json.dump(function(*arguments), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not text:
        return {"outcome": "crash", "why": f"the process ended with {status}"}
    result: dict[str, str] = json.loads(text)
    return result


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rotq.quantize.publish.check_reload = reload_here
    main()
