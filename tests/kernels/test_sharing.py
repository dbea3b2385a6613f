"""Native calls on several threads."""

from collections.abc import Iterator

import pytest
import torch

from rotq_kernels.sharing import share


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("units", [1, 2, 3, 10])
def test_each_unit_is_run_once(threads: int, units: int) -> None:
    done: list[tuple[int, int]] = []
    share(lambda part, out: out.append(part), units, done, worth_it=True)
    assert len(done) == min(threads, units)
    assert sorted(n for low, high in done for n in range(low, high)) == list(range(units))


def test_little_work_stays_where_it_is(threads: int) -> None:
    done: list[tuple[int, int]] = []
    share(lambda part: done.append(part), 7, worth_it=False)
    assert done == [(0, 7)]


def test_an_error_comes_out(threads: int) -> None:
    def fail(part: tuple[int, int]) -> None:
        if part[1] == 4:
            raise ValueError("last")

    with pytest.raises(ValueError, match="last"):
        share(fail, 4, worth_it=True)
