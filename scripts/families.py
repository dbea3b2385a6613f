"""Try every family and multimodal class of transformers:

    python scripts/families.py [FAMILY ...] [--json FILE]

Of each a tiny random model is made (tests/support/tiny_families.py, tiny_multimodal.py) and put to
the trials of ``family_trials``. Every family is a process of its own, forked from this one, so that
nothing of it is left for the next. ``--markdown`` writes docs/models.md from the outcomes, and
tries nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support")]
SECONDS = 600
"""A family may take."""
OUTCOMES = ROOT / "scripts" / "models.json"
PAGE = ROOT / "docs" / "models.md"


def main() -> None:
    """Print a line for each family, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--json", type=Path, default=OUTCOMES, help="outcomes; others are kept")
    parser.add_argument("--markdown", action="store_true", help="write docs/models.md")
    parser.add_argument("--missing", action="store_true", help="those without an outcome only")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    if arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    if arguments.markdown:
        from models_page import render

        PAGE.write_text(render(found), encoding="utf-8")
        return
    wanted = _wanted(arguments, found)
    if len(wanted) > 1:
        warm_up()
    for family in wanted:
        found[family] = in_a_fork(family)
        arguments.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{family:28} {_summary(found[family])}", flush=True)
    outcomes = (
        f"{name}: {trial['outcome']}" for all in found.values() for name, trial in all.items()
    )
    for outcome, number in sorted(Counter(outcomes).items()):
        print(f"{number:5} {outcome}")


def _wanted(arguments: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    import tiny_families
    import tiny_multimodal

    families = arguments.families or (*tiny_families.FAMILIES, *tiny_multimodal.CLASSES)
    return [name for name in families if not (arguments.missing and name in found)]


def _summary(trials: dict[str, dict[str, str]]) -> str:
    marks = {"ok": "", "refused": "-", "crash": "CRASH "}
    line = " ".join(marks[trial["outcome"]] + name for name, trial in trials.items())
    crashes = [trial["why"] for trial in trials.values() if trial["outcome"] == "crash"]
    return "; ".join([line, *crashes])


def warm_up() -> None:
    """Import here, once, what every family would import in its fork."""
    import family_trials

    with tempfile.TemporaryDirectory(prefix="rotq-family-") as folder:
        family_trials.try_family("llama", Path(folder))


def in_a_fork(family: str) -> dict[str, Any]:
    """What ``try_family`` finds in a forked process, which has ``SECONDS``."""
    import family_trials

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory(prefix="rotq-family-") as folder:
            found = family_trials.try_family(family, Path(folder))
        with os.fdopen(writer, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not text:
        return {"made": {"outcome": "crash", "why": f"the process ended with {status}"}}
    result: dict[str, Any] = json.loads(text)
    return result


if __name__ == "__main__":
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main()
