"""Cells at several resolutions: the cheapest mix of whole, pooled, mean and dropped cells for a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from heatkv.core.budget import Budget
from heatkv.core.levels import LEVELS
from heatkv.core.plan import Plan
from heatkv.core.schema import as_number, shown
from heatkv.errors import PolicyError
from heatkv.levels.columns import LevelAllocation, allocate_levels, level_bound
from heatkv.policies.base import PlanningProblem
from heatkv.policies.lp import SolvedPolicy
from heatkv.registry import register

FloatArray = NDArray[np.float64]

KL_OF_PREDICTION = 0.7
"""Half the Fisher costs per token are this share of the measured KL, or more."""

BUDGET_STEPS = 1000
"""A budget that is chosen by its predicted KL is found to this part of the full cache."""


@register
@dataclass(frozen=True)
class HeatKVLevels(SolvedPolicy):
    """Holds cells whole, pooled 2x2, as one mean token or not at all, so that the joint error is smallest.

    `cost` is "error", the squared output error relative to the residual stream, or "fisher", the expected change of
    the log-likelihood, whose prediction of the KL lets `max_kl` choose the smallest budget when that is "auto".
    `levels` are those it may use, joined by "+"; "full" alone only drops cells. Sinks are two scales
    here, since the third is small enough to be priced like the others; any number goes that the level costs were
    measured with, or more.
    """

    name: ClassVar[str] = "heatkv-mr"
    needs: ClassVar[str] = "statistics with levels"
    source: ClassVar[str] = "HeatKV multi-resolution; column generation (Gilmore and Gomory 1961)"
    with_other_levels: ClassVar[str] = ", or set cost={0}"

    cost: Literal["error", "fisher"] = "error"
    levels: str = "full+pool2+mean"
    max_kl: float | None = None

    def check(self, problem: PlanningProblem) -> None:
        chosen = self.levels.split("+") if isinstance(self.levels, str) else [""]
        once = len(set(chosen)) == len(chosen)
        if chosen[0] != "full" or not once or any(level not in LEVELS for level in chosen):
            raise PolicyError(
                f"levels={shown(self.levels)}; it must be full, then any of {' and '.join(LEVELS[1:])}, joined by +"
            )
        if self.cost not in ("error", "fisher"):
            raise PolicyError(f"cost={self.cost!r} is unknown to policy {self.name!r}; known: error, fisher")
        if problem.budget.kind == "auto":
            if self.cost != "fisher" or self.max_kl is None:
                raise PolicyError("budget auto needs cost=fisher, which predicts the KL, and max_kl, its bound")
            if not 0 < as_number(self.max_kl) < math.inf:
                raise PolicyError(f"max_kl={shown(self.max_kl)} is no KL divergence above 0, in nats per token")
        elif self.max_kl is not None:
            raise PolicyError(f"max_kl chooses the budget; it goes with budget auto, not with {problem.budget}")
        super().check(problem)

    def check_sinks(self, problem: PlanningProblem) -> None:
        if problem.budget.kind == "auto":  # it takes what the sinks need
            problem = replace(problem, budget=Budget.parse(1.0))
        super().check_sinks(problem)

    def last_read(self, problem: PlanningProblem) -> NDArray[np.int64]:
        return self.allocation(problem).last_reads()[0]

    def solve(self, problem: PlanningProblem) -> tuple[Plan, FloatArray]:
        problem = self.checked(problem)
        settings: dict[str, Any] = {}
        if problem.budget.kind == "auto":
            problem = replace(problem, budget=self.smallest_budget(problem))
            settings["budget"] = "auto"
        allocation = self.allocation(problem)
        if self.cost == "fisher":
            settings["predicted_kl"] = self._kl(problem, allocation.cost)
            assert problem.statistics is not None
            settings["predicted_cfg"] = problem.statistics.provenance.cfg  # another guidance, another KL
        plan = self.finish_levels(problem, allocation)
        return replace(plan, settings={**plan.settings, **settings}), allocation.row_prices

    def _kl(self, problem: PlanningProblem, cost: float) -> float:
        """KL(full || plan) in nats per token that Fisher costs foretell."""
        return cost / 2 / problem.geometry.schedule.total_tokens / KL_OF_PREDICTION

    def smallest_budget(self, problem: PlanningProblem) -> Budget:
        """The smallest share whose predicted KL is at most `max_kl`, in steps of the full cache."""
        assert self.max_kl is not None
        schedule = problem.geometry.schedule
        sinks = Fraction(schedule.offsets[self.sink_scales], schedule.cached_tokens)
        low = max(1, math.ceil(BUDGET_STEPS * sinks))
        high = BUDGET_STEPS  # the full cache costs nothing
        statistics = self.level_statistics(problem)

        def at(step: int) -> PlanningProblem:
            return replace(problem, budget=Budget("share", Fraction(step, BUDGET_STEPS)))

        while low < high:  # by the bound, which is quicker than a plan and hardly below it
            middle = (low + high) // 2
            bound, _ = level_bound(statistics, self.capacity(at(middle)), self.allowed, self.sink_scales)
            if self._kl(problem, bound) <= self.max_kl:
                high = middle
            else:
                low = middle + 1
        while (predicted := self._kl(problem, self.allocation(at(high)).cost)) > self.max_kl:
            if high == BUDGET_STEPS:  # only a cap on layers keeps the whole cache from costing nothing
                raise PolicyError(
                    f"no budget reaches max_kl={self.max_kl}: under layer_cap={self.layer_cap} the largest has "
                    f"{predicted:.3g}; raise layer_cap or max_kl"
                )
            high += 1
        return at(high).budget

    def allocation(self, problem: PlanningProblem) -> LevelAllocation:
        """The plan with its cost, its bound and the prices of the checkpoints."""
        statistics, capacity = self.level_statistics(problem), self.capacity(problem)
        return allocate_levels(statistics, capacity, self.allowed, self.sink_scales)

    @property
    def level_cost(self) -> str:
        return self.cost

    @property
    def allowed(self) -> tuple[int, ...]:
        """Indices of the levels that its option names."""
        return tuple(LEVELS.index(level) for level in LEVELS if level in self.levels.split("+"))
