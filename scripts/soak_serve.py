"""Many clients at once against a tiny model, over HTTP: nothing lost, memory flat, clean 429s.

    python scripts/soak_serve.py --seconds 300 --clients 200

The server is a process of its own, ``rotq serve-kv``. Clients stream, ask for whole answers, leave
in the middle, or send what is no request; each starts anew as soon as it is done. A greedy answer
must be the same every time. Prints one JSON object; exit code 1 says that something was lost.
"""

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from train_tiny import make_tiny

WARM_UP = 0.3
"""Share of the time after which memory is held against what it is in the end."""

PROMPTS = ["The", "def main():", "x" * 90, "In the beginning " * 6]
BAD = [b"{", b"\xff", b"[]", b'{"model": "tiny", "prompt": 5}', b'{"prompt": "x"}']


@dataclass
class Tally:
    """What clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    answers: dict[str, set[str]] = field(default_factory=dict)
    tokens: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.outcomes["problem"] += 1
        if len(self.problems) < 20:
            self.problems.append(text)


async def client(number: int, url: str, end: float, tally: Tally) -> None:
    """Ask until the time is over."""
    drawn = random.Random(number)
    limits = httpx.Limits(max_connections=1)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        while time.monotonic() < end:
            kind = drawn.choices(["stream", "whole", "leave", "bad"], [10, 3, 1, 1])[0]
            try:
                await ask(kind, http, drawn, tally, str(number % 20))
            except httpx.HTTPError as error:
                tally.problem(f"{kind}: {type(error).__name__} {error}")


async def ask(
    kind: str, http: httpx.AsyncClient, drawn: random.Random, tally: Tally, user: str
) -> None:
    """One request."""
    if kind == "bad":
        headers = {"content-type": "application/json"}
        response = await http.post("/v1/completions", content=drawn.choice(BAD), headers=headers)
        tally.outcomes[f"bad {response.status_code}"] += 1
        if response.status_code != 400 or "error" not in response.json():
            tally.problem(f"bad request: {response.status_code} {response.text[:100]}")
        return
    prompt = drawn.choice(PROMPTS)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    body |= {"ignore_eos": True, "stream": kind != "whole", "user": user}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 429:
            await response.aread()
            wait = int(response.headers["retry-after"])
            assert response.json()["error"]["code"] == "queue_full"
            tally.outcomes["429"] += 1
            await asyncio.sleep(min(wait, 0.5) * drawn.random())
            return
        if response.status_code != 200:
            await response.aread()
            tally.problem(f"{response.status_code} {response.text[:100]}")
            return
        if kind == "leave":
            async for _ in response.aiter_lines():
                break
            tally.outcomes["left"] += 1
            return
        text = await read(response, kind)
    if text is None:
        tally.problem(f"{kind}: an answer without its end")
        return
    tally.outcomes[kind] += 1
    tally.tokens += 24
    tally.answers.setdefault(prompt, set()).add(text)


async def read(response: httpx.Response, kind: str) -> str | None:
    """The text of an answer; None if it is not whole."""
    if kind == "whole":
        await response.aread()
        found = response.json()
        whole = found["usage"]["completion_tokens"] == 24
        return found["choices"][0]["text"] if whole else None
    text, finish, done = "", None, False
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            done = True
        elif line:
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            text, finish = text + choice["text"], choice["finish_reason"] or finish
    return text if done and finish == "length" else None


async def watch(pid: int, end: float) -> list[tuple[float, int]]:
    """Resident bytes of the server, over time."""
    process, found = psutil.Process(pid), []
    while time.monotonic() < end:
        found.append((time.monotonic(), process.memory_info().rss))
        await asyncio.sleep(0.5)
    return found


def start(folder: Path, arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """The server, and where it is."""
    command = [sys.executable, "-m", "rotq", "serve-kv", str(folder), "--port", "0", "--json"]
    command += ["--model-name", "tiny", "--kv", arguments.kv, "--kv-memory", "16MiB"]
    command += ["--max-batch", "32", "--max-queue", str(arguments.queue)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        sys.exit(f"the server did not start: exit code {server.wait()}")
    return server, json.loads(line)["address"]


async def soak(url: str, pid: int, arguments: argparse.Namespace) -> tuple[Tally, dict]:
    """All clients; what they saw, and the server's own numbers in the end."""
    tally, end = Tally(), time.monotonic() + arguments.seconds
    clients = [client(number, url, end, tally) for number in range(arguments.clients)]
    memory, *_ = await asyncio.gather(watch(pid, end), *clients)
    async with httpx.AsyncClient(base_url=url) as http:
        for _ in range(100):
            stats = (await http.get("/stats")).json()
            if not stats["running"] and not stats["waiting"]:
                break
            await asyncio.sleep(0.1)
    warm = [rss for at, rss in memory if at > end - (1 - WARM_UP) * arguments.seconds]
    early, late = warm[: max(1, len(warm) // 4)], warm[-max(1, len(warm) // 4) :]
    stats["rss_warm"], stats["rss_end"] = max(early), max(late)
    return tally, stats


def judge(tally: Tally, stats: dict, *, exit_code: int, growth: float) -> list[str]:
    """What is not as it must be."""
    found = list(tally.problems)
    found += [
        f"{len(texts)} answers to {p[:20]!r}"
        for p, texts in tally.answers.items()
        if len(texts) > 1
    ]
    if stats["running"] or stats["waiting"]:
        found.append(f"{stats['running']} sequences still run, {stats['waiting']} wait")
    if stats["rss_end"] > (1 + growth) * stats["rss_warm"]:
        found.append(f"memory grew from {stats['rss_warm']} to {stats['rss_end']} bytes")
    if exit_code:
        found.append(f"the server ended with {exit_code}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--queue", type=int, default=128)
    parser.add_argument("--kv", default="k3v3")
    parser.add_argument("--growth", type=float, default=0.05, help="of memory, as a share")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder) / "tiny", steps=0)
        server, url = start(Path(folder) / "tiny", arguments)
        try:
            tally, stats = asyncio.run(soak(url, server.pid, arguments))
        finally:
            server.send_signal(signal.SIGTERM)
            exit_code = server.wait(60)
    problems = judge(tally, stats, exit_code=exit_code, growth=arguments.growth)
    result = {
        "seconds": arguments.seconds,
        "clients": arguments.clients,
        "outcomes": dict(sorted(tally.outcomes.items())),
        "tokens_per_second": tally.tokens / arguments.seconds,
        "rss_warm": stats["rss_warm"],
        "rss_end": stats["rss_end"],
        "reused": stats["reused"],
        "problems": problems,
    }
    print(json.dumps(result, indent=2))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
