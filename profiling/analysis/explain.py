"""What a plan keeps, where and when, and what more or less room would be worth by calibration statistics.

Token-time counts every token that is held once for each later target scale that reads it, so a cell that is kept half
as long counts half, and one that is pooled to a quarter of its tokens a quarter.
Arrays: L layers, H heads, T scales, V levels (fine to coarse); last_read as in a plan.
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
from heatkv.core.plan import CachePlan, Plan, held_for_targets, keep_first, live_of_held
from heatkv.core.statistics import Statistics
from heatkv.errors import PolicyError, StatisticsError
from heatkv.levels.columns import level_bound, level_price_bound
from heatkv.levels.costs import level_cost, levels_of_plan
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.heatkv import HeatKV
from heatkv.policies.heatkv_mr import HeatKVMR
from heatkv.policies.lp import HeatKVLP, SolvedPolicy
from heatkv.solve.allocation import allocate, price_bound
from heatkv.solve.cells import read_value
from heatkv.solve.checkpoints import Capacity

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
    """Share of the reads of every source scale, by a later target in a head each, that every level serves, (V, T-1)."""
    scales = last_reads[0].shape[2]
    ends = np.stack([np.broadcast_to(np.arange(scales), last_reads[0].shape), *last_reads])
    return np.asarray(np.diff(ends, axis=0).mean(axis=(1, 2))[:, :-1] / np.arange(scales - 1, 0, -1))


def kept_of_scales(last_reads: Sequence[IntArray], tokens: Sequence[tuple[int, ...]]) -> FloatArray:
    """Share of the full cache's token-time that is kept of every source scale, (T-1,), from last_read and the tokens of
    every scale at every level."""
    sizes = np.asarray(tokens, dtype=np.float64)[:, :-1]
    return np.asarray((reads_of_scales(last_reads) * sizes).sum(axis=0) / sizes[0])


def kept_of_heads(held_LHT: IntArray, tokens: tuple[int, ...]) -> FloatArray:
    """Share of the full cache's token-time that every head keeps, (L, H), from the tokens that it holds for every
    target; the mean over heads is the layer's."""
    return np.asarray(held_LHT.sum(axis=2) / np.cumsum(tokens)[:-1].sum())


def ends_of_cells(last_read_LHT: IntArray) -> FloatArray:
    """Shares of a source scale's cells that are never cached, dropped early, and kept to the end, (T-1, 3); by the
    last_read of the coarsest level, for what is kept at any."""
    scales = last_read_LHT.shape[2]
    never, whole = last_read_LHT == np.arange(scales), last_read_LHT == scales - 1
    return np.stack([kind.mean(axis=(0, 1))[:-1] for kind in (never, ~never & ~whole, whole)], axis=1)


def full_use(plan: CachePlan) -> IntArray:
    """Token-heads that the full cache holds at every checkpoint, (T, L)."""
    everything = keep_first(plan.geometry.shape, len(plan.schedule))
    return live_of_held(held_for_targets([everything], [plan.schedule.tokens]).sum(axis=1))


@dataclass(frozen=True, eq=False)
class Worth:
    """What a plan is worth by statistics, and what its budget is.

    `measure` is one of MEASURES; a cost counts as a negative value, as in plans. `instead` says why the measure or its
    figures are not those that the plan was made by, or is empty. No plan within the budget, with these sinks, is worth
    more than `bound`, by the prices, or than `certified`, the plan's own bound where it is of the same numbers; the
    full cache is worth `full`. `price_TL` is the value of one more token-head at the checkpoint after layer l has run
    target t, 0 where it does not bind; `cap_price_LT` the same under a cap on layers, which the budget does not move.
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
    """A plan judged by the measure that it was made by, over the same budget and sinks. Where that was not measured, a
    plan of whole cells is judged by another; one of a policy that measures nothing is judged by the drop error.

    Raises StatisticsError for statistics of another geometry, PolicyError where the statistics lack the costs of the
    plan's levels and for a cap in bytes, PlanError for cells at levels that have no cost.
    """
    # half a token-head stands for none, which is no budget
    share = Fraction(max(2 * plan.budget_token_heads, 1), 2 * plan.geometry.full_token_heads)
    problem = PlanningProblem(plan.geometry, Budget("share", share))
    statistics.check_geometry(plan.geometry)
    policy, own, lacking = _policy(plan), _own_measure(plan), list[str]()
    policy.check(problem)
    measures = [own] if own is not None else list(LEVEL_COSTS) if plan.coarse else []
    for measure in measures if plan.coarse else dict.fromkeys([*measures, "error", "mass", "conditional-mass"]):
        judge = _by_levels if measure in LEVEL_COSTS else _by_cells
        try:
            worth = judge(plan, statistics, measure, policy, policy.capacity(problem))
        except (PolicyError, StatisticsError) as error:
            lacking.append(str(error))
            continue
        if own not in (None, measure):
            made_by = f"the plan was made by the {MEASURES[str(own)]}, but {lacking[0]}"
            return replace(worth, instead=f"{made_by}; here it is judged by the {MEASURES[measure]}")
        same = plan.value is not None and math.isclose(plan.value, worth.value, rel_tol=1e-9, abs_tol=1e-12)
        return replace(worth, certified=plan.value_bound) if same else worth
    raise PolicyError(lacking[0])


def _policy(plan: Plan) -> SolvedPolicy:
    """The solver over the plan's budget, cap and levels; for a policy that is none, over all plans with its sinks."""
    if plan.policy != HeatKVMR.name and (plan.policy != HeatKVLP.name or plan.coarse):
        return HeatKVMR(sink_scales=plan.sink_scales)
    known = {field.name for field in fields(HeatKVMR if plan.policy == HeatKVMR.name else HeatKVLP)}
    # what chose the budget or how to solve for it does not matter any more
    settings = {**plan.settings, "sink_scales": plan.sink_scales, "solver": "lp", "max_kl": None}
    policy = make_policy(plan.policy, **{name: value for name, value in settings.items() if name in known})
    assert isinstance(policy, SolvedPolicy)
    if (cap := policy.cap()) is not None and cap.kind == "bytes":
        raise PolicyError(
            f"the plan's layer_cap={policy.layer_cap} depends on rows and storage type, which a plan does not hold; "
            "state the cap as a share or in tokens"
        )
    return policy


def _own_measure(plan: Plan) -> str | None:
    """The measure that a plan was made by; None for policies that measure nothing, or nothing known here."""
    if plan.policy == HeatKVMR.name:
        cost = plan.settings.get("cost", HeatKVMR.cost)
        return next(measure for measure, kind in LEVEL_COSTS.items() if kind == cost)
    if plan.coarse:  # the others know whole cells only
        return None
    if plan.policy == HeatKVLP.name:
        return str(plan.settings.get("value", HeatKVLP.value))
    return "conditional-mass" if plan.policy == HeatKV.name else None


def _by_cells(plan: Plan, statistics: Statistics, measure: str, _: SolvedPolicy, capacity: Capacity) -> Worth:
    """Judged by values of single cells. Raises StatisticsError when they were not measured."""
    kinds = {"conditional-mass": "mass", "mass": "all_mass", "error": "drop_error"}
    values: FloatArray = getattr(statistics, kinds[measure])
    prices = _binding(allocate(values, capacity, plan.sink_scales).row_prices)
    bound = price_bound(values, capacity, plan.sink_scales, prices)
    full = read_value(keep_first(plan.geometry.shape, len(plan.schedule)), values)
    return _worth(plan, measure, read_value(plan.last_read, values), bound, full, capacity, prices)


def _by_levels(plan: Plan, statistics: Statistics, measure: str, policy: SolvedPolicy, capacity: Capacity) -> Worth:
    """Judged by the joint costs of levels. Raises PolicyError when these were not measured, PlanError when the plan
    holds a level that has no cost."""
    costs, kind, sinks = statistics.levels, LEVEL_COSTS[measure], plan.sink_scales
    if costs is None or costs.cost != kind or costs.choices.sink_scales > sinks:
        raise PolicyError(
            f"these statistics ({statistics.provenance.model}) lack level costs of the kind {kind!r} for {sinks} sink "
            "scales; calibrate them"
        )
    level = levels_of_plan(plan)
    past = np.tril(np.ones(level.shape[2:], dtype=bool), -1)
    cost, full = level_cost(costs, level), level_cost(costs, np.where(past, 0, np.full_like(level, NONE)))
    prices = _binding(level_bound(costs, capacity, policy.allowed, sinks)[1])
    # above the cost by rounding only
    bound = min(level_price_bound(costs, capacity, policy.allowed, prices, sinks), cost)
    worth = _worth(plan, measure, -cost, -bound, -full, capacity, prices)
    if all(np.array_equal(c.log_bias, costs.log_bias[..., LEVELS.index(c.level)]) for c in plan.coarse):
        return worth
    note = "the plan has other log-biases than these costs were measured under, so its real cost is another one"
    return replace(worth, instead=note)


def _binding(row_prices: FloatArray) -> FloatArray:
    """The prices without the solver's rounding."""
    return np.where(row_prices > _NO_PRICE * row_prices.max(initial=0.0), row_prices, 0.0)


def _worth(
    plan: Plan, measure: str, value: float, bound: float, full: float, capacity: Capacity, row_prices: FloatArray
) -> Worth:
    layers, _, scales = plan.last_read.shape
    checkpoints = capacity.checkpoints
    caps = row_prices[checkpoints:] if capacity.layer_room is not None else np.zeros(layers * scales)
    # a cost of nothing is 0, not -0
    return Worth(
        measure, value + 0.0, bound + 0.0, full + 0.0, plan.budget_token_heads,
        row_prices[:checkpoints].reshape(scales - 1, layers), caps.reshape(layers, scales),
    )  # fmt: skip
