"""HeatKV's rule, exactly the paper's, and its control with a random ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from heatkv.core.plan import keep_first
from heatkv.core.rankings import HeadRankings
from heatkv.core.schema import IntArray
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem, StaticPolicy
from heatkv.registry import register
from heatkv.solve.checkpoints import fit_checkpoints


def dropped_pairs(problem: PlanningProblem, sink_scales: int) -> list[int]:
    """x_t for every target scale: how many (layer, head) pairs of every ranking are dropped for it (HeatKV, section 3).

    x_t = ceil(L H (in_t - b N) / (in_t - p)), at most L H, and 0 while in_t <= max(p, b N), with in_t the tokens before
    scale t and p the sink tokens. Exact: b is a fraction.
    """
    schedule, pairs = problem.geometry.schedule, problem.geometry.layers * problem.geometry.heads
    room, sinks = problem.share * schedule.cached_tokens, schedule.offsets[sink_scales]
    return [
        0 if before <= sinks or before <= room else min(pairs, math.ceil(pairs * (before - room) / (before - sinks)))
        for before in schedule.offsets[:-1]
    ]


def drop_by_rank(problem: PlanningProblem, sink_scales: int, rankings: HeadRankings) -> IntArray:
    """`last_read` of the rule: the first x_t pairs of every source scale's ranking are not read by target t."""
    geometry, scales = problem.geometry, len(problem.geometry.schedule)
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

    name = "heatkv"
    source = "HeatKV, section 3"
    needs = frozenset({"statistics or rankings"})

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        if problem.rankings is not None and self.sink_scales < problem.rankings.first_scale:
            raise PolicyError(
                f"sink_scales={self.sink_scales} is below the {problem.rankings.first_scale} first scales, which the "
                "rankings leave out; raise it, or plan from statistics"
            )

    def last_read(self, problem: PlanningProblem) -> IntArray:
        rankings = problem.rankings or HeadRankings.from_scores(problem.measured.scas)
        return drop_by_rank(problem, self.sink_scales, rankings)


@register
@dataclass(frozen=True)
class Random(StaticPolicy):
    """The control: HeatKV's rule with a random ranking per source scale, to fill the budget in the same shape."""

    name = "random"
    source = "control"
    random = True

    def last_read(self, problem: PlanningProblem) -> IntArray:
        return drop_by_rank(problem, self.sink_scales, HeadRankings.random(problem.geometry, problem.seed))
