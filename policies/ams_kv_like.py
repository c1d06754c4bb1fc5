"""Whole scales, more of them in layers whose keys and values change most; after AMS-KV, whose code is not public."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta
from torch import Tensor

from heatkv.core.schema import IntArray
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem
from heatkv.policies.dynamic import Candidates, DynamicPolicy, alike_in_heads, peak
from heatkv.policies.grid import carried_recency
from heatkv.registry import register


@register
@dataclass(frozen=True)
class AmsKvLike(DynamicPolicy):
    """The first scales and the most recent ones; layers whose keys and values change most keep more recent ones.

    A re-implementation of the idea only. The first `condensed` scales (2, an example of the paper's) always stay.
    Similarity of a layer (chosen): the mean over scales from the fourth on of the cosine between a scale's keys, and
    values, and those of the scale before, resized. The lower half of the layers keeps the larger number of recent
    scales. Both are the largest that fit the budget, the smaller one first; where not even one does, a regular
    sub-grid of the latest is kept, with as many tokens as fit. Every token carries how recent it is, 4 bytes.
    """

    name = "ams-kv-like"
    source = "after AMS-KV (AAAI 2026); own constants"
    needs = frozenset({"statistics"})
    carried = 1

    condensed: Annotated[int, Meta(ge=0)] = 2

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        scales = len(problem.geometry.schedule)
        if self.condensed >= scales:
            raise PolicyError(f"condensed={self.condensed} must be a number of scales from 0 to {scales - 1}")

    def _with_recent(self, problem: PlanningProblem, few: int, many: int) -> IntArray:
        """Capacities with so many recent scales in either half of the layers."""
        geometry, scales = problem.geometry, len(problem.geometry.schedule)
        first = min(3, scales - 1)
        similar_L = problem.measured.similarity[:, first:].mean(axis=1)
        demanding = np.argsort(similar_L, kind="stable")[: geometry.layers // 2]
        recent = np.full(geometry.layers, few)
        recent[demanding] = many
        held = np.zeros((geometry.layers, scales), dtype=np.int64)
        for target in range(scales):
            for scale, tokens in enumerate(geometry.schedule.tokens[:target]):
                held[:, target] += np.where((scale < self.condensed) | (scale >= target - recent), tokens, 0)
        return alike_in_heads(problem, held)

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        """One recent scale in all layers, as much of it as the mean allows."""
        return np.minimum(self._with_recent(problem, 1, 1), mean)

    def largest(self, problem: PlanningProblem, room: int) -> IntArray:
        scales = len(problem.geometry.schedule)

        def fits(few: int, many: int) -> bool:
            return peak(self._with_recent(problem, few, many)) <= room

        few = max((a for a in range(1, scales) if fits(a, a)), default=0)
        if not few:
            return super().largest(problem, room)
        return self._with_recent(problem, few, max(a for a in range(few, scales) if fits(few, a)))

    def carry(self, seen: Candidates) -> Tensor:
        return carried_recency(seen, self.condensed)

    def score(self, seen: Candidates) -> Tensor:
        return seen.carried_RHCX[..., 0]
