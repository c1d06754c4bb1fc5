"""Making the best plan for a budget, with proof, and making any plan keep its promise.

`allocate` solves a linear program over all cells: whether target t still reads cell (l, h, s), non-increasing in t, one
capacity row per checkpoint. Its bound certifies how far the integral plan can be from the best one. Arrays: L layers,
H heads, T scales; value[l, h, t, s] is what it is worth that target t reads source s, which is finite and not negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp, minimize_scalar

from heatkv.core.plan import held_for_targets, keep_first
from heatkv.errors import BudgetError, PlanError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

EXACT_VARIABLES = 200
"""Up to so many variables a fractional optimum is solved again in whole numbers, to the end."""

_LARGEST_SUM = 1e300  # of all values; prices times room must stay finite


@dataclass(frozen=True, eq=False)
class Capacity:
    """The room at every checkpoint, in the whole cache and in single layers.

    `room` is how many token-heads the cache may hold at any checkpoint, `layer_room` how many a single layer may hold,
    if that is limited. A checkpoint (t, l) comes after layer l has run target t: layers up to l hold what target t+1
    reads, the others what target t reads.
    """

    layers: int
    heads: int
    tokens: tuple[int, ...]
    room: int
    layer_room: int | None = None

    @property
    def scales(self) -> int:
        return len(self.tokens)

    @property
    def checkpoints(self) -> int:
        """How many of `rows` are of the whole cache; those of layers follow."""
        return (self.scales - 1) * self.layers

    def held(self, tokens_LHT: IntArray) -> IntArray:
        """Token-heads that every layer holds for every target, (L, T), from those of every head."""
        held: IntArray = tokens_LHT.sum(axis=1)
        return held

    @cached_property
    def rows(self) -> sparse.csr_array:
        """Capacity rows over the variables held[l, t]: (checkpoint t, checkpoint l), then layers (L, T)."""
        layers, scales = self.layers, self.scales
        target, at, layer = np.meshgrid(np.arange(scales - 1), np.arange(layers), np.arange(layers), indexing="ij")
        reads = np.where(layer <= at, target + 1, target)
        rows = sparse.csr_array(
            (np.ones(reads.size), ((target * layers + at).ravel(), (layer * scales + reads).ravel())),
            shape=(self.checkpoints, layers * scales),
        )
        if self.layer_room is None:
            return rows
        return sparse.csr_array(sparse.vstack([rows, sparse.eye_array(layers * scales)]))

    @cached_property
    def row_room(self) -> FloatArray:
        """Right-hand side of `rows`."""
        room = np.full(self.checkpoints, float(self.room))
        if self.layer_room is None:
            return room
        return np.concatenate([room, np.full(self.layers * self.scales, float(self.layer_room))])

    def slack(self, held_LT: IntArray) -> FloatArray:
        """Room left in every row; negative where the promise is broken."""
        slack: FloatArray = self.row_room - self.rows @ held_LT.reshape(-1)
        return slack

    def check_sinks(self, held_LT: IntArray, sink_scales: int) -> None:
        """Raise BudgetError when what the sinks alone hold exceeds a room, naming that of the budget or of a layer."""
        slack = self.slack(held_LT)
        checkpoints = slack[: self.checkpoints]
        alone = f"the {sink_scales} sink scales alone hold"
        if checkpoints.min(initial=0) < 0:
            raise BudgetError(
                f"{alone} {-checkpoints.min():.0f} token-heads more than the budget's room of {self.room}; "
                "raise the budget or keep fewer sink scales"
            )
        if slack.min(initial=0) < 0:
            raise BudgetError(
                f"{alone} {-slack.min():.0f} token-heads more than a layer's cap of {self.layer_room}; raise the cap "
                "on layers or keep fewer sink scales"
            )

    def token_prices(self, row_prices: FloatArray) -> FloatArray:
        """What one token costs a head for every target it is held for, (L, H, T), under prices of the rows."""
        prices_LT = (self.rows.T @ row_prices).reshape(self.layers, self.scales)
        return np.repeat(prices_LT[:, None], self.heads, axis=1)


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


def _at_least(bound: float, value: float, value_LHTT: FloatArray) -> float:
    """The bound, not below the value, nor above it by rounding only."""
    return value if bound - value <= 1e-13 * float(value_LHTT.sum()) else bound


def read_value(last_read_LHT: IntArray, value_LHTT: FloatArray) -> float:
    """What a plan is worth: the sum of value[l, h, t, s] over all cells that targets read."""
    scales = last_read_LHT.shape[2]
    targets = np.arange(scales)[None, None, :, None]
    reads = (last_read_LHT[:, :, None, :] >= targets) & (targets > np.arange(scales))
    return float(value_LHTT[reads].sum())


def _cumulative_value(value_LHTT: FloatArray, sink_scales: int) -> FloatArray:
    """worth[l, h, s, k]: what cell (l, h, s) is worth when k is the last target that reads it (0 for k <= s)."""
    later = np.triu(np.ones(value_LHTT.shape[2:], dtype=bool), 1).T  # [t, s]: t > s
    worth: FloatArray = np.where(later, value_LHTT, 0).transpose(0, 1, 3, 2).cumsum(axis=3)
    worth[:, :, :sink_scales] = 0
    return worth


def price_bound(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int, row_prices: FloatArray) -> float:
    """No plan is worth more, whatever the prices (>= 0): every cell takes what pays, and room costs its price."""
    tokens = np.asarray(capacity.tokens, dtype=np.float64)
    worth = _cumulative_value(value_LHTT, 0)
    paid = capacity.token_prices(row_prices).cumsum(axis=2)  # for targets up to k
    scales = np.arange(capacity.scales)
    cost_LHSK = (paid[:, :, None, :] - paid[:, :, :, None]) * tokens[:, None]
    profit = np.where(scales >= scales[:, None], worth - cost_LHSK, -np.inf)
    sinks = profit[:, :, :sink_scales, -1].sum()
    free = profit[:, :, sink_scales:].max(axis=3).sum() if sink_scales < capacity.scales else 0.0
    return float(sinks + free + row_prices @ capacity.row_room)


def allocate(
    value_LHTT: FloatArray,
    capacity: Capacity,
    sink_scales: int,
    candidates: tuple[IntArray, ...] = (),
) -> Allocation:
    """The plan worth most within the capacity, from the linear program, rounded down and refilled.

    `candidates` are feasible plans; the result is never worth less than any of them. Small instances that the program
    leaves fractional are solved in whole numbers. Raises BudgetError when the sinks alone do not fit, PlanError for
    values of the wrong shape, not finite, negative, or too large to add up.
    """
    program = _Program(value_LHTT, capacity, sink_scales)
    if program.variables == 0:
        only = program.start
        value = read_value(only, value_LHTT)
        return Allocation(only, value, value, np.zeros(len(capacity.row_room)))
    shares, row_prices = program.relax()
    bound = price_bound(value_LHTT, capacity, sink_scales, row_prices)
    rounded = [program.round_down(shares), *candidates]
    plans = [fill(last_read, value_LHTT, capacity, sink_scales) for last_read in rounded]
    best = max(plans, key=lambda plan: read_value(plan, value_LHTT))
    value = read_value(best, value_LHTT)
    if bound - value > 1e-9 * abs(bound) and program.variables <= EXACT_VARIABLES:
        exact = program.solve_whole()
        if read_value(exact, value_LHTT) >= value:
            best = fill(exact, value_LHTT, capacity, sink_scales)
            value = read_value(best, value_LHTT)
            bound = value
    return Allocation(best, value, _at_least(bound, value, value_LHTT), row_prices)


def allocate_greedily(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int) -> Allocation:
    """A good plan in a fraction of the time: cells in the order of value per token and target while they fit.

    The bound prices the end of every scale that a full cache would overfill alike. Raises as `allocate` does.
    """
    layers, scales = capacity.layers, capacity.scales
    start = _checked_start(value_LHTT, capacity, sink_scales)
    plan = fill(start, value_LHTT, capacity, sink_scales)
    scarce = np.repeat(_scarce(capacity)[1:], layers).reshape(scales - 1, layers)
    scarce[:, :-1] = 0
    unit = np.zeros(len(capacity.row_room))
    unit[: capacity.checkpoints] = scarce.ravel()
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
    value = read_value(plan, value_LHTT)
    return Allocation(plan, value, _at_least(lowest_bound, value, value_LHTT), prices)


def _scarce(capacity: Capacity) -> FloatArray:
    """1 for every target before which a full cache would not fit, a little for the others, (T,)."""
    before = np.concatenate([[0], np.cumsum(capacity.tokens)[:-1]]) * capacity.layers * capacity.heads
    return np.where(before > capacity.room, 1.0, 1e-3)


def _checked_start(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int) -> IntArray:
    """The plan of the sinks alone, when they fit and the values can be planned with."""
    layers, heads, scales = capacity.layers, capacity.heads, capacity.scales
    if value_LHTT.shape != (layers, heads, scales, scales):
        raise PlanError(f"values have shape {value_LHTT.shape}; the cache needs {(layers, heads, scales, scales)}")
    wrong = np.argwhere(~(np.isfinite(value_LHTT) & (value_LHTT >= 0)))
    if len(wrong):
        layer, head, target, source = (int(i) for i in wrong[0])
        raise PlanError(
            f"the value of layer {layer}, head {head}, target {target}, source {source} is "
            f"{value_LHTT[layer, head, target, source]}; it must be finite and not negative"
        )
    with np.errstate(over="ignore"):
        total = float(value_LHTT.sum())
    if total > _LARGEST_SUM:
        raise PlanError(f"the values add up to {total:g}; scale them to a sum below {_LARGEST_SUM:g}")
    start = keep_first((layers, heads, scales), sink_scales)
    capacity.check_sinks(capacity.held(held_for_targets([start], [capacity.tokens])), sink_scales)
    return start


def fill(last_read_LHT: IntArray, value_LHTT: FloatArray, capacity: Capacity, sink_scales: int) -> IntArray:
    """Keep cells longer, in the order of value per token and target, while every checkpoint has room.

    Values of one cell are grouped over targets so that the order is consistent (upper concave hull); a group that does
    not fit whole is taken target by target.
    """
    layers, heads, scales = last_read_LHT.shape
    worth = _cumulative_value(value_LHTT, sink_scales).reshape(-1, scales)
    last_read = last_read_LHT.copy()
    flat = last_read.reshape(-1)
    weight = _scarce(capacity).cumsum()
    source = np.tile(np.arange(scales), layers * heads)
    open_cells = np.flatnonzero((flat < scales - 1) & (source < scales - 1))
    slack = capacity.slack(capacity.held(held_for_targets([last_read], [capacity.tokens])))
    room = slack[: capacity.checkpoints].reshape(scales - 1, layers)
    of_layer = slack[room.size :].reshape(layers, scales) if capacity.layer_room is not None else None

    # segments of the hull: from where a cell ends now to the target with the steepest mean value, and on from there
    segments: list[tuple[IntArray, IntArray, FloatArray]] = []
    cells, ends = open_cells, flat[open_cells].copy()
    sizes = np.asarray(capacity.tokens, dtype=np.float64)
    while len(cells):
        later = np.arange(scales) > ends[:, None]
        gain = worth[cells] - np.take_along_axis(worth[cells], ends[:, None], axis=1)
        cost = (weight - weight[ends][:, None]) * sizes[source[cells]][:, None]
        slope = np.where(later, gain / np.where(later, cost, 1), -np.inf)
        to = scales - 1 - slope[:, ::-1].argmax(axis=1)  # of equal ones the longest
        steepest = np.take_along_axis(slope, to[:, None], axis=1)[:, 0]
        segments.append((cells, to, steepest))
        more = to < scales - 1
        cells, ends = cells[more], to[more]
    if not segments:
        return last_read
    cell_of, to_of, slope_of = (np.concatenate([part[i] for part in segments]) for i in range(3))
    for at in np.lexsort((to_of, -slope_of)):
        cell, to = int(cell_of[at]), int(to_of[at])
        layer, size = cell // (scales * heads), capacity.tokens[cell % scales]
        for target in range(int(flat[cell]) + 1, to + 1):
            fits = room[target - 1, layer:].min() >= size
            if fits and target < scales - 1 and layer:
                fits = room[target, :layer].min() >= size
            if fits and of_layer is not None:
                fits = of_layer[layer, target] >= size
            if not fits:
                break
            room[target - 1, layer:] -= size
            if target < scales - 1:
                room[target, :layer] -= size
            if of_layer is not None:
                of_layer[layer, target] -= size
            flat[cell] = target
    return last_read


class _Program:
    """The linear program: x[l, h, s, t] in [0, 1] for every cell but the sinks, and held[l, t], their sums."""

    def __init__(self, value_LHTT: FloatArray, capacity: Capacity, sink_scales: int) -> None:
        layers, heads, scales = capacity.layers, capacity.heads, capacity.scales
        self.capacity = capacity
        self.start = _checked_start(value_LHTT, capacity, sink_scales)
        layer, head, source, target = (
            axis.ravel()
            for axis in np.meshgrid(
                np.arange(layers),
                np.arange(heads),
                np.arange(sink_scales, scales - 1),
                np.arange(scales),
                indexing="ij",
            )
        )
        later = target > source
        layer, head, source, target = layer[later], head[later], source[later], target[later]
        count = self.variables = len(layer)
        self._first = np.flatnonzero(target == source + 1)  # where each cell's variables begin
        self._cell = (layer[self._first], head[self._first], source[self._first])
        sums = layers * scales
        self._unit = float(max(capacity.tokens))  # rows of similar size are kinder to the solver
        tokens = np.asarray(capacity.tokens, dtype=np.float64)[source] / self._unit
        holder = layer * scales + target
        columns = np.arange(count)
        self._sums = sparse.hstack(
            [sparse.csr_array((-tokens, (holder, columns)), shape=(sums, count)), sparse.eye_array(sums)], format="csr"
        )
        later_step = np.flatnonzero(target > source + 1)
        falls = np.arange(len(later_step))
        falling = sparse.csr_array(
            (
                np.concatenate([np.ones(len(falls)), -np.ones(len(falls))]),
                (np.concatenate([falls, falls]), np.concatenate([later_step, later_step - 1])),
            ),
            shape=(len(falls), count + sums),
        )
        room = sparse.hstack([sparse.csr_array((len(capacity.row_room), count)), capacity.rows])
        self._limits = sparse.csr_array(sparse.vstack([falling, room]))
        left = capacity.slack(capacity.held(held_for_targets([self.start], [capacity.tokens])))
        self._most = np.concatenate([np.zeros(len(falls)), left / self._unit])
        worth = value_LHTT[layer, head, target, source] if count else np.zeros(0)
        self._scale = max(float(worth.max()) / 100, 1e-300) if count else 1.0
        self._cost = np.concatenate([-worth / self._scale, np.zeros(sums)])
        self._upper = np.concatenate([np.ones(count), np.full(sums, np.inf)])

    def relax(self) -> tuple[FloatArray, FloatArray]:
        """Shares of the variables at the optimum, and the prices of the capacity's rows."""
        solved = linprog(
            self._cost,
            A_ub=self._limits,
            b_ub=self._most,
            A_eq=self._sums,
            b_eq=np.zeros(self._sums.shape[0]),
            bounds=np.stack([np.zeros(len(self._upper)), self._upper], axis=1),
            method="highs-ds",
        )
        if solved.x is None:
            raise PlanError(f"the solver found no plan: {solved.message}")
        duals = -solved.ineqlin.marginals[-len(self.capacity.row_room) :]
        return solved.x[: self.variables], np.maximum(duals, 0) * self._scale / self._unit

    def round_down(self, shares: FloatArray) -> IntArray:
        """The plan that reads only what the shares hold whole."""
        whole = np.add.reduceat((shares > 1 - 1e-6).astype(np.int64), self._first)
        last_read = self.start.copy()
        last_read[self._cell] += whole
        return last_read

    def solve_whole(self) -> IntArray:
        """The best plan, proven, for small instances."""
        count, sums = self.variables, self._sums.shape[0]
        solved = milp(
            self._cost,
            integrality=np.concatenate([np.ones(count), np.zeros(sums)]),
            bounds=Bounds(np.zeros(count + sums), self._upper),
            constraints=[
                LinearConstraint(self._sums, 0, 0),
                LinearConstraint(self._limits, -np.inf, self._most),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if solved.x is None:
            raise PlanError(f"the solver found no plan: {solved.message}")
        return self.round_down(solved.x[:count])


def fit_checkpoints(
    last_read_LHT: IntArray, tokens: tuple[int, ...], budget_token_heads: int, order_LHT: IntArray
) -> IntArray:
    """Make drops early where a checkpoint would exceed the budget; returns a new `last_read`.

    While target t runs, layers already done hold what target t+1 needs and the others still what t needs, which can
    be more than either need in all. A checkpoint that exceeds the budget takes cells that are read for the last time
    by t in later layers and drops them before t runs: last layer first, within a layer in ascending `order`, only
    until that checkpoint fits (HeatKV's rule). Raises BudgetError when that is not enough.
    """
    last_read = last_read_LHT.copy()
    layers, heads, scales = last_read.shape
    sizes = np.asarray(tokens, dtype=np.int64)
    held_LT = held_for_targets([last_read], [tokens]).sum(axis=1)
    after_LT = np.concatenate([held_LT[:, 1:], np.zeros_like(held_LT[:, :1])], axis=1)
    layer_of = np.repeat(np.arange(layers), heads)
    for target in range(scales):
        done = after_LT[:, target].cumsum()
        before = after_LT[:, target - 1] if target else np.zeros(layers, dtype=np.int64)
        excess_L = done + before.sum() - before.cumsum() - budget_token_heads
        if excess_L.max() <= 0:
            continue
        pair, source = np.nonzero(last_read[:, :, :target].reshape(layers * heads, target) == target)
        layer = layer_of[pair]
        order = np.lexsort((order_LHT.reshape(layers * heads, scales)[pair, source], -layer))
        pair, source, layer = pair[order], source[order], layer[order]
        cumulative = np.concatenate([[0], sizes[source].cumsum()])
        # candidates come last layer first, so those in layers above l are a prefix
        available = np.searchsorted(-layer, -np.arange(layers), side="left")
        dropped = 0
        for at in np.flatnonzero(excess_L > 0):
            needed = int(np.searchsorted(cumulative, excess_L[at], side="left"))
            if needed > available[at]:
                raise BudgetError(
                    f"after layer {at} of scale {target} the plan holds {excess_L[at] - cumulative[available[at]]} "
                    f"token-heads more than the budget of {budget_token_heads}, and no later layer can drop enough"
                )
            dropped = max(dropped, needed)
        chosen_pair, chosen_source = pair[:dropped], source[:dropped]
        last_read.reshape(layers * heads, scales)[chosen_pair, chosen_source] = target - 1
        np.subtract.at(after_LT[:, target - 1], layer[:dropped], sizes[chosen_source])
    return last_read
