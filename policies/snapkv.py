"""Policies that keep the tokens which the most recent queries attend to: SnapKV, and PyramidKV over the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta
from torch import Tensor
from torch.nn import functional as F

from heatkv.core.capacity_plan import available_tokens
from heatkv.core.schema import IntArray
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem
from heatkv.policies.dynamic import Candidates, DynamicPolicy, alike_in_heads
from heatkv.registry import register


@register
@dataclass(frozen=True)
class SnapKV(DynamicPolicy):
    """The tokens that the last queries of a scale attend to most, averaged over neighbours, and those queries' own.

    Published for language models: `window` 64 (papers also 16 and 32), average pooling of width `kernel` 5 along the
    sequence, padding counted; the window's own tokens are kept. Queries of one scale see each other, so there is no
    causal mask in the window (chosen); it is the last tokens of the running scale, as many as it has, and a third of
    the capacity at most (chosen: small capacities would hold nothing but the window).
    """

    name = "snapkv"
    source = "SnapKV (Li et al. 2024)"

    window: Annotated[int, Meta(ge=1)] = 64
    kernel: Annotated[int, Meta(ge=1)] = 5

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        if self.kernel % 2 == 0:
            raise PolicyError(f"kernel={self.kernel} must be odd")

    def score(self, seen: Candidates) -> Tensor:
        window = _window(self.window, seen.new, seen.capacity)
        received = seen.received(slice(seen.new - window, None))
        before = seen.count - window
        score = received.new_full(received.shape, math.inf)
        if before:
            pooled = F.avg_pool1d(received[..., :before].flatten(0, 1), self.kernel, 1, self.kernel // 2)
            score[..., :before] = pooled.view(*received.shape[:2], before)
        return score


def _window(most: int, new: int, capacity: int) -> int:
    """How many of the new tokens observe."""
    return max(1, min(most, new, capacity // 3))


@register
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more tokens in early layers: capacities fall linearly with depth, by a factor of `beta` at most.

    Published for language models: beta 20, and SnapKV's numbers. With m tokens on average, w the window and T tokens
    there are: lo = (m - w) / beta, hi = 2 (m - w) - lo, or where hi > T - w, hi = T - w, lo = 2 (m - w) - hi; layer l
    keeps w + hi - l (hi - lo) / (L - 1), and all keep m while T is at most 2 (m - w). Rounded so that the mean is
    exactly m, the largest that fits while layers change one after another (chosen).
    """

    name = "pyramidkv"
    source = "PyramidKV (Cai et al. 2024)"

    beta: Annotated[float, Meta(ge=1)] = 20.0

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        geometry = problem.geometry
        available = available_tokens(geometry)
        tokens = (0, *geometry.schedule.tokens)
        of_layers = np.stack(
            [self._of_layers(geometry.layers, mean, int(t), n) for t, n in zip(available, tokens, strict=False)], axis=1
        )
        return alike_in_heads(problem, of_layers)

    def _of_layers(self, layers: int, mean: int, available: int, new: int) -> IntArray:
        window = _window(self.window, new, mean)
        if available <= 2 * (mean - window) or available <= mean or layers == 1:
            return np.full(layers, min(mean, available), dtype=np.int64)
        low = (mean - window) / self.beta
        high = 2 * (mean - window) - low
        if high > available - window:
            high = available - window
            low = 2 * (mean - window) - high
        exact = window + high - np.arange(layers) * (high - low) / (layers - 1)
        whole = np.floor(exact + 1e-9).astype(np.int64)
        for layer in np.argsort(whole - exact, kind="stable")[: mean * layers - int(whole.sum())]:
            whole[layer] += 1
        return np.clip(whole, 0, available)
