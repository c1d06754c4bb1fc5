"""Two kinds of heads, each with its own budget and way to choose; after HACK, whose constants are not public."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.core.capacity_plan import available_tokens
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.policies.grid import carried_recency
from heatkv.registry import register

IntArray = NDArray[np.int64]


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

    name: ClassVar[str] = "hack-like"
    needs: ClassVar[str] = "statistics"
    source: ClassVar[str] = "after HACK (AAAI 2026); own constants"

    contextual_share: float = 0.5
    contextual_capacity: float = 0.5
    sinks: int = 3
    contextual: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.contextual is not None:
            object.__setattr__(self, "contextual", tuple(self.contextual))

    @property
    def carried(self) -> int:
        return 1

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        for name in ("contextual_share", "contextual_capacity"):
            value: Any = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < 1:
                raise PolicyError(f"{name}={value!r} must be a share between 0 and 1")
        scales = len(problem.geometry.schedule)
        if not isinstance(self.sinks, int) or not 0 <= self.sinks < scales:
            raise PolicyError(f"sinks={self.sinks!r} must be a number of scales from 0 to {scales - 1}")
        pairs = problem.geometry.layers * problem.geometry.heads
        if not all(isinstance(pair, int) and 0 <= pair < pairs for pair in self.contextual or ()):
            raise PolicyError(f"contextual={self.contextual!r} must be pairs l * H + h from 0 to {pairs - 1}")

    def check_measured(self, problem: PlanningProblem) -> None:
        if self.contextual is None and problem.statistics is None:
            raise PolicyError(
                f"policy {self.name!r} needs statistics to tell kinds of heads (heatkv calibrate, then "
                "--statistics FILE)"
            )

    def resolved(self, problem: PlanningProblem) -> HackLike:
        if self.contextual is not None:
            return self
        assert problem.statistics is not None
        late = len(problem.geometry.schedule) // 2
        concentration = problem.statistics.concentration[:, :, late:].mean(axis=2).reshape(-1)
        count = round(self.contextual_share * len(concentration))
        return replace(self, contextual=tuple(sorted(np.argsort(-concentration, kind="stable")[:count].tolist())))

    def _is_contextual(self, layers: int, heads: int) -> NDArray[np.bool_]:
        assert self.contextual is not None
        chosen = np.zeros(layers * heads, dtype=bool)
        chosen[list(self.contextual)] = True
        return chosen.reshape(layers, heads)

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        geometry = problem.geometry
        contextual = self._is_contextual(geometry.layers, geometry.heads)
        share = float(contextual.mean())
        small = math.floor(self.contextual_capacity * mean)
        large = math.floor((mean - share * small) / (1 - share)) if share < 1 else mean
        of_heads = np.where(contextual, small, large)[:, :, None]
        return np.minimum(available_tokens(geometry), of_heads).astype(np.int64)

    def carry(self, seen: Candidates) -> Tensor:
        return carried_recency(seen, self.sinks)

    def score(self, seen: Candidates) -> Tensor:
        assert seen.carried_RHCX is not None
        assert self.contextual is not None
        near = seen.carried_RHCX[..., 0]
        contextual = [seen.layer * seen.heads_of_layer + head in self.contextual for head in seen.heads]
        if not any(contextual):
            return near
        received = seen.received(slice(None, None, -(-seen.new // 64))).masked_fill_(near == math.inf, math.inf)
        if all(contextual):
            return received
        # both kinds hold as much as long as there is little
        return torch.where(_flags(tuple(contextual), near.device), received, near)


@cache
def _flags(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    """Truth values of heads, (H, 1): on the device once, as scoring must not wait for a copy."""
    with torch.inference_mode(False):  # whoever comes next may not be in it
        return torch.tensor(flags, device=device)[:, None]
