"""The best plan for a budget, from a linear program over all cells, with a certified gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from heatkv.allocation import Allocation, Capacity, allocate, allocate_greedily
from heatkv.errors import BudgetError, PolicyError
from heatkv.geometry import Budget, CacheGeometry
from heatkv.plan import Plan
from heatkv.policies.base import EvictionPolicy, PlanningProblem
from heatkv.policies.heatkv import drop_by_rank
from heatkv.registry import register
from heatkv.statistics import HeadRankings, Statistics

FloatArray = NDArray[np.float64]


@register
@dataclass(frozen=True)
class HeatKVLP(EvictionPolicy):
    """Keeps the cells that are worth most within the budget, by linear programming, with a proven gap.

    `value` is what keeping a cell for a target scale is worth: "error", the squared output error of dropping it,
    relative to the residual stream; or "mass", the attention mass on it over all rows. `solver` is "lp", or "greedy"
    (value per token). With `ranks`, the heads of a layer are split over so many devices, in order, and each stays
    within its equal part of the budget. `layer_cap` is a budget that no single layer may exceed. Only the first scale
    is protected by default: what a sink is worth is measured as well.
    """

    name: ClassVar[str] = "heatkv-lp"
    needs: ClassVar[str] = "statistics"
    source: ClassVar[str] = "HeatKV; allocation by HiGHS (Huangfu and Hall 2018)"

    sink_scales: int = 1
    value: Literal["error", "mass"] = "error"
    solver: Literal["lp", "greedy"] = "lp"
    ranks: int = 1
    layer_cap: str | None = None

    def check(self, problem: PlanningProblem) -> None:
        for name, value, known in (("value", self.value, ("error", "mass")), ("solver", self.solver, ("lp", "greedy"))):
            if value not in known:
                raise PolicyError(f"{name}={value!r} is unknown to policy {self.name!r}; known: {', '.join(known)}")
        heads = problem.geometry.heads
        if not isinstance(self.ranks, int) or self.ranks < 1 or heads % self.ranks:
            raise PolicyError(f"ranks={self.ranks!r} does not split {heads} heads evenly")
        super().check(problem)
        self.capacity(problem)  # a bad layer_cap is refused here, before anything is measured

    def last_read(self, problem: PlanningProblem) -> NDArray[np.int64]:
        return self.allocation(problem).last_read

    def plan(self, problem: PlanningProblem) -> Plan:
        self.check(problem)
        allocation = self.allocation(problem)
        return self.finish(
            problem, allocation.last_read, value=allocation.value, value_bound=allocation.bound, gap=allocation.gap
        )

    def allocation(self, problem: PlanningProblem) -> Allocation:
        """The plan with its value, its bound and the prices of the checkpoints."""
        statistics = problem.statistics
        if statistics is None:
            raise PolicyError(
                f"policy {self.name!r} needs statistics of this model (heatkv calibrate, then --statistics FILE)"
            )
        capacity, values = self.capacity(problem), self.values(statistics)
        if self.solver == "greedy":
            return allocate_greedily(values, capacity, self.sink_scales)
        candidates: tuple[NDArray[np.int64], ...] = ()
        if self.ranks == 1 and self.layer_cap is None:  # the paper's rule knows neither
            candidates = (drop_by_rank(problem, self.sink_scales, HeadRankings.from_scores(statistics.scas)),)
        return allocate(values, capacity, self.sink_scales, candidates)

    def values(self, statistics: Statistics) -> FloatArray:
        """value[l, h, t, s] of every cell for every target."""
        return statistics.drop_error if self.value == "error" else statistics.all_mass

    def capacity(self, problem: PlanningProblem) -> Capacity:
        """The budget, split over the ranks, and the cap on single layers."""
        geometry = problem.geometry
        tokens = geometry.schedule.tokens
        group_LH = np.tile(np.arange(geometry.heads) * self.ranks // geometry.heads, (geometry.layers, 1))
        room = problem.budget_token_heads // self.ranks
        layer_room = None
        if self.layer_cap is not None:
            layer = CacheGeometry(1, geometry.heads, geometry.head_dim, geometry.schedule)
            layer_room = Budget.parse(self.layer_cap).token_heads(layer, problem.rows, problem.storage)
            sinks = geometry.heads * geometry.schedule.offsets[self.sink_scales]
            if layer_room < sinks:
                raise BudgetError(
                    f"layer_cap={self.layer_cap} is {layer_room} token-heads, less than the {sinks} of the "
                    f"{self.sink_scales} sink scales in one layer; raise it or set sink_scales lower"
                )
        return Capacity(tokens, group_LH, (room,) * self.ranks, layer_room)
