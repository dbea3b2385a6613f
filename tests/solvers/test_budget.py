"""Choices under a budget against all choices there are."""

import itertools
import random

import pytest

from rotq.solvers.budget import spend


def drawn(seed, num_units=5, num_choices=4):
    """Rising costs, losses that mostly fall."""
    draw = random.Random(seed)
    costs, losses = [], []
    for _ in range(num_units):
        cost = sorted(draw.uniform(1, 10) for _ in range(num_choices))
        size = draw.uniform(0.1, 10)
        costs.append(cost)
        losses.append([size * draw.uniform(0.5, 1.5) * 2.0**-c for c in cost])
    return costs, losses


def totals(costs, losses, chosen):
    cost = sum(cost[index] for cost, index in zip(costs, chosen, strict=True))
    return cost, sum(loss[index] for loss, index in zip(losses, chosen, strict=True))


def least_loss(costs, losses, budget):
    every = itertools.product(*(range(len(cost)) for cost in costs))
    found = (totals(costs, losses, chosen) for chosen in every)
    return min(loss for cost, loss in found if cost <= budget)


@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_best_of_all_choices_and_within_the_budget(seed):
    costs, losses = drawn(seed)
    least, most = (sum(cost[end] for cost in costs) for end in (0, -1))
    step = max(cost[-1] - cost[0] for cost in costs)
    for share in (0.0, 0.3, 0.6, 0.9, 1.0):
        budget = least + share * (most - least)
        cost, loss = totals(costs, losses, spend(costs, losses, budget))
        assert cost <= budget + 1e-9
        assert loss <= least_loss(costs, losses, max(least, budget - step)) + 1e-9
        assert loss <= 1.5 * least_loss(costs, losses, budget)


def test_exactly_the_best_where_the_budget_is_a_step_of_the_hulls():
    costs, losses = [[1, 2, 3], [1, 2, 3]], [[8.0, 3.0, 2.0], [9.0, 5.0, 3.0]]
    chosen = {budget: tuple(spend(costs, losses, budget)) for budget in (2, 3, 4, 5, 6)}
    assert chosen == {2: (0, 0), 3: (1, 0), 4: (1, 1), 5: (1, 2), 6: (2, 2)}


def test_what_is_left_buys_a_step_that_was_passed_over():
    # the first unit's step gains most per cost but does not fit; the second's does
    assert spend([[1, 9], [1, 2]], [[100.0, 0.0], [1.0, 0.5]], 4) == [0, 1]


def test_a_choice_that_costs_more_and_loses_more_is_not_taken():
    assert spend([[1, 2, 3]], [[5.0, 6.0, 4.0]], 2.5) == [0]
    assert spend([[1, 2, 3]], [[5.0, 6.0, 4.0]], 3) == [2]
    assert spend([[1, 2]], [[5.0, 6.0]], 2) == [0]


def test_a_larger_budget_never_loses_more():
    costs, losses = drawn(7, num_units=40)
    least, most = (sum(cost[end] for cost in costs) for end in (0, -1))
    found = [
        totals(costs, losses, spend(costs, losses, least + step / 50 * (most - least)))[1]
        for step in range(51)
    ]
    assert all(later <= 1.02 * earlier for earlier, later in itertools.pairwise(found))
    assert found[-1] < 0.1 * found[0]


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match="below the sum of the least costs"):
        spend([[2, 3]], [[1.0, 0.5]], 1.9)
