"""The best plan for a budget, from a linear program over all cells, with a certified gap."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import FULL, LEVELS, SINK_SCALES
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schema import FloatArray, IntArray
from heatkv.core.statistics import Statistics
from heatkv.errors import PolicyError
from heatkv.levels.columns import LevelAllocation, allocate_levels, level_price_bound
from heatkv.policies.base import PlanningProblem, StaticPolicy, below_sinks
from heatkv.policies.heatkv import drop_by_rank
from heatkv.registry import register
from heatkv.solve.allocation import SOLVE_SECONDS, Allocation, allocate, allocate_greedily, price_bound
from heatkv.solve.checkpoints import Capacity


@dataclass(frozen=True)
class SolvedPolicy(StaticPolicy):
    """What policies share that solve a program for the budget.

    `layer_cap` is a budget that no single layer may exceed. `solve_seconds` is what programs in whole numbers may take,
    which bring the plan closer to its bound; then the best plan so far comes with its gap.
    """

    without_levels: ClassVar[str] = ""
    """How to plan without level costs, where it can."""

    sink_scales: int = SINK_SCALES
    layer_cap: str | None = None
    solve_seconds: Annotated[float, Meta(gt=0, le=86_400)] = SOLVE_SECONDS

    @property
    def allowed(self) -> tuple[int, ...]:
        """Indices of the levels it may use: whole cells only, unless a policy says otherwise."""
        return (LEVELS.index(FULL),)

    def cap(self) -> Budget | None:
        """`layer_cap`, read. Raises BudgetError."""
        return None if self.layer_cap is None else Budget.parse(self.layer_cap, "layer_cap")

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        levels = None if problem.statistics is None else problem.statistics.levels
        if levels is not None and levels.cost == self.level_cost and self.sink_scales < levels.choices.sink_scales:
            raise PolicyError(
                f"sink_scales={self.sink_scales} is below the {levels.choices.sink_scales} that the level costs were "
                "measured with; raise it, or measure level costs with fewer sinks"
            )
        cap, schedule = self.cap(), problem.geometry.schedule
        if cap is not None:
            share = cap.share(_one_layer(problem), problem.rows, problem.storage)
            if share * schedule.cached_tokens < schedule.offsets[self.sink_scales]:
                raise below_sinks(f"layer_cap={self.layer_cap}", schedule, self.sink_scales)

    def check_measured(self, problem: PlanningProblem) -> None:
        if self.level_cost is None:
            super().check_measured(problem)
        else:
            self.level_statistics(problem)

    def level_statistics(self, problem: PlanningProblem) -> LevelStatistics:
        """The level costs that it plans by. Raises PolicyError when there are none of that kind."""
        cost, levels = self.level_cost, None if problem.statistics is None else problem.statistics.levels
        if levels is None or levels.cost != cost:
            there = "" if levels is None else f", not {levels.cost!r}"
            raise PolicyError(
                f"policy {self.name!r} needs statistics with level costs of the kind {cost!r}{there}; calibrate the "
                f"model with them, for {self.sink_scales} sink scales or fewer{self.without_levels}"
            )
        return levels

    def capacity(self, problem: PlanningProblem) -> Capacity:
        """The room for the whole cache, and for single layers."""
        cap, layer_room = self.cap(), None
        if cap is not None:
            layer_room = cap.token_heads(_one_layer(problem), problem.rows, problem.storage)
        layers, heads, _ = problem.geometry.shape
        return Capacity(layers, heads, problem.geometry.schedule.tokens, problem.budget_token_heads, layer_room)

    @abstractmethod
    def solve(self, problem: PlanningProblem) -> tuple[Plan, FloatArray]:
        """The plan, and the prices of the capacity's rows that prove its bound; raises what `plan` raises."""

    def plan(self, problem: PlanningProblem) -> Plan:
        return self.solve(problem)[0]

    def last_read(self, problem: PlanningProblem) -> IntArray:
        return self.plan(problem).last_read

    def bound(self, problem: PlanningProblem, row_prices: FloatArray) -> float:
        """No plan for this problem has a greater value, whatever the prices (>= 0); those of a similar problem make
        it tight, and it takes no solver."""
        levels = self.level_statistics(problem)
        return -level_price_bound(levels, self.capacity(problem), self.allowed, row_prices, self.sink_scales)

    def level_allocation(self, problem: PlanningProblem) -> LevelAllocation:
        """The plan by joint costs, with its bound and the prices of the capacity's rows."""
        statistics, capacity = self.level_statistics(problem), self.capacity(problem)
        return allocate_levels(statistics, capacity, self.allowed, self.sink_scales, self.solve_seconds)

    def finish_levels(self, problem: PlanningProblem, allocation: LevelAllocation) -> Plan:
        """The plan of an allocation by joint costs; its value is minus its cost."""
        whole, *coarser = allocation.last_reads()
        finer, coarse = whole, []
        for index, last_read in enumerate(coarser, start=1):
            if (last_read > finer).any():  # a level that no cell is held at is left out
                log_bias = self.level_statistics(problem).log_bias[..., index]
                coarse.append(CoarseCells(LEVELS[index], last_read, log_bias))
            finer = last_read
        return self.finish(
            problem, whole, tuple(coarse), value=-allocation.cost, value_bound=-allocation.bound, gap=allocation.gap
        )


def _one_layer(problem: PlanningProblem) -> CacheGeometry:
    return replace(problem.geometry, layers=1)


@register
@dataclass(frozen=True)
class HeatKVLP(SolvedPolicy):
    """Keeps the cells that are worth most within the budget, by linear programming, with a proven gap.

    `value` is what keeping cells for a target scale is worth: "joint", the squared output error of dropping any
    combination of a head's cells, relative to the residual stream; "error", the same for one cell at a time; or "mass",
    the attention mass over all rows. `solver` is "lp", or "greedy" (value per token; not for joint errors). Sinks are
    two scales here, since the third is small enough to be priced like the others; with joint errors, no fewer than the
    level costs were measured with.
    """

    name = "heatkv-lp"
    source = "HeatKV; allocation by HiGHS (Huangfu and Hall 2018)"
    without_levels = "; value=error needs none"

    value: Literal["joint", "error", "mass"] = "joint"
    solver: Literal["lp", "greedy"] = "lp"

    @property
    def needs(self) -> Set[str]:
        return frozenset({"level costs: error" if self.value == "joint" else "statistics"})

    def check(self, problem: PlanningProblem) -> None:
        if self.value == "joint" and self.solver == "greedy":
            raise PolicyError("solver=greedy adds up single cells; set value=error or value=mass")
        super().check(problem)

    def solve(self, problem: PlanningProblem) -> tuple[Plan, FloatArray]:
        problem = self.checked(problem)
        if self.value == "joint":
            joint = self.level_allocation(problem)
            return self.finish_levels(problem, joint), joint.row_prices
        found = self.allocation(problem)
        plan = self.finish(problem, found.last_read, value=found.value, value_bound=found.bound, gap=found.gap)
        return plan, found.row_prices

    def bound(self, problem: PlanningProblem, row_prices: FloatArray) -> float:
        if self.value == "joint":
            return super().bound(problem, row_prices)
        return price_bound(self.values(problem.measured), self.capacity(problem), self.sink_scales, row_prices)

    def allocation(self, problem: PlanningProblem) -> Allocation:
        """The plan by values of single cells, with its value, its bound and the prices of the capacity's rows."""
        capacity, values = self.capacity(problem), self.values(problem.measured)
        if self.solver == "greedy":
            return allocate_greedily(values, capacity, self.sink_scales)
        if self.layer_cap is not None:  # which the paper's rule does not know
            return allocate(values, capacity, self.sink_scales, (), self.solve_seconds)
        by_rule = drop_by_rank(problem, self.sink_scales, HeadRankings.from_scores(problem.measured.scas))
        return allocate(values, capacity, self.sink_scales, (by_rule,), self.solve_seconds)

    def values(self, statistics: Statistics) -> FloatArray:
        """value[l, h, t, s] of every cell by itself for every target; of joint errors that of the cell alone."""
        return statistics.all_mass if self.value == "mass" else statistics.drop_error
