"""Two kinds of heads, each with its own budget and way to choose; after HACK, whose constants are not public."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Self

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from heatkv.core.capacity_plan import available_tokens
from heatkv.core.schema import IntArray
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.policies.grid import carried_recency
from heatkv.registry import register


@register
@dataclass(frozen=True)
class HackLike(DynamicPolicy):
    """Contextual heads, whose queries all look at few keys, keep little; structural ones keep what is near in place.

    A re-implementation of the idea only (all constants chosen). Contextual is the share `contextual_share` of heads
    with the highest concentration: the variance over keys of the mean probability they receive from a late scale's
    queries. Contextual heads keep `contextual_capacity` times the mean and choose by what 64 spread queries attend to;
    structural ones share the rest and keep the latest scales, spread over the grid. The first `sinks` scales stay.
    Every token carries how recent it is, 4 bytes. `contextual` lists the heads, as l * H + h, instead of statistics.
    """

    name = "hack-like"
    source = "after HACK (AAAI 2026); own constants"
    carried = 1

    contextual_share: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    contextual_capacity: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    sinks: Annotated[int, Meta(ge=0)] = 3
    contextual: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.contextual is not None:
            object.__setattr__(self, "contextual", tuple(self.contextual))

    @property
    def needs(self) -> Set[str]:
        return frozenset({"statistics"} if self.contextual is None else ())

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        scales, pairs = len(problem.geometry.schedule), problem.geometry.layers * problem.geometry.heads
        if self.sinks >= scales:
            raise PolicyError(f"sinks={self.sinks} must be a number of scales from 0 to {scales - 1}")
        if not all(0 <= pair < pairs for pair in self.contextual or ()):
            raise PolicyError(f"contextual={self.contextual} must be pairs l * H + h from 0 to {pairs - 1}")

    def resolved(self, problem: PlanningProblem) -> Self:
        if self.contextual is not None:
            return self
        late = len(problem.geometry.schedule) // 2
        concentration = problem.measured.concentration[:, :, late:].mean(axis=2).reshape(-1)
        count = round(self.contextual_share * len(concentration))
        return replace(self, contextual=tuple(sorted(np.argsort(-concentration, kind="stable")[:count].tolist())))

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        layers, heads, _ = problem.geometry.shape
        contextual = np.isin(np.arange(layers * heads), self.contextual or ()).reshape(layers, heads)
        share = float(contextual.mean())
        small = math.floor(self.contextual_capacity * mean)
        large = math.floor((mean - share * small) / (1 - share)) if share < 1 else mean
        of_heads = np.where(contextual, small, large)[:, :, None]
        return np.minimum(available_tokens(problem.geometry), of_heads)

    def carry(self, seen: Candidates) -> Tensor:
        return carried_recency(seen, self.sinks)

    def score(self, seen: Candidates) -> Tensor:
        near = seen.carried_RHCX[..., 0]
        contextual = tuple(seen.layer * seen.heads_of_layer + head in (self.contextual or ()) for head in seen.heads)
        if not any(contextual):
            return near
        received = seen.received(slice(None, None, -(-seen.new // 64))).masked_fill_(near == math.inf, math.inf)
        if all(contextual):
            return received
        # both kinds hold as much as long as there is little
        return torch.where(_flags(contextual, near.device), received, near)


@cache
def _flags(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    """Truth values of heads, (H, 1): on the device once, as scoring must not wait for a copy."""
    with torch.inference_mode(False):  # whoever comes next may not be in it
        return torch.tensor(flags, device=device)[:, None]
