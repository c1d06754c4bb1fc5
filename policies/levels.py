"""Cells at several resolutions: the cheapest mix of whole, pooled, mean and dropped cells for a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from heatkv.allocation import Capacity
from heatkv.errors import PolicyError
from heatkv.level_allocation import LevelAllocation, allocate_levels
from heatkv.level_statistics import LevelStatistics
from heatkv.levels import LEVELS
from heatkv.plan import CoarseCells, Plan
from heatkv.policies.base import EvictionPolicy, PlanningProblem
from heatkv.registry import register


@register
@dataclass(frozen=True)
class HeatKVLevels(EvictionPolicy):
    """Holds cells whole, pooled 2x2, as one mean token or not at all, so that the joint output error is smallest.

    `levels` are those it may use, joined by "+"; "full" alone only drops cells. Sinks are two scales here, since the
    third is small enough to be priced like the others.
    """

    name: ClassVar[str] = "heatkv-mr"
    needs: ClassVar[str] = "statistics with levels"
    source: ClassVar[str] = "HeatKV multi-resolution; column generation (Gilmore and Gomory 1961)"

    sink_scales: int = 2
    levels: str = "full+pool2+mean"

    def check(self, problem: PlanningProblem) -> None:
        chosen = self.levels.split("+")
        if chosen[0] != "full" or any(level not in LEVELS for level in chosen):
            raise PolicyError(f"levels={self.levels!r}; it must be full, joined by + with any of {LEVELS[1:]}")
        super().check(problem)

    def last_read(self, problem: PlanningProblem) -> NDArray[np.int64]:
        return self.allocation(problem).last_reads()[0]

    def plan(self, problem: PlanningProblem) -> Plan:
        self.check(problem)
        allocation, log_bias = self.allocation(problem), self.statistics(problem).log_bias
        whole, *coarser = allocation.last_reads()
        finer, coarse = whole, []
        for index, last_read in enumerate(coarser, start=1):
            if (last_read > finer).any():  # a level that no cell is held at is left out
                coarse.append(CoarseCells(LEVELS[index], last_read, log_bias[..., index]))
            finer = last_read
        return self.finish(
            problem, whole, tuple(coarse), value=-allocation.cost, value_bound=-allocation.bound, gap=allocation.gap
        )

    def statistics(self, problem: PlanningProblem) -> LevelStatistics:
        """The level costs, measured with this number of sinks."""
        if problem.statistics is None or problem.statistics.levels is None:
            raise PolicyError(
                f"policy {self.name!r} needs statistics with level costs (heatkv calibrate --levels, then --statistics "
                "FILE)"
            )
        levels = problem.statistics.levels
        if levels.choices.sink_scales != self.sink_scales:
            raise PolicyError(
                f"the level costs were measured with sink_scales={levels.choices.sink_scales}, the policy has "
                f"sink_scales={self.sink_scales}; measure them with that number"
            )
        return levels

    def allocation(self, problem: PlanningProblem) -> LevelAllocation:
        """The plan with its cost, its bound and the prices of the checkpoints."""
        geometry = problem.geometry
        capacity = Capacity.shared(
            geometry.layers, geometry.heads, geometry.schedule.tokens, problem.budget_token_heads
        )
        allowed = tuple(LEVELS.index(level) for level in LEVELS if level in self.levels.split("+"))
        return allocate_levels(self.statistics(problem), capacity, allowed)
