"""Policies that need no measurement: the full cache, and windows of the most recent scales or tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from heatkv.core.plan import keep_first
from heatkv.core.schema import IntArray
from heatkv.errors import BudgetError
from heatkv.policies.base import PlanningProblem, StaticPolicy
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.registry import register
from heatkv.solve.checkpoints import fit_checkpoints


def recent_scales(policy: StaticPolicy, problem: PlanningProblem) -> IntArray:
    """`last_read` that keeps the sinks and, for every target, the most recent scales that fill the budget.

    Complete scales from the newest backwards while they fit in every head, then as many heads of the next one as still
    fit. Heads are taken in one fixed order, head by head over all layers, so that layers share the room evenly.
    """
    geometry = problem.geometry
    schedule, pairs = geometry.schedule, geometry.layers * geometry.heads
    last_read = policy.sinks_only(problem)
    order_LH = np.arange(pairs).reshape(geometry.heads, geometry.layers).T
    most_heads = np.full(len(schedule), pairs)  # a cell once dropped cannot return
    for target in range(policy.sink_scales + 1, len(schedule)):
        room = problem.budget_token_heads - pairs * schedule.offsets[policy.sink_scales]
        for source in range(target - 1, policy.sink_scales - 1, -1):
            heads = min(int(most_heads[source]), room // schedule.tokens[source])
            most_heads[source] = heads
            last_read[:, :, source][order_LH < heads] = target
            room -= heads * schedule.tokens[source]
            if heads < pairs:
                most_heads[policy.sink_scales : source] = 0
                break
    oldest_first_LHT = pairs * np.arange(len(schedule)) - order_LH[:, :, None]
    return fit_checkpoints(last_read, schedule.tokens, problem.budget_token_heads, oldest_first_LHT)


@register
@dataclass(frozen=True)
class Full(StaticPolicy):
    """Keeps everything to the end: the reference that every policy is measured against."""

    name = "full"
    source = "reference"

    sink_scales: int = 0

    def check(self, problem: PlanningProblem) -> None:
        if problem.share < 1:
            raise BudgetError(f"policy 'full' keeps everything; its budget is 100%, not {problem.budget}")
        super().check(problem)

    def last_read(self, problem: PlanningProblem) -> IntArray:
        return keep_first(problem.geometry.shape, len(problem.geometry.schedule))


@register
@dataclass(frozen=True)
class Streaming(StaticPolicy):
    """Keeps the sink scales and the most recent scales, in whole cells, as many as fill the budget."""

    name = "streaming"
    source = "Xiao et al. 2023, StreamingLLM, section 3.2; whole cells"

    def last_read(self, problem: PlanningProblem) -> IntArray:
        return recent_scales(self, problem)


@register
@dataclass(frozen=True)
class SlidingWindow(Streaming):
    """Keeps the most recent scales, in whole cells, as many as fill the budget; no sinks."""

    name = "sliding-window"
    source = "Beltagy et al. 2020, Longformer, section 3.1; whole cells"

    sink_scales: int = 0


@register
@dataclass(frozen=True)
class SlidingWindowTokens(DynamicPolicy):
    """The most recent tokens in sequence order, equally many in all heads."""

    name = "sliding-window-tokens"
    source = "sliding-window attention"

    def score(self, seen: Candidates) -> Tensor:
        return seen.no_scores() + torch.arange(seen.count, device=seen.k_RHCD.device)


@register
@dataclass(frozen=True)
class StreamingTokens(SlidingWindowTokens):
    """The first tokens and the most recent ones, equally many in all heads; positions are not renumbered.

    `sink_tokens`: those of the first three scales by default, 21 in the square 1M schedule (chosen, as HeatKV protects
    them); language models take 4.
    """

    name = "streaming-tokens"
    source = "StreamingLLM (Xiao et al. 2024)"

    sink_tokens: Annotated[int, Meta(ge=0)] | None = None

    def score(self, seen: Candidates) -> Tensor:
        index, offsets = seen.index_RHC, seen.schedule.offsets
        sinks = offsets[min(3, len(seen.schedule))] if self.sink_tokens is None else self.sink_tokens
        # a head holds its tokens in sequence order, and the first ones are never dropped
        return torch.where(index < sinks, 2 * seen.count - index, super().score(seen))
