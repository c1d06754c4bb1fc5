"""Windows of the most recent tokens, cut wherever the budget ends; their forms in whole cells are in windows.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.registry import register


@register
@dataclass(frozen=True)
class SlidingWindowTokens(DynamicPolicy):
    """The most recent tokens in sequence order, equally many in all heads."""

    name: ClassVar[str] = "sliding-window-tokens"
    source: ClassVar[str] = "sliding-window attention"

    def score(self, seen: Candidates) -> Tensor:
        return seen.no_scores() + torch.arange(seen.count, device=seen.k_RHCD.device)


@register
@dataclass(frozen=True)
class StreamingTokens(SlidingWindowTokens):
    """The first tokens and the most recent ones, equally many in all heads; positions are not renumbered.

    `sink_tokens`: those of the first three scales by default, 21 in the square 1M schedule (chosen, as HeatKV protects
    them); language models take 4.
    """

    name: ClassVar[str] = "streaming-tokens"
    source: ClassVar[str] = "StreamingLLM (Xiao et al. 2024)"

    sink_tokens: int | None = None

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        if self.sink_tokens is not None and (not isinstance(self.sink_tokens, int) or self.sink_tokens < 0):
            raise PolicyError(f"sink_tokens={self.sink_tokens!r} must be a whole number, at least 0")

    def score(self, seen: Candidates) -> Tensor:
        score = super().score(seen)
        index = seen.index_RHC
        offsets = seen.schedule.offsets
        sinks = offsets[min(3, len(seen.schedule))] if self.sink_tokens is None else self.sink_tokens
        # a head holds its tokens in sequence order, and the first ones are never dropped
        return torch.where(index < sinks, 2 * seen.count - index, score)
