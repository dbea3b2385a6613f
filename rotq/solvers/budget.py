"""One choice for each of many, so that the sum of losses is small and that of costs in a budget.

    minimize  sum_u loss[u][c_u]    subject to    sum_u cost[u][c_u] <= budget

Of each unit only choices on the lower convex hull of its (cost, loss) points are an optimum of
the Lagrangian loss + lambda cost. From the cheapest of all, steps along the hulls are taken in the
order of what they gain per cost; where one does not fit, its unit stays and others go on. Up to
there the result is the optimum for what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence


def spend(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """The index of each unit's choice.

    Args:
        costs: Of each unit's choices, rising.
        losses: The same shape; a dearer choice may lose more than a cheaper one.
        budget: At least the sum of the first costs.

    Raises:
        ValueError: the budget is below that.
    """
    chosen = [0] * len(costs)
    rest = budget - sum(cost[0] for cost in costs)
    if rest < 0:
        raise ValueError(f"a budget of {budget:g} is below the sum of the least costs")
    steps = [
        (-gain, unit, place, after)
        for unit in range(len(costs))
        for place, (gain, after) in enumerate(_hull_steps(costs[unit], losses[unit]))
    ]
    stuck: set[int] = set()
    for _, unit, _, after in sorted(steps):
        price = costs[unit][after] - costs[unit][chosen[unit]]
        if unit in stuck or price > rest:
            stuck.add(unit)
            continue
        chosen[unit], rest = after, rest - price
    return chosen


def _hull_steps(cost: Sequence[float], loss: Sequence[float]) -> list[tuple[float, int]]:
    """Steps to the next choice on the lower hull: gain per cost, falling, and its index."""
    steps: list[tuple[float, int]] = []
    here = 0
    while True:
        gains = [
            ((loss[here] - loss[later]) / (cost[later] - cost[here]), later)
            for later in range(here + 1, len(cost))
            if cost[later] > cost[here] and loss[later] < loss[here]
        ]
        if not gains:
            return steps
        best = max(gains)
        steps.append(best)
        here = best[1]
