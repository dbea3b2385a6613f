"""Inverses, also where torch's own are wrong."""

from collections.abc import Iterator

import pytest
import torch

from rotq.errors import RotqError
from rotq.numerics import inverse, side_by_side


@pytest.fixture
def threads() -> Iterator[int]:
    """More than one, also where the tests are run with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("K", [1, 7, 64, 256, 400])
def test_inverse(K: int) -> None:
    generator = torch.Generator().manual_seed(K)
    matrix = torch.randn(2, K, K, generator=generator, dtype=torch.float64)
    matrix += 2 * K**0.5 * torch.eye(K)
    eye = torch.eye(K, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(matrix @ inverse(matrix), eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse(matrix[0]), inverse(matrix)[0])


def test_parts_side_by_side_come_back_in_order() -> None:
    # later parts are smaller, so that they are done earlier
    parts = [torch.full((400 - 50 * number, 400), float(number)) for number in range(8)]
    found = side_by_side(lambda part: (part @ part.T).trace().item() ** 0.5, parts)
    assert found == [(part @ part.T).trace().item() ** 0.5 for part in parts]


def test_inside_a_part_an_operator_has_one_thread(threads: int) -> None:
    assert side_by_side(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("gradients", [False, True])
def test_a_part_has_the_gradient_mode_of_its_caller(gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        assert side_by_side(lambda _: torch.is_grad_enabled(), range(3)) == [gradients] * 3


def test_what_a_part_raises_is_raised_and_threads_are_put_back(threads: int) -> None:

    def fail(part: int) -> int:
        if part == 2:
            raise RotqError("part 2")
        return part

    with pytest.raises(RotqError, match="part 2"):
        side_by_side(fail, range(5))
    assert torch.get_num_threads() == threads
