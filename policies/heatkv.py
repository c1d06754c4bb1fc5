"""HeatKV's rule, exactly the paper's, and its control with a random ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from heatkv.core.plan import keep_first
from heatkv.core.rankings import HeadRankings
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem, StaticPolicy
from heatkv.registry import register
from heatkv.solve.checkpoints import fit_checkpoints

IntArray = NDArray[np.int64]


def dropped_pairs(problem: PlanningProblem, sink_scales: int) -> list[int]:
    """x_t for every target scale: how many (layer, head) pairs of every ranking are dropped for it (HeatKV, section 3).

    x_t = ceil(L H (in_t - b N) / (in_t - p)), at most L H, and 0 while in_t <= max(p, b N), with in_t the tokens before
    scale t and p the sink tokens. Exact: b is a fraction.
    """
    schedule = problem.geometry.schedule
    pairs = problem.geometry.layers * problem.geometry.heads
    room = problem.share * schedule.cached_tokens
    sinks = schedule.offsets[sink_scales]
    return [
        0 if before <= sinks or before <= room else min(pairs, math.ceil(pairs * (before - room) / (before - sinks)))
        for before in schedule.offsets[:-1]
    ]


def drop_by_rank(problem: PlanningProblem, sink_scales: int, rankings: HeadRankings) -> IntArray:
    """`last_read` of the rule: the first x_t pairs of every source scale's ranking are not read by target t."""
    geometry = problem.geometry
    scales = len(geometry.schedule)
    last_read = keep_first(geometry.shape, scales)
    if sink_scales >= scales - 1:
        return last_read
    dropped = np.asarray(dropped_pairs(problem, sink_scales))
    rank_SLH = rankings.for_scales(sink_scales, scales - 1)
    rank_LHT = np.zeros_like(last_read)
    rank_LHT[:, :, sink_scales : scales - 1] = rank_SLH.transpose(1, 2, 0)
    for source in range(sink_scales, scales - 1):
        # x_t never falls with t, so the targets that still read a cell are the first ones after its source
        read = np.searchsorted(dropped[source + 1 :], rank_LHT[:, :, source], side="right")
        last_read[:, :, source] = source + read
    pairs = geometry.layers * geometry.heads
    order_LHT = rank_LHT - pairs * np.arange(scales)  # larger source scale first, then rank
    return fit_checkpoints(last_read, geometry.schedule.tokens, problem.budget_token_heads, order_LHT)


@register
@dataclass(frozen=True)
class HeatKV(StaticPolicy):
    """Drops, for every source scale alike, as many heads as needed: those that look back at it least.

    Rankings are ascending in S-CAS, the attention mass a head puts on the scale; ties by head, then layer.
    """

    name: ClassVar[str] = "heatkv"
    needs: ClassVar[str] = "statistics or rankings"
    source: ClassVar[str] = "HeatKV, section 3"

    def check_measured(self, problem: PlanningProblem) -> None:
        if problem.rankings is None and problem.statistics is None:
            raise PolicyError(
                "policy 'heatkv' needs statistics of this model (heatkv calibrate, then --statistics FILE) or "
                "published rankings (--orders FILE)"
            )

    def check_sinks(self, problem: PlanningProblem) -> None:
        super().check_sinks(problem)
        if problem.rankings is not None and self.sink_scales < problem.rankings.first_scale:
            raise PolicyError(
                f"sink_scales={self.sink_scales} is below the {problem.rankings.first_scale} first scales, which the "
                "rankings leave out; raise it, or plan from statistics, which rank every scale"
            )

    def last_read(self, problem: PlanningProblem) -> IntArray:
        rankings = problem.rankings
        if rankings is None:
            assert problem.statistics is not None
            rankings = HeadRankings.from_scores(problem.statistics.scas)
        return drop_by_rank(problem, self.sink_scales, rankings)


@register
@dataclass(frozen=True)
class Random(StaticPolicy):
    """The control: HeatKV's rule with a random ranking per source scale, to fill the budget in the same shape."""

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "control"
    random: ClassVar[bool] = True

    def last_read(self, problem: PlanningProblem) -> IntArray:
        return drop_by_rank(problem, self.sink_scales, HeadRankings.random(problem.geometry, problem.seed))
