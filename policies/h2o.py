"""Heavy hitters: the tokens that received most attention since they came."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.registry import register


@register
@dataclass(frozen=True)
class H2O(DynamicPolicy):
    """Half of the places for the most recent tokens, the others for those that received most attention so far.

    Every head adds up the probability that each token it holds received from all queries since it came; dropped tokens
    lose theirs. The sums are carried with the tokens, 4 bytes each, which count against the budget. `recent` is the
    share of the most recent (the paper's idea is a half); `mean_per_scale` divides by the queries of a scale, so that
    late scales do not dominate by being larger (chosen; false adds over all queries).
    """

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "H2O (Zhang et al. 2023)"

    recent: float = 0.5
    mean_per_scale: bool = True

    @property
    def carried(self) -> int:
        return 1

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        if not 0 <= self.recent <= 1:
            raise PolicyError(f"recent={self.recent!r} must be a share from 0 to 1")
        if not isinstance(self.mean_per_scale, bool):
            raise PolicyError(f"mean_per_scale={self.mean_per_scale!r} must be true or false")

    def carry(self, seen: Candidates) -> Tensor:
        assert seen.carried_RHCX is not None
        received = seen.received()
        if self.mean_per_scale:
            received = received / seen.new
        return seen.carried_RHCX + received[..., None]

    def score(self, seen: Candidates) -> Tensor:
        assert seen.carried_RHCX is not None
        score = seen.carried_RHCX[..., 0].clone()
        score[..., seen.count - math.floor(self.recent * seen.capacity) :] = math.inf
        return score
