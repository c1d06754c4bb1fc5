"""The best plan for a budget, from a linear program over all cells, with a certified gap."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import FULL, LEVELS, SINK_SCALES
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schema import as_whole
from heatkv.core.statistics import LevelStatistics, Statistics
from heatkv.errors import PolicyError
from heatkv.levels.columns import LevelAllocation, allocate_levels, level_price_bound
from heatkv.policies.base import PlanningProblem, StaticPolicy, below_sinks
from heatkv.policies.heatkv import drop_by_rank
from heatkv.registry import register
from heatkv.solve.cells import Allocation, allocate, allocate_greedily, price_bound
from heatkv.solve.checkpoints import Capacity

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class SolvedPolicy(StaticPolicy):
    """What policies share that solve a program for the budget.

    `layer_cap` is a budget that no single layer may exceed.
    """

    without_levels: ClassVar[str] = ""
    """How to plan without level costs, where it can."""

    with_other_levels: ClassVar[str] = ""
    """How to plan from level costs of another kind, `{0}`, where it can."""

    sink_scales: int = SINK_SCALES
    layer_cap: str | None = None

    @property
    def allowed(self) -> tuple[int, ...]:
        """Indices of the levels it may use: whole cells only, unless a policy says otherwise."""
        return (LEVELS.index(FULL),)

    def check(self, problem: PlanningProblem) -> None:
        self.cap()

    def cap(self) -> Budget | None:
        """`layer_cap`, read. Raises BudgetError for what cannot be read, PolicyError for auto."""
        if self.layer_cap is None:
            return None
        cap = Budget.parse(self.layer_cap, "layer_cap")
        if cap.kind == "auto":
            raise PolicyError("layer_cap=auto: only the budget can be auto; write the cap as 10%, 0.1 or 650tokens")
        return cap

    def check_measured(self, problem: PlanningProblem) -> None:
        if self.level_cost is not None:
            self.level_statistics(problem)

    def check_sinks(self, problem: PlanningProblem) -> None:
        super().check_sinks(problem)
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

    def level_statistics(self, problem: PlanningProblem) -> LevelStatistics:
        """The level costs, of the kind it plans by. Raises PolicyError."""
        cost, levels = self.level_cost, None if problem.statistics is None else problem.statistics.levels
        if levels is None:
            raise PolicyError(
                f"policy {self.name!r} needs statistics with level costs ({how_to_measure(cost, self.sink_scales)}, "
                f"then --statistics FILE){self.without_levels}"
            )
        if levels.cost != cost:
            raise PolicyError(
                f"the level costs are of the kind {levels.cost!r}; policy {self.name!r} was to use {cost!r}: measure "
                f"them with {how_to_measure(cost, self.sink_scales)}{self.with_other_levels.format(levels.cost)}"
            )
        return levels

    @abstractmethod
    def solve(self, problem: PlanningProblem) -> tuple[Plan, FloatArray]:
        """The plan, and the prices of the capacity's rows that prove its bound; raises what `plan` raises."""

    def plan(self, problem: PlanningProblem) -> Plan:
        return self.solve(problem)[0]

    def bound(self, problem: PlanningProblem, row_prices: FloatArray) -> float:
        """No plan for this problem has a greater value, whatever the prices (>= 0); those of a similar problem make
        it tight, and it takes no solver."""
        levels = self.level_statistics(problem)
        return -level_price_bound(levels, self.capacity(problem), self.allowed, row_prices, self.sink_scales)

    def capacity(self, problem: PlanningProblem) -> Capacity:
        """The budget, and the cap on single layers."""
        geometry = problem.geometry
        layer_room = None
        if (cap := self.cap()) is not None:
            layer_room = cap.token_heads(_one_layer(problem), problem.rows, problem.storage)
        tokens, room = geometry.schedule.tokens, problem.budget_token_heads
        return Capacity(geometry.layers, geometry.heads, tokens, room, layer_room)

    def finish_levels(self, problem: PlanningProblem, allocation: LevelAllocation) -> Plan:
        """The plan of an allocation with levels; its value is minus its cost."""
        whole, *coarser = allocation.last_reads()
        finer, coarse = whole, []
        for index, last_read in enumerate(coarser, start=1):
            if (last_read > finer).any():  # a level that no cell is held at is left out
                assert problem.statistics is not None
                assert problem.statistics.levels is not None
                log_bias = problem.statistics.levels.log_bias[..., index]
                coarse.append(CoarseCells(LEVELS[index], last_read, log_bias))
            finer = last_read
        return self.finish(
            problem, whole, tuple(coarse), value=-allocation.cost, value_bound=-allocation.bound, gap=allocation.gap
        )


def how_to_measure(cost: str | None, sink_scales: int) -> str:
    """The command that measures level costs of this kind for plans with so many sinks."""
    fewer = as_whole(sink_scales) in range(SINK_SCALES)
    return f"heatkv calibrate --levels {cost}{f' --sink-scales {sink_scales}' if fewer else ''}"


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

    name: ClassVar[str] = "heatkv-lp"
    needs: ClassVar[str] = "statistics, with levels for value=joint"
    source: ClassVar[str] = "HeatKV; allocation by HiGHS (Huangfu and Hall 2018)"
    without_levels: ClassVar[str] = "; value=error needs none"
    with_other_levels: ClassVar[str] = without_levels

    value: Literal["joint", "error", "mass"] = "joint"
    solver: Literal["lp", "greedy"] = "lp"

    @property
    def level_cost(self) -> str | None:
        return "error" if self.value == "joint" else None

    def check(self, problem: PlanningProblem) -> None:
        for name, value, known in (
            ("value", self.value, ("joint", "error", "mass")),
            ("solver", self.solver, ("lp", "greedy")),
        ):
            if value not in known:
                raise PolicyError(f"{name}={value!r} is unknown to policy {self.name!r}; known: {', '.join(known)}")
        if self.value == "joint" and self.solver == "greedy":
            raise PolicyError("solver=greedy adds up single cells; set value=error or value=mass")
        super().check(problem)

    def last_read(self, problem: PlanningProblem) -> NDArray[np.int64]:
        return self.plan(problem).last_read

    def solve(self, problem: PlanningProblem) -> tuple[Plan, FloatArray]:
        problem = self.checked(problem)
        if self.value == "joint":
            joint = self.joint_allocation(problem)
            return self.finish_levels(problem, joint), joint.row_prices
        found = self.allocation(problem)
        plan = self.finish(problem, found.last_read, value=found.value, value_bound=found.bound, gap=found.gap)
        return plan, found.row_prices

    def bound(self, problem: PlanningProblem, row_prices: FloatArray) -> float:
        if self.value == "joint":
            return super().bound(problem, row_prices)
        assert problem.statistics is not None
        values = self.values(problem.statistics)
        return price_bound(values, self.capacity(problem), self.sink_scales, row_prices)

    def joint_allocation(self, problem: PlanningProblem) -> LevelAllocation:
        """The plan that drops cells only, by their joint errors."""
        costs, capacity = self.level_statistics(problem), self.capacity(problem)
        return allocate_levels(costs, capacity, self.allowed, self.sink_scales)

    def check_measured(self, problem: PlanningProblem) -> None:
        super().check_measured(problem)
        if problem.statistics is None:
            raise PolicyError(
                f"policy {self.name!r} needs statistics of this model (heatkv calibrate, then --statistics FILE)"
            )
        if self.value != "joint":
            self.values(problem.statistics)

    def allocation(self, problem: PlanningProblem) -> Allocation:
        """The plan by values of single cells, with its value, its bound and the prices of the checkpoints."""
        statistics = problem.statistics
        assert statistics is not None
        capacity, values = self.capacity(problem), self.values(statistics)
        if self.solver == "greedy":
            return allocate_greedily(values, capacity, self.sink_scales)
        candidates: tuple[NDArray[np.int64], ...] = ()
        if self.layer_cap is None:  # which the paper's rule does not know
            candidates = (drop_by_rank(problem, self.sink_scales, HeadRankings.from_scores(statistics.scas)),)
        return allocate(values, capacity, self.sink_scales, candidates)

    def values(self, statistics: Statistics) -> FloatArray:
        """value[l, h, t, s] of every cell by itself for every target; of joint errors that of the cell alone."""
        return statistics.all_mass if self.value == "mass" else statistics.drop_error
