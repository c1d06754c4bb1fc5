"""The best plan of whole cells for a budget, with proof: from the linear program, and where cells are few by search.

Arrays as in `cells`.
"""

from __future__ import annotations

import heapq
import itertools
import time
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from heatkv.core.schema import FloatArray, IntArray
from heatkv.solve.cells import Plans, all_plans
from heatkv.solve.checkpoints import Capacity

EXACT_VARIABLES = 200
"""With at most this many variables the search goes on to the best plan of all, while there is time."""
MOST_NODES, SOLVE_SECONDS = 25, 10.0
"""Where that search ends with the best plan so far and the gap that is left."""
PROVEN = 1e-9
"""A plan this close to its bound is the best one but for rounding."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """A plan with its proof: no plan within the capacity is worth more than `bound`.

    `row_prices` are the dual prices of the capacity's rows, in value per token-head, at the linear program's optimum.
    """

    last_read: IntArray
    value: float
    bound: float
    row_prices: FloatArray

    @property
    def gap(self) -> float:
        """Share of the bound that the plan may miss; 0 is proven optimal."""
        gap = (self.bound - self.value) / self.bound if self.bound > 0 else 0.0
        return gap if gap > PROVEN else 0.0


def price_bound(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int, row_prices: FloatArray) -> float:
    """No plan is worth more, whatever the prices (>= 0). Raises BudgetError when the sinks alone do not fit."""
    return all_plans(value_LHTT, capacity, sink_scales).bound(row_prices)


def allocate(
    value_LHTT: FloatArray,
    capacity: Capacity,
    sink_scales: int,
    candidates: tuple[IntArray, ...] = (),
    seconds: float = SOLVE_SECONDS,
) -> Allocation:
    """The plan worth most within the capacity, from the linear program, rounded down and refilled.

    `candidates` are feasible plans; the result is never worth less than any of them. Where cells are few, branch and
    bound goes on over at most MOST_NODES programs and so many seconds. Raises BudgetError when the sinks alone do not
    fit.
    """
    plans = all_plans(value_LHTT, capacity, sink_scales)
    unit, plans = plans.scaled()
    rounded, row_prices, branch = plans.relax()
    bound = plans.bound(row_prices)
    best = max((plans.fill(last_read) for last_read in (rounded, *candidates)), key=plans.worth)
    if branch is not None and plans.variables <= EXACT_VARIABLES:
        best, bound = _search(plans, bound, branch, best, time.monotonic() + seconds)
    value = plans.worth(best)
    return Allocation(best, value * unit, max(bound, value) * unit, row_prices * unit)


def allocate_greedily(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int) -> Allocation:
    """A good plan in a fraction of the time: cells in the order of value per token and target while they fit.

    The bound has one price for the checkpoints after the last layer, weighted by scarcity: the price with the lowest.
    Raises as `allocate` does.
    """
    unit, plans = all_plans(value_LHTT, capacity, sink_scales).scaled()
    plan = plans.fill(plans.least)
    shape = np.zeros(len(capacity.row_room))
    shape[capacity.layers - 1 : capacity.checkpoints : capacity.layers] = capacity.scarcity[1:]
    prices = np.zeros_like(shape)  # right where everything fits
    bound, highest = plans.bound(prices), float(np.max(plans.value_LHTT / np.asarray(capacity.tokens)))
    if highest > 0:
        limits = (np.log(highest) - 25, np.log(highest))
        found = minimize_scalar(
            lambda log_price: plans.bound(shape * np.exp(log_price)),
            bounds=limits, method="bounded", options={"maxiter": 12},
        )  # fmt: skip
        if found.fun < bound:
            bound, prices = float(found.fun), shape * np.exp(found.x)
    value = plans.worth(plan)
    return Allocation(plan, value * unit, max(bound, value) * unit, prices * unit)


def _search(plans: Plans, bound: float, branch: tuple[int, ...], best: IntArray, ends: float) -> tuple[IntArray, float]:
    """Branch and bound, the plans with the highest bound first: the best plan found until the clock says `ends`, and
    what none is worth more than."""
    value, order, closed = plans.worth(best), itertools.count(), -np.inf
    waiting = [(-bound, next(order), plans, branch)]
    for _ in range(MOST_NODES):
        if not waiting or -waiting[0][0] <= value * (1 + PROVEN) or time.monotonic() > ends:
            break
        above, _, parent, branch = heapq.heappop(waiting)
        for child in parent.split(branch):
            if child is None:
                continue
            rounded, prices, more = child.relax()
            bound = min(child.bound(prices), -above)
            found = child.fill(rounded)
            if plans.worth(found) > value:
                best, value = found, plans.worth(found)
            if more is None:
                closed = max(closed, bound)
            else:
                heapq.heappush(waiting, (-bound, next(order), child, more))
    return best, max(closed, -waiting[0][0] if waiting else -np.inf)
