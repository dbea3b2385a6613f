"""Levels and thresholds against published tables and brute force."""

import pytest
import torch

from rotq.kv.calibration.codebook import (
    fitted_centres,
    gaussian_codebook,
    integer_codebook,
    normal_centres,
    uniform_codebook,
)
from rotq.ops import level_values

# kv.md 1.1: positive half of the Lloyd-Max levels of N(0, 1), and their mean squared error
TABLE = {
    2: ([0.4528, 1.5104], 0.11748),
    3: ([0.2451, 0.7560, 1.3439, 2.1519], 0.03455),
    4: ([0.1284, 0.3881, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], 0.00950),
}


def normal_error(thresholds_E: torch.Tensor, values_L: torch.Tensor) -> float:
    """E (x - value)^2 over N(0, 1), on a fine grid."""
    x_N = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density_N = torch.exp(-(x_N**2) / 2)
    error_N = x_N - values_L.double()[torch.searchsorted(thresholds_E.double(), x_N)]
    return float((error_N**2 * density_N).sum() / density_N.sum())


@pytest.mark.parametrize("bits", TABLE)
def test_normal_levels(bits: int) -> None:
    half, _ = TABLE[bits]
    expected = torch.tensor([-value for value in reversed(half)] + half, dtype=torch.float64)
    torch.testing.assert_close(normal_centres(bits), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("bits", TABLE)
def test_integer_levels_cost_little(bits: int) -> None:
    book = gaussian_codebook(bits)
    assert book.levels_L.dtype == torch.int8
    assert int(book.levels_L.max()) == 127
    found = normal_error(book.thresholds_E, book.levels_L.float() * book.unit)
    assert TABLE[bits][1] * 0.999 < found < TABLE[bits][1] * 1.01


@pytest.mark.parametrize(("bits", "expected"), [(5, 0.003495), (6, 0.001041), (8, 0.00009)])
def test_uniform_levels(bits: int, expected: float) -> None:
    book = gaussian_codebook(bits)
    values_L = level_values(book.levels_L[None], bits)[0] * book.unit
    assert normal_error(book.thresholds_E, values_L) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("bits", [5, 8])
def test_step_is_the_best(bits: int) -> None:
    def error(factor: float) -> float:
        book = uniform_codebook(bits, gaussian_codebook(bits).unit * factor)
        return normal_error(
            book.thresholds_E, level_values(book.levels_L[None], bits)[0] * book.unit
        )

    assert error(1.0) < min(error(0.97), error(1.03))


def test_fitted_to_the_normal_is_the_table() -> None:
    y_N = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(1 << 18) + 0.5) / (1 << 18))
    start_L = torch.linspace(-3, 3, 8)
    found = fitted_centres(y_N, 3, start_L)
    torch.testing.assert_close(found, normal_centres(3), rtol=0, atol=1e-3)


def test_fitted_to_few_numbers_is_exact() -> None:
    y_N = torch.tensor([5.0, -1.0, -1.0, 2.0, 5.0, 2.0, 7.0])
    found = fitted_centres(y_N, 2, torch.tensor([-1.5, 1.0, 4.0, 9.0]))
    assert found.tolist() == [-1.0, 2.0, 5.0, 7.0]


def test_weights_move_levels() -> None:
    y_N = torch.tensor([0.0, 1.0, 10.0, 11.0])
    found = fitted_centres(y_N, 1, torch.tensor([0.0, 11.0]), torch.tensor([1.0, 3.0, 1.0, 0.0]))
    assert found.tolist() == [0.75, 10.0]


def test_level_without_numbers_stays() -> None:
    found = fitted_centres(torch.tensor([1.0, 1.0]), 1, torch.tensor([1.0, 50.0]))
    assert found.tolist() == [1.0, 50.0]


def test_thresholds_lie_between_what_levels_become() -> None:
    book = integer_codebook(torch.tensor([-4.0, -0.01, 1.0, 2.0]))
    assert book.levels_L.tolist() == [-127, 0, 32, 64]
    middle = torch.tensor([-63.5, 16.0, 48.0]) * book.unit
    torch.testing.assert_close(book.thresholds_E, middle, rtol=1e-6, atol=0)
