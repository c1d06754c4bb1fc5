"""The best plan of whole cells for a budget, with proof.

`allocate` solves a linear program over all cells: whether target t still reads cell (l, h, s), non-increasing in t, one
capacity row per checkpoint. Its prices bound what any plan is worth, in plain float64 sums that trust no solver; where
cells are few, a search branches until the bound is met. Arrays: L layers, H heads, T scales; value[l, h, t, s] is what
it is worth that target t reads source s, which is finite and not negative.
"""

from __future__ import annotations

import heapq
import itertools
import time
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import minimize_scalar

from heatkv.core.plan import held_for_targets, keep_first
from heatkv.core.schema import BoolArray, FloatArray, IntArray
from heatkv.solve.checkpoints import Capacity, cumulative_value, fill
from heatkv.solve.highs import LinearProgram

EXACT_VARIABLES = 200
"""With at most this many variables the search goes on to the best plan of all, while there is time."""
MOST_NODES, SOLVE_SECONDS = 50, 10.0
"""Where that search ends with the best plan so far and the gap that is left."""
ROUNDING = 1e-13
"""Sums in another order differ by no more than this share of what is summed; bounds are larger by it."""
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


def read_value(last_read_LHT: IntArray, value_LHTT: FloatArray) -> float:
    """What a plan is worth: the sum of value[l, h, t, s] over all cells that targets read."""
    targets = np.arange(last_read_LHT.shape[2])
    reads = (last_read_LHT[:, :, None, :] >= targets[:, None]) & (targets[:, None] > targets)
    return float(value_LHTT[reads].sum())


def price_bound(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int, row_prices: FloatArray) -> float:
    """No plan is worth more, whatever the prices (>= 0). Raises BudgetError when the sinks alone do not fit."""
    return _all_plans(value_LHTT, capacity, sink_scales).bound(row_prices)


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
    plans = _all_plans(value_LHTT, capacity, sink_scales)
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
    unit, plans = _all_plans(value_LHTT, capacity, sink_scales).scaled()
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


@dataclass(frozen=True, eq=False)
class _Plans:
    """All plans within the capacity that read every cell at least as long as `least` and at most as long as `most`."""

    value_LHTT: FloatArray
    capacity: Capacity
    least: IntArray
    most: IntArray

    def narrowed(self, least: IntArray, most: IntArray) -> _Plans | None:
        """Those between these two, without reads that never fit beside `least`; None where that does not fit itself."""
        capacity = self.capacity
        slack = capacity.slack(held_for_targets([least], [capacity.tokens]))
        if slack.min() < 0:
            return None
        fits_LHST = capacity.least_room(slack)[:, None, None] >= np.asarray(capacity.tokens)[:, None]
        reached = fits_LHST | (np.arange(capacity.scales) <= least[..., None])
        ends = np.logical_and.accumulate(reached, axis=3).sum(axis=3) - 1
        return _Plans(self.value_LHTT, capacity, least, np.minimum(most, ends))

    def open_reads(self) -> BoolArray:
        """The reads [l, h, s, t] that some of them have and others lack."""
        target = np.arange(self.capacity.scales)
        return (target > self.least[..., None]) & (target <= self.most[..., None])

    @property
    def variables(self) -> int:
        return int((self.most - self.least).sum())

    def scaled(self) -> tuple[float, _Plans]:
        """A power of two, and the same with values divided by it, of which the largest is about 1; what never fits is
        worth nothing then, and tiny values keep their digits."""
        scale = np.arange(self.capacity.scales)
        read_LHTS = (scale[:, None] > scale) & (scale[:, None] <= self.most[:, :, None])
        values = np.where(read_LHTS, self.value_LHTT, 0)
        _, exponent = np.frexp(values.max())
        return float(np.ldexp(1.0, exponent)), replace(self, value_LHTT=np.ldexp(values, -exponent))

    def worth(self, last_read: IntArray) -> float:
        return read_value(last_read, self.value_LHTT)

    def fill(self, last_read: IntArray) -> IntArray:
        """The plan filled up. What a solver's tolerance let in too much is taken out before."""
        capacity = self.capacity
        if capacity.slack(held_for_targets([last_read], [capacity.tokens])).min() < 0:
            reads_LHTS = last_read[:, :, None, :] >= np.arange(capacity.scales)[:, None]
            last_read = np.minimum(fill(self.least, self.value_LHTT * reads_LHTS, capacity), last_read)
        return fill(last_read, self.value_LHTT, capacity)

    def bound(self, row_prices: FloatArray) -> float:
        """None of them is worth more, whatever the prices (>= 0): every cell takes what pays, and room costs its
        price. Rounding is allowed for."""
        capacity, scale = self.capacity, np.arange(self.capacity.scales)
        tokens = np.asarray(capacity.tokens, dtype=np.float64)
        paid = capacity.token_prices(row_prices).cumsum(axis=2)  # for targets up to k
        cost_LHSK = (paid[:, :, None, :] - paid[:, :, :, None]) * tokens[:, None]
        worth_LHSK, room = cumulative_value(self.value_LHTT), float(row_prices @ capacity.row_room)
        possible = (scale >= self.least[..., None]) & (scale <= self.most[..., None])
        best = np.where(possible, worth_LHSK - cost_LHSK, -np.inf).max(axis=3)
        summed = float(np.take_along_axis(worth_LHSK, self.most[..., None], axis=3).sum()) + 2 * room
        return float(best.sum()) + room + ROUNDING * summed

    def relax(self) -> tuple[IntArray, FloatArray, tuple[int, ...] | None]:
        """The plan that reads only what the linear program's optimum holds whole, the prices of the capacity's rows,
        and the read (l, h, s, t) worth most of those that it leaves open.

        Over x[l, h, s, t] in [0, 1] for every open read, and held[l, t], their sums.
        """
        capacity, scales = self.capacity, self.capacity.scales
        layer, head, source, target = reads = np.nonzero(self.open_reads())
        count, sums = len(layer), capacity.layers * scales
        if not count:
            return self.least, np.zeros(len(capacity.row_room)), None
        begins = target == self.least[layer, head, source] + 1  # where each cell's variables begin
        unit = float(max(capacity.tokens))  # rows of similar size are kinder to the solver
        tokens = np.asarray(capacity.tokens, dtype=np.float64)[source] / unit
        added = sparse.csr_array((-tokens, (layer * scales + target, np.arange(count))), shape=(sums, count))
        later, identity = np.flatnonzero(~begins), sparse.eye_array(count, format="csr")
        left = capacity.slack(held_for_targets([self.least], [capacity.tokens]))
        worth = self.value_LHTT[layer, head, target, source]
        worth_unit = float(worth.max()) / 100 or 1.0
        program = LinearProgram(
            cost=np.concatenate([-worth / worth_unit, np.zeros(sums)]),
            equal=sparse.csr_array(sparse.hstack([added, sparse.eye_array(sums)])),
            right=np.zeros(sums),
            limits=sparse.csr_array(sparse.block_diag([identity[later] - identity[later - 1], capacity.rows])),
            most=np.concatenate([np.zeros(len(later)), left / unit]),
            upper=np.where(np.arange(count + sums) < count, 1.0, np.inf),
        )
        solved = program.solve()
        if solved is None:  # not in time: nothing is known
            return self.least, np.zeros(len(left)), None
        x = solved.x[:count]
        last_read, first = self.least.copy(), np.flatnonzero(begins)
        last_read[layer[first], head[first], source[first]] += np.add.reduceat((x > 1 - 1e-6).astype(np.int64), first)
        left_open = worth * np.where(np.abs(x - 0.5) < 0.5 - 1e-6, np.minimum(x, 1 - x), -1)
        branch = tuple(int(index[left_open.argmax()]) for index in reads) if left_open.max() > 0 else None
        return last_read, solved.prices[-len(left) :] * worth_unit / unit, branch

    def split(self, branch: tuple[int, ...]) -> tuple[_Plans | None, _Plans | None]:
        """Those that have the read (l, h, s, t), and those that do not."""
        cell, target = branch[:3], branch[3]
        least, most = self.least.copy(), self.most.copy()
        least[cell], most[cell] = target, target - 1
        return self.narrowed(least, self.most), self.narrowed(self.least, most)


def _all_plans(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int) -> _Plans:
    """Raises BudgetError when the sinks do not fit."""
    shape = capacity.layers, capacity.heads, capacity.scales
    sinks, full = keep_first(shape, sink_scales), keep_first(shape, capacity.scales)
    capacity.check_sinks(held_for_targets([sinks], [capacity.tokens]), sink_scales)
    plans = _Plans(value_LHTT, capacity, sinks, full).narrowed(sinks, full)
    assert plans is not None
    return plans


def _search(
    plans: _Plans, bound: float, branch: tuple[int, ...], best: IntArray, ends: float
) -> tuple[IntArray, float]:
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
