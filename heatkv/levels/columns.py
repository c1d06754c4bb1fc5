"""The best plan with levels for a budget: column generation over whole paths of every head (Gilmore and Gomory 1961).

A master program mixes paths within the capacity; its prices say what a token costs, and dynamic programming finds the
best path of every head under them, until no path lowers the cost. Arrays: L layers, H heads, P = L x H heads of the
model, T targets, S sources, C columns (paths, each of one head).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import LEVELS
from heatkv.core.schema import FloatArray, IntArray
from heatkv.levels.pricing import Paths, Pricing, concatenated
from heatkv.levels.rounding import GOAL, MAX_NODES, PROVEN, Rounding, by_head, closer, column_use, one_per_head
from heatkv.solve.allocation import PROVEN as ROUNDING_GAP
from heatkv.solve.allocation import SOLVE_SECONDS
from heatkv.solve.cells import ROUNDING
from heatkv.solve.checkpoints import Capacity
from heatkv.solve.highs import LinearProgram

ALL_LEVELS = tuple(range(len(LEVELS)))
MAX_ROUNDS = 80
TOLERANCE = 5e-4
"""Rounds end when the master program is this close to its bound, as a share of it."""
NEARBY = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5)
"""Shares of the final prices whose paths are finer steps to exchange when the mix is rounded."""


@dataclass(frozen=True, eq=False)
class LevelAllocation:
    """The plan `level[l, h, t, s]` (NONE where not held), its cost, and a bound that no plan can be below.

    `row_prices` are the dual prices of the capacity's rows, in cost per token-head, at the bound.
    """

    level: IntArray
    cost: float
    bound: float
    row_prices: FloatArray

    @property
    def gap(self) -> float:
        """Share of the cost that a better plan could save at most; 0 is proven optimal."""
        gap = (self.cost - self.bound) / self.cost if self.cost > 0 else 0.0
        return gap if gap > ROUNDING_GAP else 0.0

    def times(self, unit: float) -> LevelAllocation:
        """With costs in other units."""
        return replace(self, cost=self.cost * unit, bound=self.bound * unit, row_prices=self.row_prices * unit)

    def last_reads(self) -> list[IntArray]:
        """`last_read` of every level, fine to coarse."""
        scales = self.level.shape[2]
        past = np.arange(scales)[:, None] > np.arange(scales)
        return [np.arange(scales) + (past & (self.level <= index)).sum(axis=2) for index in range(len(LEVELS))]


def allocate_levels(
    statistics: LevelStatistics,
    capacity: Capacity,
    levels: tuple[int, ...] = ALL_LEVELS,
    sink_scales: int | None = None,
    seconds: float = SOLVE_SECONDS,
) -> LevelAllocation:
    """The cheapest plan found within the capacity that uses these levels (indices into LEVELS, 0 among them), never
    dearer than the one that only drops cells.

    The first `sink_scales` scales stay whole: as many as the costs were measured with, or more. Programs in whole
    numbers, which improve a plan that is there already, take at most so many seconds together. Raises StatisticsError
    for fewer sinks, and BudgetError when they alone do not fit.
    """
    (unit, statistics), ends = _scaled(statistics), time.monotonic() + seconds
    found = _allocate(Pricing(statistics, levels, sink_scales), capacity, ends)
    if tuple(levels) == (0,):
        return found.times(unit)
    whole_only = Pricing(statistics, (0,), sink_scales)
    if _cheapest_paths(whole_only, capacity, found.row_prices)[1] >= found.cost:
        return found.times(unit)
    dropping = _allocate(whole_only, capacity, ends)
    if dropping.cost < found.cost:
        found = replace(found, level=dropping.level, cost=dropping.cost, bound=min(found.bound, dropping.cost))
    return found.times(unit)


def level_bound(
    statistics: LevelStatistics,
    capacity: Capacity,
    levels: tuple[int, ...] = ALL_LEVELS,
    sink_scales: int | None = None,
) -> tuple[float, FloatArray]:
    """What no plan within the capacity costs less than, and the prices of the capacity's rows that prove it.

    The best plan is little above it, and it is found sooner. Raises what `allocate_levels` raises.
    """
    unit, statistics = _scaled(statistics)
    relaxed = _relax(Pricing(statistics, levels, sink_scales), capacity)
    return relaxed.bound * unit, relaxed.row_prices * unit


def level_price_bound(
    statistics: LevelStatistics,
    capacity: Capacity,
    levels: tuple[int, ...],
    row_prices: FloatArray,
    sink_scales: int | None = None,
) -> float:
    """No plan costs less, whatever the prices (>= 0): every head takes its cheapest path, and room earns its price."""
    unit, statistics = _scaled(statistics)
    return _cheapest_paths(Pricing(statistics, levels, sink_scales), capacity, row_prices / unit)[1] * unit


def _scaled(statistics: LevelStatistics) -> tuple[float, LevelStatistics]:
    """A power of two, and the costs divided by it where they are so small or large that sums would lose digits."""
    sums = (*statistics.joint_sum, statistics.single_sum)
    _, exponent = np.frexp(max(float(costs.max(initial=0)) for costs in sums))
    if abs(exponent) < 400:
        return 1.0, statistics
    *joint, single = (np.ldexp(costs, -exponent) for costs in sums)
    return float(np.ldexp(1.0, exponent)), replace(statistics, joint_sum=tuple(joint), single_sum=single)


def _cheapest_paths(pricing: Pricing, capacity: Capacity, row_prices: FloatArray) -> tuple[Paths, float]:
    """The cheapest paths under prices of the capacity's rows, and the bound that these prove, rounding allowed for."""
    paths, cost_P = pricing.best(_prices_of_heads(capacity, row_prices))
    priced, room = float(cost_P.sum()), float(row_prices @ capacity.row_room)
    return paths, priced - room - ROUNDING * (priced + room)


def _prices_of_heads(capacity: Capacity, row_prices: FloatArray) -> FloatArray:
    """What a token costs every head for every target, (P, T)."""
    return capacity.token_prices(row_prices).reshape(-1, capacity.scales)


class _Master:
    """The columns found so far, and the program that mixes them within the capacity."""

    def __init__(self, capacity: Capacity, scale: float) -> None:
        self.capacity, self.scale = capacity, scale
        self.heads = capacity.layers * capacity.heads
        self._unit = float(max(capacity.tokens))  # rows of similar size are kinder to the solver
        self._added: list[Paths] = []

    def add(self, paths: Paths) -> None:
        """Add one column of every head."""
        self._added.append(paths)

    def columns(self) -> tuple[IntArray, Paths]:
        """The head of every column, and all columns."""
        return np.tile(np.arange(self.heads), len(self._added)), concatenated(self._added)

    def _program(self, head: IntArray, columns: Paths) -> LinearProgram:
        """Over the shares of these columns and the token-heads that they hold for every layer and target."""
        capacity, count, sums = self.capacity, len(head), self.capacity.layers * self.capacity.scales
        one_each = sparse.hstack([one_per_head(head, self.heads), sparse.csr_array((self.heads, sums))])
        held = -column_use(capacity, head, columns.tokens).T / self._unit
        return LinearProgram(
            cost=np.concatenate([columns.cost / self.scale, np.zeros(sums)]),
            equal=sparse.vstack([one_each, sparse.hstack([held, sparse.eye_array(sums)])], format="csr"),
            right=np.concatenate([np.ones(self.heads), np.zeros(sums)]),
            limits=sparse.hstack([sparse.csr_array((len(capacity.row_room), count)), capacity.rows], format="csr"),
            most=capacity.row_room / self._unit,
            upper=np.full(count + sums, np.inf),
        )

    def relax(self) -> tuple[float, FloatArray, FloatArray] | None:
        """Cost of the best mix, the prices of the capacity's rows, and the shares of the columns; None where that takes
        too long."""
        head, columns = self.columns()
        best = self._program(head, columns).solve()
        if best is None:
            return None
        return best.cost * self.scale, best.prices * self.scale / self._unit, best.x[: len(head)]

    def choose(self, allowed: IntArray, ends: float) -> IntArray | None:
        """A cheap choice of one of the allowed columns per head, as indices into them all; None when none was found by
        the time that the clock says `ends`."""
        head, columns = self.columns()
        program = self._program(head[allowed], columns[allowed])
        is_column = np.arange(len(program.cost)) < len(allowed)
        program.upper[is_column] = 1.0
        _, x = program.solve_whole(is_column, ends, mip_rel_gap=GOAL, node_limit=MAX_NODES)
        return None if x is None else by_head(allowed[x[: len(allowed)] > 0.5], head)


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """The master program at its optimum, or the cheapest plan of all where that fits the capacity."""

    master: _Master
    bound: float
    row_prices: FloatArray
    unlimited: Paths | None = None


def _relax(pricing: Pricing, capacity: Capacity) -> _Relaxed:
    """Generate columns until the master program is at its bound. Raises BudgetError when the sinks do not fit."""
    shape = (pricing.heads, capacity.scales)
    nothing, _ = pricing.best(np.full(shape, pricing.prohibitive))
    capacity.check_sinks(nothing.tokens, pricing.sinks)
    total = float(nothing.cost.sum())
    scale = total / 100 if total > 0 else 1.0
    master = _Master(capacity, scale)
    best_prices = np.zeros(len(capacity.row_room))
    everything, bound = _cheapest_paths(pricing, capacity, best_prices)
    if capacity.slack(everything.tokens).min() >= 0:
        return _Relaxed(master, bound, best_prices, everything)
    master.add(nothing)  # which always fits
    # a first idea of what is worth its tokens
    for price in total / max(capacity.row_room.max(), 1.0) * 4.0 ** np.arange(-6, 4):
        master.add(pricing.best(np.full(shape, price))[0])
    before = np.array([])
    for _ in range(MAX_ROUNDS):
        mix = master.relax()
        if mix is None:
            break
        mixed, prices, _ = mix
        master.scale = max(mixed / 100, 1e-8 * scale)  # costs stay far above the solver's tolerance
        if np.array_equal(prices, before):  # the columns that they led to are nothing new
            break
        before = prices
        paths, lagrangian = _cheapest_paths(pricing, capacity, prices)
        if lagrangian > bound:
            bound, best_prices = lagrangian, prices
        if mixed - bound <= TOLERANCE * max(mixed, 0.0) + 1e-12 * scale:
            break
        master.add(paths)
    return _Relaxed(master, bound, best_prices)


def _allocate(pricing: Pricing, capacity: Capacity, ends: float) -> LevelAllocation:
    """The cheapest plan that was found with the levels of the pricing."""
    relaxed = _relax(pricing, capacity)
    bound, chosen = relaxed.bound, relaxed.unlimited
    if chosen is None:
        chosen = _rounded(relaxed, pricing, capacity, ends)
        if chosen.cost.sum() - bound > PROVEN * chosen.cost.sum():
            chosen, bound = closer(pricing, capacity, bound, relaxed.row_prices, chosen, ends)
    cost, scales = float(chosen.cost.sum()), capacity.scales
    level = chosen.level.reshape(capacity.layers, capacity.heads, scales, scales).astype(np.int64)
    return LevelAllocation(level, cost, min(bound, cost), relaxed.row_prices)


def _rounded(relaxed: _Relaxed, pricing: Pricing, capacity: Capacity, ends: float) -> Paths:
    """A whole plan from the master program's mix: rounded and improved, then a small program over what is left."""
    master, bound = relaxed.master, relaxed.bound
    mix = master.relax()
    shares = np.zeros(0) if mix is None else mix[2]
    price_PT = _prices_of_heads(capacity, relaxed.row_prices)
    for factor in NEARBY:
        master.add(pricing.best(price_PT * factor)[0])
    head, columns = master.columns()
    rounding = Rounding(capacity, head, columns)
    shares_BP = np.concatenate([shares, np.zeros(len(head) - len(shares))]).reshape(-1, pricing.heads)
    largest = len(shares_BP) - 1 - shares_BP[::-1].argmax(axis=0)  # of equal ones the last
    nothing = np.arange(pricing.heads)  # the first columns, which always fit
    starts = (rounding.run(largest * pricing.heads + nothing), rounding.run(nothing))
    best = min((plan for plan in starts if plan is not None), key=rounding.cost)
    priced = columns.cost + (columns.tokens * price_PT[head]).sum(axis=1)
    # a plan with a column costs at least so much more than the bound
    regret_C = priced - pricing.best(price_PT)[1][head]
    best = rounding.kick(best, regret_C, bound)
    cost = rounding.cost(best)
    if cost - bound <= GOAL * cost:
        return columns[best]
    allowed = bound + regret_C <= cost  # no other column can be part of a cheaper plan
    allowed[best] = True
    whole = master.choose(np.flatnonzero(allowed), ends)
    whole = None if whole is None else rounding.run(whole)  # the solver may exceed a room by its tolerance
    return columns[whole if whole is not None and rounding.cost(whole) < cost else best]
