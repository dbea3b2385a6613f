"""Joining the processes of one job: started here by the leader, or by a launcher of torch's.

A launcher (``accelerate launch``, ``torchrun``) starts the same command several times and says in
the environment who is who: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. ``--num-processes`` does
that itself on one machine: the command that the user has typed leads, and starts the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import IO

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from rotq.errors import RotqError, reason
from rotq.ranks import ALONE, Ranks

PATIENCE = timedelta(days=2)
"""How long ranks wait for each other: the leader fetches, converts and checks on its own."""

_FAILURE = "failure"


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as one of several."""
    told = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
    return told and environment["WORLD_SIZE"] != "1"


@contextmanager
def joined(number: int, command: Sequence[str]) -> Iterator[Ranks]:
    """This process among ``number``, or among those of the launcher that has started it.

    Args:
        number: Processes in all; 1 alone.
        command: Arguments of ``python -m rotq`` that the others are started with.

    Raises:
        RotqError: another process has failed; in its words.
    """
    if launched(os.environ):
        store, rank, size = next(iter(rendezvous("env://")))
        with _in_group(PrefixStore("rotq", store), rank, size) as ranks:
            yield ranks
    elif number > 1:
        with _leading(number, command) as ranks:
            yield ranks
    else:
        yield ALONE


@contextmanager
def _leading(number: int, command: Sequence[str]) -> Iterator[Ranks]:
    """Start the others; they end when this does."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = PrefixStore("rotq", server)
    with ExitStack() as stack:
        others = [
            stack.enter_context(_Other(rank, number, server.port, command))
            for rank in range(1, number)
        ]
        while not store.check([_arrival(other.rank) for other in others]):
            for other in others:
                other.check()
            time.sleep(0.05)
        with _in_group(store, 0, number) as ranks:
            yield ranks


class _Other:
    """A process that this one has started, and ends."""

    def __init__(self, rank: int, size: int, port: int, command: Sequence[str]) -> None:
        self.rank = rank
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = {"RANK": rank, "LOCAL_RANK": rank}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rotq", *command],
            env={**os.environ, **{name: str(value) for name, value in (shared | own).items()}},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C is for the leader
        )

    def __enter__(self) -> _Other:
        return self

    def __exit__(self, *failure: object) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()

    def check(self) -> None:
        """Raise RotqError with its last line if it has ended."""
        if self._process.poll() is None:
            return
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise RotqError(f"process {self.rank} has ended early: {last}")


@contextmanager
def _in_group(store: Store, rank: int, size: int) -> Iterator[Ranks]:
    """In torch's group of processes, with this process's share of the cores."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    threads = torch.get_num_threads()
    store.set(_arrival(rank), "")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    torch.set_num_threads(max(1, threads // size))
    try:
        yield Ranks(rank=rank, size=size, local=int(os.environ.get("LOCAL_RANK", rank)))
    except BaseException as error:
        told = _failure_of_another(store, error)
        if told is not None:
            raise RotqError(told) from error
        store.set(_FAILURE, f"process {rank} of {size}: {reason(error)}")
        raise
    finally:
        torch.set_num_threads(threads)
        with suppress(RuntimeError):  # the others may be gone
            dist.destroy_process_group()


def _arrival(rank: int) -> str:
    return f"arrived-{rank}"


def _failure_of_another(store: Store, error: BaseException) -> str | None:
    """What another rank has said before it ended, where ``error`` is that it is gone."""
    if not isinstance(error, RuntimeError):
        return None
    with suppress(RuntimeError):
        if store.check([_FAILURE]):
            return store.get(_FAILURE).decode()
    is_loss = isinstance(error, dist.DistError) or "onnection" in str(error)
    # a process that is killed, as for want of memory, says nothing
    return "another process of the job was killed; the same command continues" if is_loss else None
