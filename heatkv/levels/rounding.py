"""Whole plans, one path per head, from what a program over paths leaves fractional.

Arrays: P heads of the model (L x H), T targets, C columns (paths, each of one head).
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from heatkv.core.schema import BoolArray, FloatArray, IntArray
from heatkv.levels.pricing import Paths, Pricing, concatenated
from heatkv.solve.checkpoints import Capacity
from heatkv.solve.highs import LinearProgram

GOAL = 2.5e-3
"""A whole plan this close to the bound is good enough."""
PROVEN = 4.9e-3
"""A plan whose gap is larger gets another program that raises the bound, where that is cheap."""
MAX_SWEEPS, MAX_KICKS = 2, 100
MAX_NODES = 50
MAX_NEAR, MAX_PROGRAM, MAX_PROGRAMS = 200_000, 10_000, 5
"""Paths to look through for that program, columns that it may have, and how often it may get more rows."""


def one_per_head(head_C: IntArray, heads: int) -> sparse.csr_array:
    """Rows (heads, C) that count the columns of every head."""
    return sparse.csr_array((np.ones(len(head_C)), (head_C, np.arange(len(head_C)))), shape=(heads, len(head_C)))


def column_use(capacity: Capacity, head_C: IntArray, tokens_CT: IntArray) -> sparse.csr_array:
    """Token-heads that a column adds to every (layer, target), (C, L * T)."""
    scales = capacity.scales
    columns = np.repeat(np.arange(len(head_C)), scales)
    return sparse.csr_array(
        (tokens_CT.ravel().astype(np.float64), (columns, _layer_targets(capacity, head_C).ravel())),
        shape=(len(head_C), capacity.layers * scales),
    )


def _layer_targets(capacity: Capacity, head_C: IntArray) -> IntArray:
    """Indices of (layer, target) of every column, (C, T)."""
    indices: IntArray = (head_C // capacity.heads)[:, None] * capacity.scales + np.arange(capacity.scales)
    return indices


class Rounding:
    """One column per head, made to fit and then improved by exchanging one head's column at a time."""

    def __init__(self, capacity: Capacity, head_C: IntArray, columns: Paths) -> None:
        self.capacity, self.head_C, self.columns = capacity, head_C, columns
        self._layer_targets_CT = _layer_targets(capacity, head_C)
        self._row, self._layer_target_of_row = capacity.rows.nonzero()

    def cost(self, chosen_P: IntArray) -> float:
        return float(self.columns.cost[chosen_P].sum())

    def run(self, chosen_P: IntArray) -> IntArray | None:
        """The columns, made to fit and improved; None when no exchange makes them fit."""
        capacity, columns, head_C = self.capacity, self.columns, self.head_C
        chosen = chosen_P.copy()
        slack = capacity.slack(columns.tokens[chosen])
        for _ in range(20 * len(chosen)):
            now = chosen[head_C]
            more_tokens, more_cost = columns.tokens - columns.tokens[now], columns.cost - columns.cost[now]
            broken = bool(slack.min() < 0)
            exchange = self._relief if broken else self._saving
            column = exchange(slack, more_tokens, more_cost)
            if column is None:
                return None if broken else chosen
            use = column_use(capacity, head_C[[column]], more_tokens[[column]])
            slack = slack - (use @ capacity.rows.T).toarray()[0]
            chosen[head_C[column]] = column
        return None if slack.min() < 0 else chosen

    def _fits(self, slack: FloatArray, candidates: IntArray, more_tokens_CT: IntArray) -> IntArray:
        """The candidates that break no row that is not broken yet."""
        room = np.full(self.capacity.rows.shape[1], np.inf)
        counts = slack[self._row] >= 0
        np.minimum.at(room, self._layer_target_of_row[counts], slack[self._row[counts]])
        fitting: IntArray = candidates[
            (more_tokens_CT[candidates] <= room[self._layer_targets_CT[candidates]]).all(axis=1)
        ]
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
        """A plan no dearer: force one column after another into it, those of least regret under the prices first, and
        keep what is cheaper once it fits again, until the plan is close to the bound."""
        cost = self.cost(chosen)
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
                if plan is not None and self.cost(plan) < cost:
                    chosen, cost = plan, self.cost(plan)
            if cost == before:
                break
        return chosen


def closer(
    pricing: Pricing, capacity: Capacity, bound: float, row_prices: FloatArray, plan: Paths, ends: float = np.inf
) -> tuple[Paths, float]:
    """A plan no dearer and a bound no lower, from a program over every path that a plan could have which costs less
    than the bound that is wanted; both as they were when there are too many.

    Where heads are few, what the master program leaves fractional is a large part of the cost. The program starts with
    the capacity's rows that have a price, which bounds all plans, and gets those that its own plan breaks. It ends when
    the clock says `ends`.
    """
    cost = float(plan.cost.sum())
    wanted = (1 - PROVEN) * cost
    shape = (pricing.heads, capacity.scales)
    found = pricing.near(capacity.token_prices(row_prices).reshape(shape), wanted - bound, MAX_NEAR)
    if found is None:
        return plan, bound
    head, near = found
    rounding = Rounding(capacity, np.concatenate([np.arange(pricing.heads), head]), concatenated([plan, near]))
    used_rows = row_prices > 0
    for _ in range(MAX_PROGRAMS):
        counts_PT = capacity.token_prices(used_rows.astype(np.float64)).reshape(shape) > 0
        kept = undominated(head, near, counts_PT)
        if len(kept) > MAX_PROGRAM:
            break
        lowest, chosen = _cheapest_of_near(capacity, used_rows, head[kept], near[kept], cost, ends)
        bound = max(bound, min(wanted, lowest))
        if chosen is None:
            break
        fitting = rounding.run(pricing.heads + kept[chosen])
        if fitting is not None and rounding.cost(fitting) < plan.cost.sum():
            plan = rounding.columns[fitting]
        broken_rows = capacity.slack(near.tokens[kept[chosen]]) < 0
        if bound >= (1 - PROVEN) * plan.cost.sum() or bound == wanted or not broken_rows.any():
            break
        used_rows |= broken_rows
    return plan, bound


def _cheapest_of_near(
    capacity: Capacity, used_rows: BoolArray, head_C: IntArray, paths: Paths, cost: float, ends: float
) -> tuple[float, IntArray | None]:
    """What no choice of one path per head within these rows costs less than, and a cheap choice."""
    heads, count = capacity.layers * capacity.heads, len(head_C)
    use = column_use(capacity, head_C, paths.tokens) @ capacity.rows[used_rows].T
    program = LinearProgram(
        cost=paths.cost / cost,
        equal=one_per_head(head_C, heads),
        right=np.ones(heads),
        limits=sparse.csr_array(use.T),
        most=capacity.row_room[used_rows],
        upper=np.ones(count),
    )
    lowest, x = program.solve_whole(np.ones(count, dtype=bool), ends, mip_rel_gap=PROVEN, node_limit=MAX_NODES)
    # less what the solver may be off by: its gap, and its tolerance of every head's price
    return (lowest - 1e-6 - 1e-7 * heads) * cost, None if x is None else by_head(np.flatnonzero(x > 0.5), head_C)


def by_head(chosen: IntArray, head_C: IntArray) -> IntArray:
    """The chosen columns in the order of their heads."""
    ordered: IntArray = chosen[np.argsort(head_C[chosen], kind="stable")]
    return ordered


def undominated(head_C: IntArray, paths: Paths, counts_PT: BoolArray) -> IntArray:
    """Indices of the paths that no other of the head beats in cost and in the tokens of all targets that count."""
    kept = []
    tokens = np.where(counts_PT[head_C], paths.tokens, 0)
    order = np.lexsort((*tokens.T, paths.cost, head_C))  # what comes later is at best lighter
    for columns in np.split(order, np.flatnonzero(np.diff(head_C[order])) + 1):
        lightest, count = np.empty_like(tokens[columns]), 0
        for column in columns:
            if not (lightest[:count] <= tokens[column]).all(axis=1).any():
                lightest[count], count = tokens[column], count + 1
                kept.append(column)
    return np.array(kept)
