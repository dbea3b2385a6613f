"""A job's folder survives a kill before any touch of the disk."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from folder_jobs import Killer, finish_part, opened, partial_of, run_job, weights_of

from rotq.errors import RotqError


@pytest.fixture(scope="module")
def killed() -> Iterator[Killer]:
    killer = Killer()
    yield killer
    killer.close()


def weights(output: Path) -> str:
    return (output / "model.safetensors").read_text()


def moments(limit: int = 400):
    """Numbers of touches, until the action has no more of them."""
    for number in itertools.count(1):
        assert number < limit, "the action never ends"
        yield number


def test_a_killed_job_continues_to_the_same_end(killed: Killer, tmp_path: Path) -> None:
    for number in moments():
        output = tmp_path / str(number) / "out"
        if not killed(functools.partial(run_job, output), number):
            break
        if output.exists() and not (partial_of(output) / "job.json").exists():
            # the last moments: the result is there, and the folder is as good as gone
            with pytest.raises(RotqError, match="exists"):
                run_job(output)
        else:
            run_job(output)
            assert not partial_of(output).exists()
        assert weights(output) == weights_of(0)
    assert number > 40


def unfinished(output: Path) -> None:
    """Job 0, stopped before its end."""
    with opened(output) as folder:
        folder.claim({"seed": 0})
        for name in ("outer", "block-00000"):
            finish_part(folder, name, f"{name} of 0;")


def test_no_part_of_a_discarded_job_outlives_it(killed: Killer, tmp_path: Path) -> None:
    for number in moments():
        output = tmp_path / str(number) / "out"
        unfinished(output)
        again = functools.partial(run_job, output, seed=1, resume="never")
        if not killed(again, number):
            break
        if not output.exists():
            with contextlib.suppress(RotqError):  # the old job is whole
                run_job(output, seed=1)
            if not output.exists():
                again()
        assert weights(output) == weights_of(1)
    assert number > 40


def test_what_is_replaced_is_there_until_the_new_one_is(killed: Killer, tmp_path: Path) -> None:
    for number in moments():
        output = tmp_path / str(number) / "out"
        run_job(output, seed=0)
        again = functools.partial(run_job, output, seed=1, overwrite=True)
        if not killed(again, number):
            break
        places = [output, partial_of(output) / "replaced"]
        held = [weights(place) for place in places if (place / "model.safetensors").exists()]
        assert held
        assert held[0] in (weights_of(0), weights_of(1))
        again()
        assert weights(output) == weights_of(1)
        assert not partial_of(output).exists()
    assert number > 40


def test_a_job_that_is_given_up_gives_the_replaced_one_back(killed: Killer, tmp_path: Path) -> None:
    """Killed between the two renames, and then begun anew with another seed and refused."""
    for number in moments():
        output = tmp_path / str(number) / "out"
        run_job(output, seed=0)
        if not killed(functools.partial(run_job, output, seed=1, overwrite=True), number):
            break
        if output.exists():
            continue
        with (
            pytest.raises(ValueError, match="refused"),
            opened(output, resume="never", overwrite=True),
        ):
            raise ValueError("refused")
        assert weights(output) == weights_of(0)
        return
    pytest.fail("no kill fell between the renames")
