"""Hundreds of hostile files, each given to the command that reads its kind: one clear line, soon.

    python scripts/hostile/run.py            all; exit code 1 where a command did worse
    python scripts/hostile/run.py index deep only cases with one of these words in their name

A case runs in a fork of a process that has torch and rotq loaded. It must end with a documented
exit code within 30 s of processors, its children's included, and 2 GB, and say what it has to say
in a last line, without ``unexpected``. What has not ended after 2 minutes by the clock is ended.
"""

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import config_files
import kv_files
import own_files
import recipes
import texts
import tokenizer_files
import transformers
import weights
from bench import Bench, Case

from rotq.cli.main import main as rotq

LIMIT_SECONDS = 30
LIMIT_WAIT = 120
LIMIT_BYTES = 2_000_000_000
CODES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Outcome:
    """What a command did with a hostile file."""

    code: int
    """Negative: the signal that ended it."""
    said: str
    seconds: float
    """Of processors."""
    peak: int
    """Bytes of resident memory at most."""

    def faults(self) -> list[str]:
        """What must not be."""
        last = (self.said.strip().splitlines() or [""])[-1]
        found = {
            f"exit code {self.code}": self.code not in CODES,
            "a traceback": "Traceback" in self.said,
            "unexpected": "rotq: error: unexpected" in self.said,
            "no line that says what is wrong": self.code > 0 and "rotq: error: " not in last,
            f"{self.seconds:.0f} s": self.seconds > LIMIT_SECONDS,
            f"{self.peak / 1e9:.1f} GB": self.peak > LIMIT_BYTES,
        }
        return [fault for fault, is_there in found.items() if is_there]


def all_cases() -> Iterator[Case]:
    """Every case, by kind of file."""
    for kind in (config_files, weights, tokenizer_files, recipes, kv_files, texts, own_files):
        yield from kind.cases()


def run_case(case: Case, bench: Bench) -> Outcome:
    """Build a case's files and run its command in a fork."""
    bench.clear()
    arguments = [str(argument) for argument in case.build(bench)]
    started = time.monotonic()
    said = bench.work / "said"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _be_the_command(arguments, said)
    status, used = _wait(child, started)
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        said=said.read_text(errors="replace"),
        seconds=used.ru_utime + used.ru_stime,
        peak=used.ru_maxrss * 1024,
    )


def _be_the_command(arguments: list[str], said: Path) -> None:
    """Never returns."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + 4 * LIMIT_BYTES,) * 2)
    code = 99
    try:
        rotq(arguments, prog_name="rotq")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def _address_space() -> int:
    """Bytes of this process's address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _wait(child: int, started: float) -> tuple[int, resource.struct_rusage]:
    """Wait for the end, and bring it about where it does not come."""
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return status, used
        if time.monotonic() - started > LIMIT_WAIT:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def main() -> None:
    words = sys.argv[1:]
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    transformers.utils.logging.disable_progress_bar()
    chosen = [case for case in all_cases() if not words or any(w in case.name for w in words)]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="rotq-hostile-") as work:
        bench = Bench(Path(work))
        for case in chosen:
            outcome = run_case(case, bench)
            faults = outcome.faults()
            last = (outcome.said.strip().splitlines() or [""])[-1]
            bad += bool(faults)
            print(f"{'BAD ' if faults else 'ok  '}{case.name}: {outcome.code} {last[:200]}")
            if faults:
                print(f"     {', '.join(faults)}", flush=True)
    print(f"{len(chosen)} cases, {bad} of them bad")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
