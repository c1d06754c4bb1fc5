"""Heavy hitters: the tokens that received most attention since they came."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta
from torch import Tensor

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

    name = "h2o"
    source = "H2O (Zhang et al. 2023)"

    carried = 1

    recent: Annotated[float, Meta(ge=0, le=1)] = 0.5
    mean_per_scale: bool = True

    def carry(self, seen: Candidates) -> Tensor:
        received = seen.received()
        if self.mean_per_scale:
            received = received / seen.new
        return seen.carried_RHCX + received[..., None]

    def score(self, seen: Candidates) -> Tensor:
        score = seen.carried_RHCX[..., 0].clone()
        score[..., seen.count - math.floor(self.recent * seen.capacity) :] = math.inf
        return score
