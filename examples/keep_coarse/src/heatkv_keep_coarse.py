"""A policy that lives outside HeatKV: it is found through its entry point once this package is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from heatkv.policies.base import PlanningProblem, StaticPolicy
from heatkv.registry import register


@register
@dataclass(frozen=True)
class KeepCoarse(StaticPolicy):
    """Keeps the coarsest scales that fit in the budget in every head, from the first image token to the last."""

    name: ClassVar[str] = "keep-coarse"
    source: ClassVar[str] = "an example"

    def last_read(self, problem: PlanningProblem) -> NDArray[np.int64]:
        geometry = problem.geometry
        last_read = self.never_cached(problem)
        pairs = geometry.layers * geometry.heads
        for scale in range(len(geometry.schedule) - 1):
            if pairs * geometry.schedule.offsets[scale + 1] <= problem.budget_token_heads:
                last_read[:, :, scale] = len(geometry.schedule) - 1
        return last_read
