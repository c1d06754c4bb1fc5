"""The best plan of whole cells for a budget, with proof.

`allocate` solves a linear program over all cells: whether target t still reads cell (l, h, s), non-increasing in t, one
capacity row per checkpoint. Its bound certifies how far the integral plan can be from the best one. Arrays: L layers,
H heads, T scales; value[l, h, t, s] is what it is worth that target t reads source s, which is finite and not negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import minimize_scalar

from heatkv.core.plan import held_for_targets, keep_first
from heatkv.core.schema import FloatArray, IntArray
from heatkv.solve.checkpoints import Capacity, cumulative_value, fill
from heatkv.solve.highs import LinearProgram

EXACT_VARIABLES = 200
"""With at most this many variables a fractional optimum is solved again in whole numbers, to the end."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """A plan with its proof: no plan within the capacity is worth more than `bound`.

    `row_prices` are the dual prices of the capacity's rows, in value per token-head, at the bound.
    """

    last_read: IntArray
    value: float
    bound: float
    row_prices: FloatArray

    @property
    def gap(self) -> float:
        """Share of the bound that the plan may miss; 0 is proven optimal."""
        return max(0.0, (self.bound - self.value) / self.bound) if self.bound > 0 else 0.0


def read_value(last_read_LHT: IntArray, value_LHTT: FloatArray) -> float:
    """What a plan is worth: the sum of value[l, h, t, s] over all cells that targets read."""
    targets = np.arange(last_read_LHT.shape[2])
    reads = (last_read_LHT[:, :, None, :] >= targets[:, None]) & (targets[:, None] > targets)
    return float(value_LHTT[reads].sum())


def price_bound(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int, row_prices: FloatArray) -> float:
    """No plan is worth more, whatever the prices (>= 0): every cell takes what pays, and room costs its price."""
    tokens = np.asarray(capacity.tokens, dtype=np.float64)
    paid = capacity.token_prices(row_prices).cumsum(axis=2)  # for targets up to k
    scales = np.arange(capacity.scales)
    cost_LHSK = (paid[:, :, None, :] - paid[:, :, :, None]) * tokens[:, None]
    profit = np.where(scales >= scales[:, None], cumulative_value(value_LHTT) - cost_LHSK, -np.inf)
    sinks = profit[:, :, :sink_scales, -1].sum()
    free = profit[:, :, sink_scales:].max(axis=3).sum() if sink_scales < capacity.scales else 0.0
    return float(sinks + free + row_prices @ capacity.row_room)


def _start(capacity: Capacity, sink_scales: int) -> IntArray:
    """The plan of the sinks alone. Raises BudgetError when they do not fit."""
    start = keep_first((capacity.layers, capacity.heads, capacity.scales), sink_scales)
    capacity.check_sinks(held_for_targets([start], [capacity.tokens]), sink_scales)
    return start


def _allocation(last_read: IntArray, value: float, bound: float, row_prices: FloatArray, total: float) -> Allocation:
    """With the bound not below the value, nor above it by rounding only; `total` is the sum of all values."""
    return Allocation(last_read, value, value if bound - value <= 1e-13 * total else bound, row_prices)


def allocate(
    value_LHTT: FloatArray, capacity: Capacity, sink_scales: int, candidates: tuple[IntArray, ...] = ()
) -> Allocation:
    """The plan worth most within the capacity, from the linear program, rounded down and refilled.

    `candidates` are feasible plans; the result is never worth less than any of them. Small instances that the program
    leaves fractional are solved in whole numbers. Raises BudgetError when the sinks alone do not fit.
    """
    start = _start(capacity, sink_scales)
    if sink_scales >= capacity.scales - 1:  # nothing to decide
        value = read_value(start, value_LHTT)
        return Allocation(start, value, value, np.zeros(len(capacity.row_room)))
    program = _CellProgram(value_LHTT, capacity, start, sink_scales)
    rounded, row_prices = program.relax()
    bound = price_bound(value_LHTT, capacity, sink_scales, row_prices)
    plans = [fill(last_read, value_LHTT, capacity) for last_read in (rounded, *candidates)]
    best = max(plans, key=lambda plan: read_value(plan, value_LHTT))
    value = read_value(best, value_LHTT)
    if bound - value > 1e-9 * abs(bound) and program.variables <= EXACT_VARIABLES:
        exact = program.solve_whole()
        if exact is not None and read_value(exact, value_LHTT) >= value:
            best = fill(exact, value_LHTT, capacity)
            value = bound = read_value(best, value_LHTT)
    return _allocation(best, value, bound, row_prices, float(value_LHTT.sum()))


def allocate_greedily(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int) -> Allocation:
    """A good plan in a fraction of the time: cells in the order of value per token and target while they fit.

    The bound has one price for the checkpoints after the last layer, weighted by scarcity: the price with the lowest.
    Raises as `allocate` does.
    """
    plan = fill(_start(capacity, sink_scales), value_LHTT, capacity)
    unit = np.zeros(len(capacity.row_room))
    unit[capacity.layers - 1 : capacity.checkpoints : capacity.layers] = capacity.scarcity[1:]
    highest = float(np.max(value_LHTT / np.asarray(capacity.tokens)))

    def bound(log_price: float) -> float:
        return price_bound(value_LHTT, capacity, sink_scales, unit * np.exp(log_price))

    prices = np.zeros_like(unit)  # right where everything fits
    lowest_bound = price_bound(value_LHTT, capacity, sink_scales, prices)
    if highest > 0:
        limits = (np.log(highest) - 25, np.log(highest))
        found = minimize_scalar(bound, bounds=limits, method="bounded", options={"maxiter": 12})
        if found.fun < lowest_bound:
            lowest_bound, prices = float(found.fun), unit * np.exp(found.x)
    return _allocation(plan, read_value(plan, value_LHTT), lowest_bound, prices, float(value_LHTT.sum()))


class _CellProgram:
    """The linear program: x[l, h, s, t] in [0, 1] for every cell but the sinks, and held[l, t], their sums."""

    def __init__(self, value_LHTT: FloatArray, capacity: Capacity, start: IntArray, sink_scales: int) -> None:
        layers, heads, scales = start.shape
        scale = np.arange(scales)
        free_ST = (scale[:, None] >= sink_scales) & (scale > scale[:, None])
        layer, head, source, target = np.nonzero(np.broadcast_to(free_ST, (layers, heads, scales, scales)))
        self._start = start
        self._first = np.flatnonzero(target == source + 1)  # where each cell's variables begin
        self._cell = (layer[self._first], head[self._first], source[self._first])
        count, sums = len(layer), layers * scales
        unit = float(max(capacity.tokens))  # rows of similar size are kinder to the solver
        tokens = np.asarray(capacity.tokens, dtype=np.float64)[source] / unit
        added = sparse.csr_array((-tokens, (layer * scales + target, np.arange(count))), shape=(sums, count))
        later = np.flatnonzero(target > source + 1)
        identity = sparse.eye_array(count, format="csr")
        falls = identity[later] - identity[later - 1]
        left = capacity.slack(held_for_targets([start], [capacity.tokens]))
        worth = value_LHTT[layer, head, target, source]
        value_unit = max(float(worth.max()) / 100, 1e-300)
        self._units = value_unit, unit
        self._is_whole = np.arange(count + sums) < count
        self._program = LinearProgram(
            cost=np.concatenate([-worth / value_unit, np.zeros(sums)]),
            equal=sparse.csr_array(sparse.hstack([added, sparse.eye_array(sums)])),
            right=np.zeros(sums),
            limits=sparse.csr_array(sparse.block_diag([falls, capacity.rows])),
            most=np.concatenate([np.zeros(len(later)), left / unit]),
            upper=np.where(self._is_whole, 1.0, np.inf),
        )
        self.variables, self._capacity_rows = count, len(left)

    def relax(self) -> tuple[IntArray, FloatArray]:
        """The plan that reads only what the optimum holds whole, and the prices of the capacity's rows."""
        _, x, prices = self._program.solve()
        value_unit, unit = self._units
        return self._round_down(x), prices[-self._capacity_rows :] * value_unit / unit

    def solve_whole(self) -> IntArray | None:
        """The best plan, proven, for small instances."""
        _, x = self._program.solve_whole(self._is_whole, mip_rel_gap=0.0)
        return None if x is None else self._round_down(x)

    def _round_down(self, x: FloatArray) -> IntArray:
        whole = np.add.reduceat((x[: self.variables] > 1 - 1e-6).astype(np.int64), self._first)
        last_read = self._start.copy()
        last_read[self._cell] += whole
        return last_read
