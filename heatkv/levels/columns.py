"""The best plan with levels for a budget: column generation over whole paths of every head.

A path says at which level one head holds each source for every target; levels only fall. A master program mixes paths
within the capacity; its prices say what a token costs, and exact dynamic programming finds the best path of every head
under them. Arrays: P heads of the model (L x H), T targets, K combinations of a target, S sources; costs are those of
LevelStatistics.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from heatkv.core.levels import LEVELS, NONE, LevelChoices
from heatkv.core.plan import Plan
from heatkv.core.statistics import LevelStatistics
from heatkv.errors import PlanError, StatisticsError
from heatkv.solve.cells import Capacity

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MAX_ROUNDS = 80
TOLERANCE = 5e-4
"""Rounds end when the master program is this close to its bound, as a share of it."""
NEARBY = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5)
MAX_SWEEPS, MAX_KICKS = 2, 100
MAX_NODES = 50
GOAL = 2.5e-3
"""A whole plan this close to the bound is good enough."""
PROVEN = 4.9e-3
"""A plan whose gap is larger gets another program that raises the bound, where that is cheap."""
MAX_NEAR, MAX_PROGRAM, MAX_PROGRAMS = 200_000, 10_000, 5
"""Paths to look through for that program, columns that it may have, and how often it may get more rows."""
INFEASIBLE = 2  # a status of milp
_BLOCK = 2_000_000


def _milp(*arguments: Any, **options: Any) -> Any:
    """scipy's milp without the lines that HiGHS prints past Python, whatever its options, as it repairs a solution."""
    with _nothing_printed():
        return milp(*arguments, **options)


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Standard output of the whole process, C programs included, leads nowhere."""
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush  # C keeps what it prints in a buffer of its own
    flush(None)
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing can be printed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True, eq=False)
class LevelAllocation:
    """The plan `level[l, h, t, s]` (NONE where not held), its cost, and a bound that no plan can be below."""

    level: IntArray
    cost: float
    bound: float
    row_prices: FloatArray

    @property
    def gap(self) -> float:
        """Share of the cost that a better plan could save at most; 0 is proven optimal."""
        return max(0.0, (self.cost - self.bound) / self.cost) if self.cost > 0 else 0.0

    def last_reads(self) -> list[IntArray]:
        """`last_read` of every level, fine to coarse."""
        scales = self.level.shape[2]
        past = np.arange(scales)[:, None] > np.arange(scales)
        return [np.arange(scales) + (past & (self.level <= index)).sum(axis=2) for index in range(len(LEVELS))]


@dataclass(frozen=True, eq=False)
class _Paths:
    """One path per head: levels (P, T, S), cost (P,), tokens held for every target (P, T)."""

    level: NDArray[np.int8]
    cost: FloatArray
    tokens: IntArray

    def of(self, which: IntArray) -> _Paths:
        return _Paths(self.level[which], self.cost[which], self.tokens[which])


def _together(paths: Sequence[_Paths]) -> _Paths:
    return _Paths(
        np.concatenate([some.level for some in paths]),
        np.concatenate([some.cost for some in paths]),
        np.concatenate([some.tokens for some in paths]),
    )


class _Pricing:
    """Exact dynamic programming over targets, for all heads at once.

    Sinks beyond those of the costs are sources that may only be full.
    """

    def __init__(self, statistics: LevelStatistics, levels: tuple[int, ...], sink_scales: int) -> None:
        self.choices = choices = statistics.choices
        self.scales = len(choices.schedule)
        self.heads = statistics.layers * statistics.heads
        self.tokens = [choices.tokens(source) for source in range(self.scales)]
        self.sinks = sink_scales
        self.first = self.sinks + 1
        self.unpriced_tokens = [
            sum(choices.schedule.tokens[: target if target < self.first else choices.sink_scales])
            for target in range(self.scales)
        ]
        self.table = [choices.combinations(target) for target in range(self.scales)]
        may_SV = np.zeros((self.scales, NONE + 1), dtype=bool)
        may_SV[:, [*levels, NONE]] = True
        may_SV[: self.sinks, 1:] = False
        self.joint = []
        self.single: list[dict[int, FloatArray]] = []
        for target in range(self.scales):
            cost = statistics.joint[target].reshape(self.heads, -1).copy()
            sources = np.array(choices.joint_sources(target), dtype=np.int64)
            cost[:, ~may_SV[sources, self.table[target]].all(axis=1)] = np.inf
            self.joint.append(cost)
            of_target = {}
            for source in choices.other_sources(target):
                alone = statistics.single[:, :, target, source].reshape(self.heads, -1).copy()
                possible = may_SV[source] & np.isin(np.arange(NONE + 1), choices.of_other(source))
                alone[:, ~possible] = np.inf
                of_target[source] = alone
            self.single.append(of_target)
        self.joint_tokens = [
            sum(
                (self.tokens[s][table[:, i]] for i, s in enumerate(choices.joint_sources(t))),
                np.zeros(len(table), dtype=np.int64),
            )
            for t, table in enumerate(self.table)
        ]

    @property
    def prohibitive(self) -> float:
        """A price per token that no saving is worth."""
        costs = [*self.joint, *(cost for of_target in self.single for cost in of_target.values())]
        highest = [np.where(np.isfinite(cost), cost, 0).max() for cost in costs]
        return 1.0 + 2.0 * float(np.sum(highest))

    def best(self, price_PT: FloatArray) -> tuple[_Paths, FloatArray]:
        """The paths that are cheapest with tokens at these prices, and their cost with the tokens, (P,)."""
        joint, alone = self._backward(price_PT)
        paths = self._forward(joint, alone)
        return paths, paths.cost + (paths.tokens * price_PT).sum(axis=1)

    def _backward(self, price_PT: FloatArray) -> tuple[list[FloatArray], list[dict[int, FloatArray]]]:
        """Cost to go from every combination of every target, and from every level of a source that is alone."""
        scales = self.scales
        joint: list[FloatArray] = [np.zeros((self.heads, 1))] * scales
        alone: list[dict[int, FloatArray]] = [{} for _ in range(scales + 1)]
        for target in range(scales - 1, self.first - 1, -1):
            price = price_PT[:, target, None]
            for source, cost in self.single[target].items():
                to_go = cost + price * self.tokens[source]
                if target + 1 < scales:
                    to_go = to_go + _from_here(alone[target + 1][source])
                alone[target][source] = to_go
            value = self.joint[target] + price * self.joint_tokens[target]
            if target + 1 < scales:
                value = value + self._continue(target, joint[target + 1], alone[target + 1])
            joint[target] = value
        return joint, alone

    def _continue(self, target: int, next_PK: FloatArray, alone: dict[int, FloatArray]) -> FloatArray:
        """Cheapest continuation from every combination of `target` into the next target, (P, K)."""
        choices = self.choices
        now, then = choices.joint_sources(target), choices.joint_sources(target + 1)
        value = next_PK.reshape(self.heads, *choices.shape(target + 1))
        if target in then:  # the new source starts at any level
            value = value.min(axis=1 + then.index(target))
        extra = np.zeros((self.heads, 1)) if target in then else alone[target].min(axis=1, keepdims=True)
        for axis in range(1, value.ndim):  # the others may only fall
            value = np.flip(np.minimum.accumulate(np.flip(value, axis), axis=axis), axis)
        for axis, source in enumerate(now, start=1):
            if source not in then:
                levels = list(choices.of_source(source))
                leaving = _from_here(alone[source])[:, levels]
                shape = [1] * (len(now) + 1)
                shape[0], shape[axis] = self.heads, len(levels)
                value = np.expand_dims(value, axis) + leaving.reshape(shape)
        return np.broadcast_to(value, (self.heads, *choices.shape(target))).reshape(self.heads, -1) + extra

    def _parts(self, target: int, joint: list[FloatArray], alone: list[dict[int, FloatArray]]) -> list[_Part]:
        """What a target chooses, one part independent of the other: the joint sources, then each that is alone."""
        of_joint = _Part(
            self.choices.joint_sources(target),
            self.table[target],
            self.joint[target],
            joint[target],
            self.joint_tokens[target],
        )
        every_level = np.arange(NONE + 1)[:, None]
        return [of_joint] + [
            _Part((source,), every_level, cost, alone[target][source], self.tokens[source])
            for source, cost in self.single[target].items()
        ]

    def _start(self, head_N: IntArray) -> _Paths:
        """Paths of these heads that hold nothing but the sinks, at no cost."""
        level = np.full((len(head_N), self.scales, self.scales), NONE, dtype=np.int8)
        for target in range(self.scales):
            level[:, target, : min(self.sinks, target)] = 0
        tokens = np.tile(np.asarray(self.unpriced_tokens, dtype=np.int64), (len(head_N), 1))
        return _Paths(level, np.zeros(len(head_N)), tokens)

    def _forward(self, joint: list[FloatArray], alone: list[dict[int, FloatArray]]) -> _Paths:
        """Follow the cheapest choices from the first target on."""
        heads = np.arange(self.heads)
        paths = self._start(heads)
        for target in range(self.first, self.scales):
            for part in self._parts(target, joint, alone):
                to_go = np.where(part.possible(target, paths.level), part.to_go, np.inf)
                paths = part.extend(target, paths, heads, heads, to_go.argmin(axis=1))
        return paths

    def near(self, price_PT: FloatArray, most_regret: float, most_paths: int) -> tuple[IntArray, _Paths] | None:
        """Every path that costs, with tokens at these prices, at most so much more than its head's cheapest, and its
        head; None when there are too many."""
        joint, alone = self._backward(price_PT)
        head = np.arange(self.heads)
        paths, regret = self._start(head), np.zeros(self.heads)
        for target in range(self.first, self.scales):
            for part in self._parts(target, joint, alone):
                before, chosen, regrets, count = [], [], [], 0
                step = max(1, _BLOCK // len(part.table))
                for begin in range(0, len(head), step):
                    block = slice(begin, begin + step)
                    to_go = np.where(part.possible(target, paths.level[block]), part.to_go[head[block]], np.inf)
                    more = regret[block, None] + to_go - to_go.min(axis=1, keepdims=True)
                    row, choice = np.nonzero(more <= most_regret)
                    count += len(row)  # every one of them is the beginning of at least one path
                    if count > most_paths:
                        return None
                    before.append(begin + row)
                    chosen.append(choice)
                    regrets.append(more[row, choice])
                parent = np.concatenate(before)
                head, regret = head[parent], np.concatenate(regrets)
                paths = part.extend(target, paths, parent, head, np.concatenate(chosen))
        return head, paths


@dataclass(frozen=True, eq=False)
class _Part:
    """A choice that a target makes for some sources: levels (K, sources), cost of every head and cost to go from there,
    (P, K), and tokens, (K,)."""

    sources: tuple[int, ...]
    table: IntArray
    cost: FloatArray
    to_go: FloatArray
    tokens: IntArray

    def possible(self, target: int, level_NTS: NDArray[np.int8]) -> NDArray[np.bool_]:
        """Which choices let no level rise, (N, K)."""
        possible = np.ones((len(level_NTS), len(self.table)), dtype=bool)
        for axis, source in enumerate(self.sources):
            if source < target - 1:  # the newest source starts at any level
                possible &= self.table[:, axis] >= level_NTS[:, target - 1, source, None]
        return possible

    def extend(self, target: int, paths: _Paths, parent: IntArray, head: IntArray, chosen: IntArray) -> _Paths:
        """The paths `parent`, of these heads, with this choice made."""
        level, tokens = paths.level[parent], paths.tokens[parent]
        level[:, target, list(self.sources)] = self.table[chosen]
        tokens[:, target] += self.tokens[chosen]
        return _Paths(level, paths.cost[parent] + self.cost[head, chosen], tokens)


def _from_here(to_go_PV: FloatArray) -> FloatArray:
    """Cheapest cost to go from a level when it may first fall."""
    return np.minimum.accumulate(to_go_PV[:, ::-1], axis=1)[:, ::-1]


class _Master:
    """The columns found so far, and the program that mixes them within the capacity."""

    def __init__(self, capacity: Capacity, heads: int, scale: float) -> None:
        self.capacity, self.heads, self.scale = capacity, heads, scale
        self.unit = float(max(capacity.tokens))
        self.paths: list[_Paths] = []
        self.head: list[IntArray] = []

    def add(self, paths: _Paths, which: IntArray) -> None:
        """Columns of the heads `which`."""
        self.paths.append(paths.of(which))
        self.head.append(which)

    def _program(
        self, allowed: IntArray | None = None
    ) -> tuple[FloatArray, sparse.csr_array, FloatArray, sparse.csr_array, FloatArray]:
        """Costs, equalities and limits over the columns (all, or some) and the token-heads held by every layer."""
        capacity, scales = self.capacity, self.capacity.scales
        head, columns = self.columns()
        if allowed is not None:
            head, columns = head[allowed], columns.of(allowed)
        count, sums = len(head), capacity.layers * scales
        one_each = sparse.csr_array((np.ones(count), (head, np.arange(count))), shape=(self.heads, count + sums))
        held = -column_use(capacity, head, columns.tokens).T / self.unit
        equal = sparse.vstack([one_each, sparse.hstack([held, sparse.eye_array(sums)])], format="csr")
        limits = sparse.hstack([sparse.csr_array((len(capacity.row_room), count)), capacity.rows], format="csr")
        right = np.concatenate([np.ones(self.heads), np.zeros(sums)])
        cost = np.concatenate([columns.cost / self.scale, np.zeros(sums)])
        return cost, equal, right, limits, capacity.row_room / self.unit

    def relax(self) -> tuple[float, FloatArray, FloatArray]:
        """Cost of the best mix, the prices of the capacity's rows, and the shares of the columns."""
        cost, equal, right, limits, room = self._program()
        solved = linprog(cost, A_ub=limits, b_ub=room, A_eq=equal, b_eq=right, bounds=(0, None), method="highs-ds")
        if solved.x is None:
            raise PlanError(f"the solver found no plan: {solved.message}")
        prices = np.maximum(-solved.ineqlin.marginals, 0) * self.scale / self.unit
        return (
            solved.fun * self.scale,
            prices,
            solved.x[: -self.capacity.layers * self.capacity.scales],
        )

    def columns(self) -> tuple[IntArray, _Paths]:
        """The head of every column, and all columns."""
        return np.concatenate(self.head), _together(self.paths)

    def whole(self, allowed: IntArray) -> IntArray | None:
        """A cheap choice of one of the allowed columns per head, as indices into them all; None when none was found."""
        cost, equal, right, limits, room = self._program(allowed)
        count = len(allowed)
        is_column = np.arange(len(cost)) < count
        solved = _milp(
            cost,
            integrality=is_column,
            bounds=Bounds(0, np.where(is_column, 1.0, np.inf)),
            constraints=[LinearConstraint(equal, right, right), LinearConstraint(limits, -np.inf, room)],
            options={"mip_rel_gap": GOAL, "node_limit": MAX_NODES},
        )
        if solved.x is None:
            return None
        head = np.concatenate(self.head)
        chosen: IntArray = allowed[solved.x[:count] > 0.5]
        of_heads: IntArray = chosen[np.argsort(head[chosen], kind="stable")]
        return of_heads


def column_use(capacity: Capacity, head_C: IntArray, tokens_CT: IntArray) -> sparse.csr_array:
    """Token-heads that a column adds to every (layer, target), (C, L * T)."""
    scales = capacity.scales
    holder = (head_C // capacity.heads)[:, None] * scales + np.arange(scales)
    columns = np.repeat(np.arange(len(head_C)), scales)
    return sparse.csr_array(
        (tokens_CT.ravel().astype(np.float64), (columns, holder.ravel())),
        shape=(len(head_C), capacity.layers * scales),
    )


class _Rounding:
    """One column per head, made to fit and then improved by exchanging one head's column at a time."""

    def __init__(self, capacity: Capacity, head_C: IntArray, columns: _Paths) -> None:
        self.capacity, self.head_C, self.columns = capacity, head_C, columns
        scales = capacity.scales
        self.holder_CT = (head_C // capacity.heads)[:, None] * scales + np.arange(scales)
        self.row, self.held_of_row = capacity.rows.nonzero()

    def run(self, chosen_P: IntArray) -> IntArray | None:
        """None when no exchange makes it fit."""
        capacity, columns, head_C = self.capacity, self.columns, self.head_C
        chosen = chosen_P.copy()
        shape = (capacity.layers, capacity.heads, capacity.scales)
        slack = capacity.slack(capacity.held(columns.tokens[chosen].reshape(shape)))
        for _ in range(20 * len(chosen)):
            now = chosen[head_C]
            more_tokens, more_cost = columns.tokens - columns.tokens[now], columns.cost - columns.cost[now]
            broken = bool(slack.min() < 0)
            column = (
                self._relief(slack, more_tokens, more_cost) if broken else self._saving(slack, more_tokens, more_cost)
            )
            if column is None:
                return None if broken else chosen
            use = column_use(capacity, head_C[[column]], more_tokens[[column]])
            slack = slack - (use @ capacity.rows.T).toarray()[0]
            chosen[head_C[column]] = column
        return None if slack.min() < 0 else chosen

    def _fits(self, slack: FloatArray, candidates: IntArray, more_tokens_CT: IntArray) -> IntArray:
        """The candidates that break no row that is not broken yet."""
        room = np.full(self.capacity.rows.shape[1], np.inf)
        counts = slack[self.row] >= 0
        np.minimum.at(room, self.held_of_row[counts], slack[self.row[counts]])
        fits = (more_tokens_CT[candidates] <= room[self.holder_CT[candidates]]).all(axis=1)
        fitting: IntArray = candidates[fits]
        return fitting

    def _saving(self, slack: FloatArray, more_tokens_CT: IntArray, more_cost_C: FloatArray) -> int | None:
        """The column that saves most of those that fit."""
        cheaper = self._fits(slack, np.flatnonzero(more_cost_C < 0), more_tokens_CT)
        return int(cheaper[more_cost_C[cheaper].argmin()]) if len(cheaper) else None

    def _relief(self, slack: FloatArray, more_tokens_CT: IntArray, more_cost_C: FloatArray) -> int | None:
        """The column that relieves broken rows most for its cost."""
        lighter = self._fits(slack, np.flatnonzero((more_tokens_CT < 0).any(axis=1)), more_tokens_CT)
        broken = np.flatnonzero(slack < 0)
        use = column_use(self.capacity, self.head_C[lighter], more_tokens_CT[lighter])
        after = slack[broken] - (use @ self.capacity.rows[broken].T).toarray()
        relief = np.minimum(after, 0).sum(axis=1) - slack[broken].sum()
        if not (relief > 0).any():
            return None
        least = 1e-12 * self.columns.cost.max() or 1.0
        worth = np.where(relief > 0, relief / np.maximum(more_cost_C[lighter], least), -1)
        return int(lighter[worth.argmax()])

    def kick(self, chosen: IntArray, regret_C: FloatArray, bound: float) -> IntArray:
        """Force one column after another into the plan, those first that cost the least under the prices, and keep
        what gets cheaper once it fits again, until the plan is close to the bound."""
        cost = float(self.columns.cost[chosen].sum())
        for _ in range(MAX_SWEEPS):
            before = cost
            for column in np.argsort(regret_C, kind="stable")[:MAX_KICKS]:
                if cost - bound <= GOAL * cost or bound + regret_C[column] >= cost:
                    break
                if chosen[self.head_C[column]] == column:
                    continue
                forced = chosen.copy()
                forced[self.head_C[column]] = column
                plan = self.run(forced)
                if plan is not None and self.columns.cost[plan].sum() < cost:
                    chosen, cost = plan, float(self.columns.cost[plan].sum())
            if cost == before:
                break
        return chosen


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """The master program at its optimum, or the cheapest plan of all where that fits the capacity."""

    master: _Master
    bound: float
    row_prices: FloatArray
    unlimited: _Paths | None = None


def _under_prices(pricing: _Pricing, capacity: Capacity, row_prices: FloatArray) -> tuple[_Paths, float]:
    """The cheapest paths under prices of the capacity's rows, and the bound these give: no plan costs less."""
    paths, reduced = pricing.best(capacity.token_prices(row_prices).reshape(pricing.heads, capacity.scales))
    return paths, float(reduced.sum() - row_prices @ capacity.row_room)


def _relaxed(pricing: _Pricing, capacity: Capacity) -> _Relaxed:
    """Generate columns until the master program is at its bound. Raises BudgetError when the sinks do not fit."""
    scales = capacity.scales
    shape = (capacity.layers, capacity.heads, scales)
    all_heads = np.arange(pricing.heads)

    nothing, _ = pricing.best(np.full((pricing.heads, scales), pricing.prohibitive))
    capacity.check_sinks(capacity.held(nothing.tokens.reshape(shape)), pricing.sinks)
    total = float(nothing.cost.sum())
    scale = total / 100 if total > 0 else 1.0
    master = _Master(capacity, pricing.heads, scale)
    everything, _ = pricing.best(np.zeros((pricing.heads, scales)))
    if capacity.slack(capacity.held(everything.tokens.reshape(shape))).min() >= 0:
        return _Relaxed(master, float(everything.cost.sum()), np.zeros(len(capacity.row_room)), everything)
    master.add(nothing, all_heads)
    # a first idea of what is worth its tokens
    for price in total / max(capacity.row_room.max(), 1.0) * 4.0 ** np.arange(-6, 4):
        master.add(pricing.best(np.full((pricing.heads, scales), price))[0], all_heads)
    bound, best_prices, before = -np.inf, np.zeros(len(capacity.row_room)), np.array([])
    for _ in range(MAX_ROUNDS):
        mixed, prices, _ = master.relax()
        master.scale = max(mixed / 100, 1e-8 * scale)  # costs stay far above the solver's tolerance
        if np.array_equal(prices, before):  # the columns that they led to are nothing new
            break
        before = prices
        paths, lagrangian = _under_prices(pricing, capacity, prices)
        if lagrangian > bound:
            bound, best_prices = lagrangian, prices
        if mixed - bound <= TOLERANCE * max(mixed, 0.0) + 1e-12 * scale:
            break
        master.add(paths, all_heads)
    return _Relaxed(master, bound, best_prices)


ALL_LEVELS = tuple(range(len(LEVELS)))


def _priced(statistics: LevelStatistics, levels: tuple[int, ...], sink_scales: int | None) -> _Pricing:
    measured = statistics.choices.sink_scales
    if sink_scales is not None and sink_scales < measured:
        raise StatisticsError(f"the level costs hold for {measured} sink scales or more, not for {sink_scales}")
    return _Pricing(statistics, levels, measured if sink_scales is None else sink_scales)


def cost_bound(
    statistics: LevelStatistics,
    capacity: Capacity,
    levels: tuple[int, ...] = ALL_LEVELS,
    sink_scales: int | None = None,
) -> float:
    """What no plan within the capacity costs less than; the best plan is little above it. Quicker than a plan."""
    return _relaxed(_priced(statistics, levels, sink_scales), capacity).bound


def capacity_prices(
    statistics: LevelStatistics,
    capacity: Capacity,
    levels: tuple[int, ...] = ALL_LEVELS,
    sink_scales: int | None = None,
) -> FloatArray:
    """Dual prices of the capacity's rows, in cost per token-head, at the bound of `cost_bound`."""
    return _relaxed(_priced(statistics, levels, sink_scales), capacity).row_prices


def level_price_bound(
    statistics: LevelStatistics,
    capacity: Capacity,
    levels: tuple[int, ...],
    row_prices: FloatArray,
    sink_scales: int | None = None,
) -> float:
    """No plan costs less, whatever the prices (>= 0): every head takes its cheapest path, and room earns its price."""
    return _under_prices(_priced(statistics, levels, sink_scales), capacity, row_prices)[1]


def levels_of_plan(plan: Plan) -> IntArray:
    """`level[l, h, t, s]` at which target t reads each cell under a plan, NONE where it does not."""
    geometry, scales = plan.geometry, len(plan.schedule)
    level = np.full((geometry.layers, geometry.heads, scales, scales), NONE)
    of_plan = np.array([*(LEVELS.index(name) for name, _ in plan.levels), NONE])
    for target in range(1, scales):
        level[:, :, target, :target] = of_plan[plan.level_read(target)]
    return level


def level_cost(statistics: LevelStatistics, level_LHTS: IntArray) -> float:
    """Cost of any plan `level[l, h, t, s]` that keeps the sinks whole.

    A level that a source has no cost for counts as one of as many tokens, with which it is the same. Raises PlanError
    where there is none.
    """
    choices = statistics.choices
    layer, head = np.indices(level_LHTS.shape[:2])
    cost = 0.0
    for target in range(choices.sink_scales + 1, len(choices.schedule)):
        combination = np.zeros_like(layer)
        for source in choices.joint_sources(target):
            known = choices.of_source(source)
            level_LH = _priced_level(choices, known, target, source, level_LHTS[:, :, target, source])
            combination = combination * len(known) + np.searchsorted(known, level_LH)
        cost += float(statistics.joint[target][layer, head, combination].sum())
        for source in choices.other_sources(target):
            known = choices.of_other(source)
            level_LH = _priced_level(choices, known, target, source, level_LHTS[:, :, target, source])
            cost += float(statistics.single[layer, head, target, source, level_LH].sum())
    return cost


def _priced_level(
    choices: LevelChoices, known: tuple[int, ...], target: int, source: int, level_LH: IntArray
) -> IntArray:
    """The levels, all of them known ones."""
    tokens = choices.tokens(source)
    same = [next((other for other in known if tokens[other] == held), -1) for held in tokens]
    found = np.where(np.isin(level_LH, known), level_LH, np.array(same)[level_LH])
    if (found < 0).any():
        layer, head = (int(i) for i in np.argwhere(found < 0)[0])
        raise PlanError(
            f"layer {layer}, head {head} holds source {source} at level {LEVELS[level_LH[layer, head]]} for target "
            f"{target}, which the level costs do not price; known there: "
            f"{', '.join(LEVELS[level] for level in known if level != NONE)}"
        )
    return found


def allocate_levels(
    statistics: LevelStatistics,
    capacity: Capacity,
    levels: tuple[int, ...] = ALL_LEVELS,
    sink_scales: int | None = None,
) -> LevelAllocation:
    """The cheapest plan within the capacity that uses these levels (indices into LEVELS, 0 among them), never dearer
    than the one that only drops cells.

    The first `sink_scales` scales stay whole: as many as the costs were measured with, or more. Raises StatisticsError
    for fewer, and BudgetError when the sinks alone do not fit.
    """
    found = _allocate(_priced(statistics, levels, sink_scales), capacity)
    if tuple(levels) == (0,):
        return found
    whole_only = _priced(statistics, (0,), sink_scales)
    if _under_prices(whole_only, capacity, found.row_prices)[1] >= found.cost:
        return found
    dropping = _allocate(whole_only, capacity)
    if dropping.cost >= found.cost:
        return found
    return LevelAllocation(dropping.level, dropping.cost, min(found.bound, dropping.cost), found.row_prices)


def _allocate(pricing: _Pricing, capacity: Capacity) -> LevelAllocation:
    """The cheapest plan that was found with the levels of the pricing."""
    relaxed = _relaxed(pricing, capacity)
    master, scales = relaxed.master, capacity.scales
    if relaxed.unlimited is not None:
        level = relaxed.unlimited.level.reshape(capacity.layers, capacity.heads, scales, scales).astype(np.int64)
        return LevelAllocation(level, relaxed.bound, relaxed.bound, relaxed.row_prices)
    shares = master.relax()[2]
    token_price = capacity.token_prices(relaxed.row_prices).reshape(pricing.heads, scales)
    for factor in NEARBY:  # finer steps to exchange when the mix is rounded
        master.add(pricing.best(token_price * factor)[0], np.arange(pricing.heads))
    shares = np.concatenate([shares, np.zeros(len(NEARBY) * pricing.heads)])
    return _integral(master, pricing, capacity, relaxed.bound, relaxed.row_prices, shares)


def _integral(
    master: _Master, pricing: _Pricing, capacity: Capacity, bound: float, prices: FloatArray, shares_C: FloatArray
) -> LevelAllocation:
    """A whole plan from the master program's mix: rounded and improved, then a small program over what is left."""
    head, columns = master.columns()
    rounding = _Rounding(capacity, head, columns)
    order = np.lexsort((shares_C, head))  # of every head the column with the largest share comes last
    largest = order[np.flatnonzero(np.append(head[order][1:] != head[order][:-1], True))]
    nothing = np.arange(pricing.heads)  # the first columns, which always fit
    found = [plan for plan in (rounding.run(largest), rounding.run(nothing)) if plan is not None]
    best = min(found, key=lambda plan: columns.cost[plan].sum())
    token_price = capacity.token_prices(prices).reshape(pricing.heads, capacity.scales)
    priced = columns.cost + (columns.tokens * token_price[head]).sum(axis=1)
    # a plan with a column costs at least so much more than the bound
    regret = priced - pricing.best(token_price)[1][head]
    best = rounding.kick(best, regret, bound)
    cost = float(columns.cost[best].sum())
    if cost - bound > GOAL * cost:
        allowed = bound + regret <= cost  # no other column can be part of a cheaper plan
        allowed[best] = True
        whole = master.whole(np.flatnonzero(allowed))
        whole = None if whole is None else rounding.run(whole)  # the solver may exceed a room by its tolerance
        if whole is not None and columns.cost[whole].sum() < cost:
            best, cost = whole, float(columns.cost[whole].sum())
    chosen = columns.of(best)
    if cost - bound > PROVEN * cost:
        chosen, bound = _closer(pricing, capacity, bound, prices, chosen)
    shape = (capacity.layers, capacity.heads, capacity.scales, capacity.scales)
    cost = float(chosen.cost.sum())
    return LevelAllocation(chosen.level.reshape(shape).astype(np.int64), cost, min(bound, cost), prices)


def _closer(
    pricing: _Pricing, capacity: Capacity, bound: float, prices: FloatArray, plan: _Paths
) -> tuple[_Paths, float]:
    """A plan no dearer and a bound no lower, from a program over every path that a plan could have which costs less
    than the bound that is wanted; both as they were when there are too many.

    Where heads are few, what the master program leaves fractional is a large part of the cost. The program starts with
    the capacity's rows that have a price, which bounds all plans, and gets those that its own plan breaks.
    """
    cost = float(plan.cost.sum())
    wanted = (1 - PROVEN) * cost
    token_price = capacity.token_prices(prices).reshape(pricing.heads, capacity.scales)
    found = pricing.near(token_price, wanted - bound, MAX_NEAR)
    if found is None:
        return plan, bound
    head, near = found
    both, head_of_both = _together([plan, near]), np.concatenate([np.arange(pricing.heads), head])
    rounding = _Rounding(capacity, head_of_both, both)
    shape = (capacity.layers, capacity.heads, capacity.scales)
    used = prices > 0
    for _ in range(MAX_PROGRAMS):
        counts = capacity.token_prices(used.astype(np.float64)).reshape(token_price.shape) > 0
        kept = _undominated(head, near, counts)
        if len(kept) > MAX_PROGRAM:
            break
        lowest, chosen = _program_of_near(capacity, used, head[kept], near.of(kept), cost)
        bound = max(bound, min(wanted, lowest))
        if chosen is None:
            break
        of_heads = kept[chosen]
        fitting = rounding.run(pricing.heads + of_heads)
        if fitting is not None and both.cost[fitting].sum() < plan.cost.sum():
            plan = both.of(fitting)
        broken = capacity.slack(capacity.held(near.tokens[of_heads].reshape(shape))) < 0
        if bound >= (1 - PROVEN) * plan.cost.sum() or bound == wanted or not broken.any():
            break
        used |= broken
    return plan, bound


def _program_of_near(
    capacity: Capacity, used_rows: NDArray[np.bool_], head_N: IntArray, paths: _Paths, cost: float
) -> tuple[float, IntArray | None]:
    """What no choice of one path per head within these rows costs less than, and a cheap choice."""
    heads, count = capacity.layers * capacity.heads, len(head_N)
    use = column_use(capacity, head_N, paths.tokens) @ capacity.rows[used_rows].T
    solved = _milp(
        paths.cost / cost,
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(sparse.csr_array((np.ones(count), (head_N, np.arange(count))), (heads, count)), 1, 1),
            LinearConstraint(sparse.csr_array(use.T), -np.inf, capacity.row_room[used_rows]),
        ],
        options={"mip_rel_gap": PROVEN, "node_limit": MAX_NODES},
    )
    if solved.status == INFEASIBLE:
        return np.inf, None
    # less what the solver may be off by
    lowest = -np.inf if solved.mip_dual_bound is None else (solved.mip_dual_bound - 1e-6) * cost
    if solved.x is None:
        return lowest, None
    chosen = np.flatnonzero(solved.x > 0.5)
    return lowest, chosen[np.argsort(head_N[chosen], kind="stable")]


def _undominated(head_N: IntArray, paths: _Paths, counts_PT: NDArray[np.bool_]) -> IntArray:
    """Indices of the paths that no other of the head beats in cost and in the tokens of all targets that count."""
    kept = []
    tokens = np.where(counts_PT[head_N], paths.tokens, 0)
    order = np.lexsort((*tokens.T, paths.cost, head_N))  # what comes later is at best lighter
    for of_head in np.split(order, np.flatnonzero(np.diff(head_N[order])) + 1):
        lightest, count = np.empty_like(tokens[of_head]), 0
        for path in of_head:
            if not (lightest[:count] <= tokens[path]).all(axis=1).any():
                lightest[count], count = tokens[path], count + 1
                kept.append(path)
    return np.array(kept)
