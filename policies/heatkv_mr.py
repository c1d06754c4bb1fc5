"""Cells at several resolutions: the cheapest mix of whole, pooled, mean and dropped cells for a budget."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, Literal

from msgspec import Meta

from heatkv.core.budget import Budget
from heatkv.core.levels import FULL, LEVELS
from heatkv.core.plan import Plan
from heatkv.core.schema import FloatArray
from heatkv.errors import PolicyError
from heatkv.levels.columns import level_bound
from heatkv.policies.base import PlanningProblem
from heatkv.policies.lp import SolvedPolicy
from heatkv.registry import register

KL_OF_PREDICTION = 0.7
"""Half the Fisher costs per token are this share of the measured KL, or more."""

BUDGET_STEPS = 1000
"""A budget that is chosen by its predicted KL is found to this part of the full cache."""


@register
@dataclass(frozen=True)
class HeatKVMR(SolvedPolicy):
    """Holds cells whole, pooled 2x2, as one mean token or not at all, so that the joint error is smallest.

    `cost` is "error", the squared output error relative to the residual stream, or "fisher", the expected change of
    the log-likelihood, whose prediction of the KL lets `max_kl` choose the smallest budget when that is "auto".
    `levels` are those it may use, joined by "+"; "full" alone only drops cells. Sinks are two scales here, since the
    third is small enough to be priced like the others; any number works that the level costs were measured with, or
    more.
    """

    name = "heatkv-mr"
    source = "HeatKV multi-resolution; column generation (Gilmore and Gomory 1961)"

    cost: Literal["error", "fisher"] = "error"
    levels: str = "full+pool2+mean"
    max_kl: Annotated[float, Meta(gt=0)] | None = None

    @property
    def needs(self) -> Set[str]:
        return frozenset({f"level costs: {self.cost}"})

    @property
    def allowed(self) -> tuple[int, ...]:
        """Indices of the levels that its option names."""
        return tuple(LEVELS.index(level) for level in LEVELS if level in self.levels.split("+"))

    def check(self, problem: PlanningProblem) -> None:
        levels = self.levels.split("+")
        if levels[0] != FULL or len(set(levels)) < len(levels) or not set(levels) <= set(LEVELS):
            raise PolicyError(
                f"levels={self.levels!r}; it must be full, then any of {' and '.join(LEVELS[1:])}, joined by +"
            )
        auto = problem.budget.kind == "auto"
        if auto and (self.cost != "fisher" or self.max_kl is None):
            raise PolicyError("budget auto needs cost=fisher, which predicts the KL, and max_kl, its bound")
        if not auto and self.max_kl is not None:
            raise PolicyError(f"max_kl chooses the budget; it goes with budget auto, not with {problem.budget}")
        super().check(self._at(problem, BUDGET_STEPS) if auto else problem)  # auto takes what the sinks need

    def solve(self, problem: PlanningProblem) -> tuple[Plan, FloatArray]:
        problem, extra = self.checked(problem), dict[str, Any]()
        if problem.budget.kind == "auto":
            problem, extra = self.smallest(problem), {"budget": "auto"}
        allocation = self.level_allocation(problem)
        if self.cost == "fisher":
            extra["predicted_kl"] = self._kl(problem, allocation.cost)
            extra["predicted_cfg"] = problem.measured.provenance.cfg  # another guidance, another KL
        plan = self.finish_levels(problem, allocation)
        return replace(plan, settings={**plan.settings, **extra}), allocation.row_prices

    def smallest(self, problem: PlanningProblem) -> PlanningProblem:
        """The problem with the smallest share whose predicted KL is at most `max_kl`, in steps of the full cache."""
        schedule, max_kl = problem.geometry.schedule, self.max_kl or math.inf
        sinks = Fraction(schedule.offsets[self.sink_scales], schedule.cached_tokens)
        low, high = max(1, math.ceil(BUDGET_STEPS * sinks)), BUDGET_STEPS  # the full cache costs nothing
        statistics = self.level_statistics(problem)
        while low < high:  # by the bound, which is quicker than a plan and hardly below it
            middle = (low + high) // 2
            capacity = self.capacity(self._at(problem, middle))
            bound, _ = level_bound(statistics, capacity, self.allowed, self.sink_scales)
            if self._kl(problem, bound) <= max_kl:
                high = middle
            else:
                low = middle + 1
        while (predicted := self._kl(problem, self.level_allocation(self._at(problem, high)).cost)) > max_kl:
            if high == BUDGET_STEPS:  # only a cap on layers keeps the whole cache from costing nothing
                raise PolicyError(
                    f"no budget reaches max_kl={max_kl}: under layer_cap={self.layer_cap} the largest has "
                    f"{predicted:.3g}; raise layer_cap or max_kl"
                )
            high += 1
        return self._at(problem, high)

    @staticmethod
    def _at(problem: PlanningProblem, step: int) -> PlanningProblem:
        """The problem with so many steps of the full cache as budget."""
        return replace(problem, budget=Budget("share", Fraction(step, BUDGET_STEPS)))

    @staticmethod
    def _kl(problem: PlanningProblem, cost: float) -> float:
        """KL(full || plan) in nats per token that Fisher costs predict."""
        return cost / 2 / problem.geometry.schedule.total_tokens / KL_OF_PREDICTION
