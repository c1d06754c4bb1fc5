"""ScaleKV: much memory for a few drafter layers, little for the refiners, tokens chosen by a spread-out window."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.core.capacity_plan import available_tokens
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import IntArray
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem
from heatkv.policies.dynamic import Candidates, DynamicPolicy, alike_in_heads
from heatkv.policies.options import numbers_from
from heatkv.registry import register

PUBLISHED_MEAN = 650
"""Mean tokens per head that the published tables were made for."""
PUBLISHED: dict[int, tuple[tuple[int, ...], dict[int, tuple[int, int]]]] = {
    32: ((0, 23), {8: (920, 632), 9: (1490, 594), 10: (2510, 526), 11: (4100, 420), 12: (6385, 465)}),
    40: ((0, 1, 2), {8: (909, 629), 9: (1464, 584), 10: (2463, 503), 11: (4054, 374), 12: (6200, 200)}),
}
"""By layers (Infinity-2B, -8B): the drafters, and capacities (drafter, refiner) for a target scale, counted from 0. The
last row of 2B has the first drafter only."""

_WINDOW, _POOL, _MARGIN = 16, 5, 0.005
_TABLED = Fraction(12, 100)
"""Up to this share the published tables are scaled: they are for 10 %, and peak at 11.7 % on Infinity-2B."""
_DRAFTERS = 0.07
"""Share of drafters where none are published: between the 2 of 32 and 3 of 40 that are."""


def _is_published(problem: PlanningProblem) -> bool:
    """Whether there is a table for the problem's model."""
    return problem.geometry.layers in PUBLISHED and problem.geometry.schedule == ScaleSchedule.infinity("1M", 1.0)


@register
@dataclass(frozen=True)
class ScaleKV(DynamicPolicy):
    """Drafter layers keep nearly everything, refiners share the rest; a head keeps what 16 spread-out queries match.

    A scale's window is the centres of 4 x 4 patches of its grid (for non-square grids, too: chosen), or the last 16
    tokens where a side is below 4. The window is kept, and those tokens whose key has the largest sum of dot products
    with the window's queries, after max pooling of width 5 along the sequence: no softmax. As published, those
    queries are made anew from the attention's input by the weight alone, without bias, norm, temperature or rotation.

    Capacities: for Infinity's square 1M schedule up to 12 % the published tables, which were made for 650 tokens on
    average but peak higher while layers change one after another, scaled until every checkpoint fits. Otherwise
    (chosen) drafters keep 99.5 % of what there is, refiners what is left of the mean, and at least a quarter of it.
    Drafters are the published ones, or 7 % of the layers, those with the most attention on earlier scales; `drafters`
    names others, as "0,23".
    """

    name = "scalekv"
    source = "ScaleKV (Li et al. 2025)"
    wants_input = True

    drafters: str | None = None

    @property
    def needs(self) -> Set[str]:
        """Nothing for Infinity's square 1M schedule either."""
        return frozenset({"statistics"} if self.drafters is None else ())

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        self._named(problem.geometry.layers)

    def check_measured(self, problem: PlanningProblem) -> None:
        if not _is_published(problem):
            super().check_measured(problem)

    def resolved(self, problem: PlanningProblem) -> Self:
        return replace(self, drafters=",".join(map(str, self._drafters(problem))))

    def _named(self, layers: int) -> tuple[int, ...] | None:
        """The drafters that the option names."""
        if self.drafters is None:
            return None
        named = tuple(sorted(set(numbers_from(self.drafters, int, "drafters"))))
        if not 0 <= named[0] <= named[-1] < layers or len(named) == layers > 1:
            raise PolicyError(f"drafters={self.drafters!r} are not some of the layers 0 to {layers - 1}")
        return named

    def _drafters(self, problem: PlanningProblem) -> tuple[int, ...]:
        layers = problem.geometry.layers
        named = self._named(layers)
        if named is not None:
            return named
        if _is_published(problem):
            return PUBLISHED[layers][0]
        targets = np.arange(1, len(problem.geometry.schedule))
        past_L = 1 - problem.measured.mass[:, :, targets, targets].mean(axis=(1, 2))
        count = max(1, round(_DRAFTERS * layers))
        return tuple(sorted(np.argsort(-past_L, kind="stable")[:count].tolist()))

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        geometry = problem.geometry
        layers, available = geometry.layers, available_tokens(geometry)
        named = self._drafters(problem)
        tabled = _is_published(problem) and named == PUBLISHED[layers][0] and problem.share <= _TABLED
        of_layers = np.zeros((layers, len(available)), dtype=np.int64)
        for target, there_are in enumerate(available.tolist()):
            drafters = named
            if there_are <= mean:
                large = small = there_are
            elif tabled and target in PUBLISHED[layers][1]:
                large, small = (math.floor(c * mean / PUBLISHED_MEAN) for c in PUBLISHED[layers][1][target])
                drafters = named[:1] if (layers, target) == (32, 12) else named
            else:
                large, small = self._solved(layers, len(named), there_are, mean)
            of_layers[:, target] = min(small, there_are)
            of_layers[list(drafters), target] = min(large, there_are)
        return alike_in_heads(problem, of_layers)

    @staticmethod
    def _solved(layers: int, drafters: int, available: int, mean: int) -> tuple[int, int]:
        """Capacities of drafters and refiners with this mean over the layers."""
        refiners, least = layers - drafters, mean // 4
        large = min(math.floor((1 - _MARGIN) * available), (layers * mean - refiners * least) // drafters)
        large = max(large, mean)
        return large, (layers * mean - drafters * large) // refiners if refiners else mean

    def score(self, seen: Candidates) -> Tensor:
        window, own = _window(seen.schedule, seen.target, seen.held, seen.k_RHCD.device)
        queries_RHWD = self.queries(seen, own)
        score = torch.einsum("rhwd,rhcd->rhc", queries_RHWD.float(), seen.k_RHCD.float())
        score /= math.sqrt(seen.k_RHCD.shape[3])
        if seen.valid_RHC is not None:
            score = score.masked_fill(~seen.valid_RHC, -math.inf)
        score[..., window] = -math.inf
        score = F.max_pool1d(score.flatten(0, 1), _POOL, 1, _POOL // 2).view_as(score)
        score[..., window] = -math.inf
        # pooling makes neighbours equal: which of them stays is what `topk` gives, asked as the published code asks it
        best = score.topk(min(seen.capacity, seen.count) - min(len(window), seen.capacity), dim=-1).indices
        kept = score.scatter(-1, best, math.inf)
        kept[..., window[: seen.capacity]] = math.inf
        return kept

    def queries(self, seen: Candidates, window: Tensor) -> Tensor:
        """The window's queries that keys are matched with, (R, H, W, D)."""
        at = seen.attention_input_RNW[:, window].to(seen.query_weight_HDW.dtype)
        return torch.einsum("rwc,hdc->rhwd", at, seen.query_weight_HDW)


@register
@dataclass(frozen=True)
class ScaleKVFixed(ScaleKV):
    """ScaleKV that matches keys with the true queries: with bias, norm, temperature and rotation."""

    name = "scalekv-fixed"
    wants_input = False

    def queries(self, seen: Candidates, window: Tensor) -> Tensor:
        return seen.q_RHND[:, :, window]


@cache
def _window(schedule: ScaleSchedule, target: int, held: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Candidates of the window, in order, when so many are held; and which of the new tokens are among them."""
    _, height, width = schedule.scales[target]
    if min(height, width) < 4:
        count = held + schedule.tokens[target]
        places = list(range(max(0, count - _WINDOW), count))
    else:
        rows, columns = ([a * (side // 4) + (side // 4 - 1) // 2 for a in range(4)] for side in (height, width))
        places = [held + place for place in sorted({row * width + column for row in rows for column in columns})]
    own = [place - held for place in places if place >= held]
    with torch.inference_mode(False):  # whoever comes next may not be in it
        return torch.tensor(places, device=device), torch.tensor(own, device=device)
