"""What a plan keeps, where and when, and what more or less room would be worth by calibration statistics.

Token-time counts every token that is held once for each later target scale that reads it, so a cell that is kept half
as long counts half, and one that is pooled to a quarter of its tokens a quarter.
Arrays: L layers, H heads, T scales; last_read as in a plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from heatkv.core.budget import Budget
from heatkv.core.levels import LEVELS, NONE
from heatkv.core.plan import CachePlan, Plan, keep_first, live_token_heads
from heatkv.core.statistics import LevelStatistics, Statistics
from heatkv.errors import PlanError, PolicyError, StatisticsError
from heatkv.levels.columns import capacity_prices, level_cost, level_price_bound, levels_of_plan
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import HeatKV
from heatkv.policies.heatkv_mr import HeatKVMR
from heatkv.policies.lp import HeatKVLP, SolvedPolicy
from heatkv.solve.cells import Capacity, allocate, price_bound, read_value

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MEASURES = {
    "joint": "output error of all cells of a head together",
    "fisher": "expected squared change of the log-likelihood",
    "error": "drop error avoided, cell by cell",
    "mass": "attention mass kept, of all rows",
    "conditional-mass": "attention mass kept, of conditional rows",
}
"""What plans are judged by: the first two are level costs, the others values of whole cells that add up."""

LEVEL_COSTS = {"joint": "error", "fisher": "fisher"}
"""The kind of level costs of a measure."""

_NO_PRICE = 1e-9
"""Share of the largest price below which a price is the solver's rounding."""


def reads_of_scales(last_reads: Sequence[IntArray]) -> FloatArray:
    """Share of the reads of every source scale, a later target in a head each, that every level serves, (levels, T-1).

    `last_reads` are those of a plan's levels, fine to coarse. For a single level it is the share of token-time, too.
    """
    scales = last_reads[0].shape[2]
    ends = np.stack([np.broadcast_to(np.arange(scales), last_reads[0].shape), *last_reads])
    served: FloatArray = np.diff(ends, axis=0).mean(axis=(1, 2))[:, :-1] / np.arange(scales - 1, 0, -1)
    return served


def kept_of_scales(last_reads: Sequence[IntArray], tokens: Sequence[tuple[int, ...]]) -> FloatArray:
    """Share of the full cache's token-time that is kept of every source scale but the last, (T-1,).

    `tokens` are those of every scale at every level.
    """
    sizes = np.asarray(tokens, dtype=np.float64)[:, :-1]
    kept: FloatArray = (reads_of_scales(last_reads) * sizes).sum(axis=0) / sizes[0]
    return kept


def kept_of_heads(held_LHT: IntArray, tokens: tuple[int, ...]) -> FloatArray:
    """Share of the full cache's token-time that every head keeps, (L, H), from the tokens that it holds for every
    target; the mean over heads is the layer's."""
    share: FloatArray = held_LHT.sum(axis=2) / np.cumsum(tokens)[:-1].sum()
    return share


def ends_of_cells(last_read_LHT: IntArray) -> FloatArray:
    """Shares of a source scale's cells that are never cached, dropped early, and kept to the end, (T-1, 3).

    `last_read_LHT` is that of the coarsest level, for what is kept at any.
    """
    never = last_read_LHT == np.arange(last_read_LHT.shape[2])
    whole = last_read_LHT == last_read_LHT.shape[2] - 1
    return np.stack([kind.mean(axis=(0, 1))[:-1] for kind in (never, ~never & ~whole, whole)], axis=1)


def full_use(plan: CachePlan) -> IntArray:
    """Token-heads that the full cache holds at every checkpoint, (T, L)."""
    return live_token_heads(keep_first(plan.geometry.shape, len(plan.schedule)), plan.schedule.tokens)


@dataclass(frozen=True, eq=False)
class Worth:
    """What a plan is worth by statistics, and what its budget is.

    `measure` is one of MEASURES; a cost counts as a negative value, as in plans. `instead` says why it is not the one
    that the plan was made by, if so. No plan within the budget, with these sinks, is worth more than `bound`, by the
    prices, or than `certified`, the plan's own bound where it is of the same numbers; the full cache is worth `full`.
    `price_TL` is the value of one more token-head at the checkpoint after layer l has run target t, 0 where it does
    not bind; `cap_price_LT` the same under a cap on single layers, which the budget does not move.
    """

    measure: str
    value: float
    bound: float
    full: float
    budget_token_heads: int
    price_TL: FloatArray
    cap_price_LT: FloatArray
    instead: str = ""
    certified: float | None = None

    @property
    def best(self) -> float:
        """The tighter of the two bounds."""
        return self.bound if self.certified is None else max(min(self.bound, self.certified), self.value)

    @property
    def price(self) -> float:
        """Value of one more token-head of budget: the slope of the bound."""
        return float(self.price_TL.sum())

    @property
    def gap(self) -> float:
        """Share that the plan may miss, of the bound, or of the cost, as policies certify it."""
        whole = max(self.best, -self.value)
        return max(0.0, (self.best - self.value) / whole) if whole > 0 else 0.0

    def change(self, share: float) -> float:
        """What the best value changes by, as a share of `bound`, when the budget changes by this share of itself.

        The bound is concave in the budget and this is its tangent: no plan gains more, none loses less.
        """
        return share * self.budget_token_heads * self.price / abs(self.bound) if self.bound else 0.0


def worth_of(plan: Plan, statistics: Statistics) -> Worth:
    """Judge a plan by the measure it was made by, over the same budget and sinks, or where that was not measured, a
    plan of whole cells by another one. One of a policy that measures nothing is judged by the drop error.

    Raises StatisticsError for statistics of another geometry, PolicyError for settings that a plan alone does not tell
    and for levels whose costs the statistics lack, PlanError for levels that have no cost.
    """
    statistics.check_geometry(plan.geometry)
    policy, own = _policy(plan), _own_measure(plan)
    # half a token-head stands for none, which is no budget
    share = Fraction(max(2 * plan.budget_token_heads, 1), 2 * plan.geometry.full_token_heads)
    problem = PlanningProblem(plan.geometry, Budget("share", share), statistics)
    policy.check(problem)
    capacity = policy.capacity(problem)
    beyond = [name for name, _ in plan.levels if LEVELS.index(name) not in policy.allowed]
    if beyond:
        raise PlanError(f"the plan holds cells at level {beyond[0]}, which its settings do not allow; solve it again")
    if plan.coarse:
        kind = "error" if statistics.levels is None else statistics.levels.cost
        known = next(measure for measure, cost in LEVEL_COSTS.items() if cost == kind)
        return _with_certificate(_by_levels(plan, statistics, own or known, policy, capacity), plan)
    lacking = []
    for measure in dict.fromkeys([own or "error", "error", "mass", "conditional-mass"]):
        try:
            if measure in LEVEL_COSTS:
                worth = _by_levels(plan, statistics, measure, policy, capacity)
            else:
                worth = _by_cells(plan, statistics, measure, capacity)
        except (PolicyError, StatisticsError) as error:
            lacking.append(str(error))
            continue
        if own is None or measure == own:
            return _with_certificate(worth, plan)
        return replace(
            worth,
            instead=f"the plan was made by the {MEASURES[own]}, but {lacking[0]}; here it is judged by the "
            f"{MEASURES[measure]}, of which its own value and gap say nothing",
        )
    raise AssertionError("the mass of conditional rows is always measured")


def _with_certificate(worth: Worth, plan: Plan) -> Worth:
    """With the plan's own bound where it is of the same numbers, as its value tells."""
    value, bound = plan.value, plan.value_bound
    if value is None or bound is None or not math.isclose(value, worth.value, rel_tol=1e-9, abs_tol=1e-12):
        return worth
    return replace(worth, certified=bound)


def _policy(plan: Plan) -> SolvedPolicy:
    """The solver over the plan's budget, caps and levels; for a policy that is none, over all plans with its sinks."""
    solvers = (HeatKVMR,) if plan.coarse else (HeatKVLP, HeatKVMR)
    solver = {cls.name: cls for cls in solvers}.get(plan.policy)
    if solver is None:
        return HeatKVMR(sink_scales=plan.sink_scales)
    known = {field.name for field in fields(solver)}
    told = {name: value for name, value in plan.settings.items() if name in known}
    # what chose the budget or how to solve for it does not matter any more
    past = {"solver": "lp"} if solver is HeatKVLP else {"max_kl": None}
    policy: SolvedPolicy = solver(**{**told, "sink_scales": plan.sink_scales, **past})
    if (cap := policy.cap()) is not None and cap.kind == "bytes":
        raise PolicyError(
            f"the plan's layer_cap={policy.layer_cap} depends on rows and storage type, which a plan does not tell; "
            "state the cap as a share or in tokens"
        )
    return policy


def _own_measure(plan: Plan) -> str | None:
    """The measure that a plan was made by; None for policies that measure nothing, or nothing known here."""
    if plan.policy == HeatKVMR.name:
        cost = plan.settings.get("cost", HeatKVMR.cost)
        return next((measure for measure, kind in LEVEL_COSTS.items() if kind == cost), None)
    if plan.coarse:  # the others know whole cells only
        return None
    if plan.policy == HeatKVLP.name:
        return str(plan.settings.get("value", HeatKVLP.value))
    return "conditional-mass" if plan.policy == HeatKV.name else None


def _by_cells(plan: Plan, statistics: Statistics, measure: str, capacity: Capacity) -> Worth:
    """Judged by values of single cells. Raises StatisticsError when they were not measured."""
    if measure == "conditional-mass":
        values = statistics.mass
    else:
        values = statistics.all_mass if measure == "mass" else statistics.drop_error
    prices = _binding(allocate(values, capacity, plan.sink_scales).row_prices)
    bound = price_bound(values, capacity, plan.sink_scales, prices)
    full = read_value(keep_first(plan.geometry.shape, len(plan.schedule)), values)
    return _worth(plan, measure, read_value(plan.last_read, values), bound, full, capacity, prices)


def _by_levels(plan: Plan, statistics: Statistics, measure: str, policy: SolvedPolicy, capacity: Capacity) -> Worth:
    """Judged by the joint costs of levels. Raises PolicyError when these were not measured, PlanError when the plan
    holds a level that has no cost."""
    costs = _level_costs(plan, statistics, LEVEL_COSTS[measure])
    level = levels_of_plan(plan)
    past = np.tril(np.ones(level.shape[2:], dtype=bool), -1)
    cost, full = level_cost(costs, level), level_cost(costs, np.where(past, 0, np.full_like(level, NONE)))
    prices = _binding(capacity_prices(costs, capacity, policy.allowed, plan.sink_scales))
    bound = level_price_bound(costs, capacity, policy.allowed, prices, plan.sink_scales)
    bound = min(bound, cost)  # above it by rounding only
    worth = _worth(plan, measure, -cost, -bound, -full, capacity, prices)
    of_costs = {LEVELS[index]: costs.log_bias[..., index] for index in range(len(LEVELS))}
    if any(not np.array_equal(cells.log_bias, of_costs[cells.level]) for cells in plan.coarse):
        note = "the plan has other log-biases than these costs were measured under, so its real cost is another one"
        return replace(worth, instead=note)
    return worth


def _level_costs(plan: Plan, statistics: Statistics, kind: str) -> LevelStatistics:
    """The level costs of this kind, which hold for the plan's sinks. Raises PolicyError."""
    levels, mine = statistics.levels, f"these statistics ({statistics.provenance.model})"
    measure = f"measure level costs of the kind {kind!r}, for {plan.sink_scales} sink scales or fewer"
    if levels is None:
        raise PolicyError(f"{mine} lack level costs; {measure}")
    if levels.cost != kind:
        raise PolicyError(f"{mine} hold level costs of the kind {levels.cost!r}, not {kind!r}; {measure}")
    if levels.choices.sink_scales > plan.sink_scales:
        raise PolicyError(
            f"{mine} hold level costs for sink_scales={levels.choices.sink_scales} or more, the plan has "
            f"{plan.sink_scales}; {measure}"
        )
    return levels


def _binding(row_prices: FloatArray) -> FloatArray:
    """The prices without the solver's rounding."""
    return np.where(row_prices > _NO_PRICE * row_prices.max(initial=0.0), row_prices, 0.0)


def _worth(
    plan: Plan, measure: str, value: float, bound: float, full: float, capacity: Capacity, row_prices: FloatArray
) -> Worth:
    layers, _, scales = plan.last_read.shape
    checkpoints = capacity.checkpoints
    caps = row_prices[checkpoints:] if capacity.layer_room is not None else np.zeros(layers * scales)
    return Worth(
        measure=measure,
        value=value + 0.0,  # a cost of nothing is 0, not -0
        bound=bound + 0.0,
        full=full + 0.0,
        budget_token_heads=plan.budget_token_heads,
        price_TL=row_prices[:checkpoints].reshape(scales - 1, layers),
        cap_price_LT=caps.reshape(layers, scales),
    )
