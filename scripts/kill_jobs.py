"""Kill jobs with SIGKILL, let the same command continue, and compare the ends with unbroken jobs.

    python scripts/kill_jobs.py                            50 kills, and 20 while a job is cleared
    python scripts/kill_jobs.py --kills 6 --clearing 2     the short version

The job tunes. Of the kills, a sixth falls between two touches of the files of tuning, a third
between two of publishing, the rest at random times. A touch is an open, rename, removal or new
folder in OUT or OUT.partial; one unbroken run tells their order, which is always the same.
The clearing is that of ``--resume never --seed 1`` over an unfinished job of seed 0; what goes on
then is by turns seed 1 and seed 0: nothing but the weights of one of them may be published.
Exit code 1 where an end is not byte by byte an unbroken job's; report.json, which tells times, is
left out. Jobs are forked from this process, which has imported all that they need.
"""

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import torch
from train_tiny import make_tiny

import rotq.quantize.pipeline  # noqa: F401  (imported once, for all children)
from rotq.cli.main import main as rotq_main

TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
"""Audit events of Python, each told before it happens."""

Touch = tuple[str, str]
"""Event, and the path it is about: of a rename, the new one."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A child that has ended."""

    code: int
    """Exit code; -9 where it was killed."""
    said: str
    seconds: float


class Jobs:
    """Jobs on a tiny model, in a folder of their own."""

    def __init__(self, work: Path) -> None:
        self.work, self.model = work, work / "model"
        child = os.fork()  # torch is to compute nothing in the process that forks the others
        if not child:
            make_tiny(self.model, steps=0)
            os._exit(0)
        os.waitpid(child, 0)

    def run(
        self,
        output: Path,
        *options: str,
        watch: Callable[[Touch], None] | None = None,
        after: float | None = None,
    ) -> Ended:
        """A job in a child.

        Args:
            output: OUT.
            options: Further ones, as ``--seed``.
            watch: Told each touch of OUT and OUT.partial, in the child.
            after: Kill it then, in seconds.
        """
        started, log = time.monotonic(), output.with_suffix(".log")
        child = os.fork()
        if not child:
            _become_job(self._arguments(output, options), log, output, watch)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Ended(code=code, said=log.read_text(), seconds=time.monotonic() - started)

    def killed_at(self, output: Path, number: int, *options: str) -> Ended:
        """A job that is killed before its n-th touch, counted from 0."""
        left = iter(range(number, -1, -1))

        def count(_: Touch) -> None:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return self.run(output, *options, watch=count)

    def touches(self, output: Path, *options: str) -> tuple[list[Touch], Ended]:
        """All touches of a job that nothing happens to."""
        file = output.with_suffix(".touches")
        with open(file, "w", encoding="utf-8") as told:
            watch = lambda touch: print(*touch, file=told, flush=True)  # noqa: E731
            ended = self.run(output, *options, watch=watch)
        lines = file.read_text(encoding="utf-8").splitlines()
        return [(event, path) for event, path in (line.split(" ", 1) for line in lines)], ended

    def _arguments(self, output: Path, options: tuple[str, ...]) -> list[str]:
        small = ["--num-samples", "2", "--seq-len", "64", "--set", "tuning.steps=2"]
        return ["quantize", str(self.model), "-c", "w3", *small, "-o", str(output), *options]


def _become_job(
    arguments: list[str], log: Path, output: Path, watch: Callable[[Touch], None] | None
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    places = (f"{output}/", f"{output}.partial")
    if watch is not None:

        def see(event: str, about: tuple[Any, ...]) -> None:
            if event in TOUCHES:
                path = str(about[1] if event == "os.rename" else about[0])
                if path == str(output) or path.startswith(places):
                    watch((event, path))

        sys.addaudithook(see)
    code = 1
    try:
        rotq_main(arguments, prog_name="rotq")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def contents(output: Path) -> dict[str, bytes]:
    """Of a checkpoint, without the report."""
    return {file.name: file.read_bytes() for file in output.iterdir() if file.name != "report.json"}


def span(touches: list[Touch], pattern: str) -> range:
    """From the first touch that matches to the last."""
    found = [n for n, (event, path) in enumerate(touches) if re.search(pattern, f"{event} {path}")]
    return range(found[0], found[-1] + 1)


def moments(touches: list[Touch], kills: int, draw: random.Random) -> Iterator[tuple[str, int]]:
    """Where the placed kills fall: before touches of tuning's files and of publishing's."""
    tuning = span(touches, r"os.rename \S*/tuned-")
    publishing = range(span(touches, "os.mkdir .*/checkpoint").start, len(touches))
    for name, where, number in (
        ("tuning", range(tuning.start - 1, tuning.stop + 2), max(1, kills // 6)),
        ("publishing", publishing, max(1, kills // 3)),
    ):
        yield from ((name, place) for place in spread(where, number, draw))


def spread(where: range, number: int, draw: random.Random) -> list[int]:
    """Places drawn from a range, each once as long as there are enough."""
    rounds = -(-number // len(where))
    return [place for _ in range(rounds) for place in draw.sample(where, len(where))][:number]


def kill_running(jobs: Jobs, kills: int, draw: random.Random) -> Iterator[tuple[str, str]]:
    """Kind of each kill, and what is wrong with the end; "" where nothing is."""
    touches, unbroken = jobs.touches(jobs.work / "unbroken")
    assert unbroken.code == 0, unbroken.said
    wanted = contents(jobs.work / "unbroken")
    placed = list(moments(touches, kills, draw))
    for number, (kind, place) in enumerate([*placed, *[("random", 0)] * (kills - len(placed))]):
        output = jobs.work / f"killed-{number}"
        if kind == "random":
            while True:
                killed = jobs.run(output, after=draw.uniform(0.02, 1) * unbroken.seconds)
                if killed.code == -signal.SIGKILL:
                    break
                shutil.rmtree(output)
        else:
            killed = jobs.killed_at(output, place)
        assert killed.code == -signal.SIGKILL, killed.said
        yield kind, _continued(jobs, output, wanted)


def _continued(jobs: Jobs, output: Path, wanted: dict[str, bytes]) -> str:
    there = (
        output.exists() and not (output.with_name(f"{output.name}.partial") / "job.json").exists()
    )
    again = jobs.run(output)
    if again.code and not (there and "exists" in again.said):
        return f"{output.name}: exit code {again.code}: {again.said.strip()[-200:]}"
    return "" if contents(output) == wanted else f"{output.name}: other bytes"


def kill_clearing(jobs: Jobs, kills: int, draw: random.Random) -> Iterator[tuple[str, str]]:
    """As ``kill_running``, while the parts of an unfinished job are removed."""
    wanted = {}
    for seed in ("0", "1"):
        done = jobs.run(jobs.work / f"seed-{seed}", "--seed", seed)
        assert done.code == 0, done.said
        wanted[seed] = contents(jobs.work / f"seed-{seed}")
    touches, _ = jobs.touches(jobs.work / "old", "--seed", "0")
    shutil.rmtree(jobs.work / "old")
    publishing = span(touches, "os.mkdir .*/checkpoint").start
    jobs.killed_at(jobs.work / "old", publishing, "--seed", "0")
    _copy(jobs.work / "old", jobs.work / "logged")
    never = ("--seed", "1", "--resume", "never")
    touches, _ = jobs.touches(jobs.work / "logged", *never)
    cleared = span(touches, r"os.remove \S*/(tuned-|outer|block)")
    for number, place in enumerate(spread(range(cleared.start - 3, cleared.stop), kills, draw)):
        output, seed = jobs.work / f"cleared-{number}", str((number + 1) % 2)
        _copy(jobs.work / "old", output)
        killed = jobs.killed_at(output, place, *never)
        assert killed.code == -signal.SIGKILL, killed.said
        again = jobs.run(output, "--seed", seed)
        kind = f"clearing, then seed {seed}"
        if again.code == 1 and "holds a job with another recipe" in again.said:
            again, kind = jobs.run(output, "--seed", seed, "--resume", "never"), f"{kind}: refused"
        wrong = again.code or contents(output) != wanted[seed]
        yield kind, f"{output.name}: {again.code} {again.said.strip()[-200:]}" if wrong else ""


def _copy(output: Path, to: Path) -> None:
    shutil.copytree(output.with_name(f"{output.name}.partial"), to.with_name(f"{to.name}.partial"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clearing", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    draw, failed = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory(prefix="rotq-kills-") as folder:
        jobs, counts = Jobs(Path(folder)), Counter[str]()
        for kill, number in ((kill_running, arguments.kills), (kill_clearing, arguments.clearing)):
            for kind, wrong in kill(jobs, number, draw) if number else ():
                counts[kind] += 1
                failed += [f"{kind}: {wrong}"] if wrong else []
                print(f"{sum(counts.values())}: {kind}{', ' if wrong else ''}{wrong}", flush=True)
    print(f"{sum(counts.values())} kills ({dict(counts)}), {len(failed)} ends that are not right")
    print("\n".join(failed))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
