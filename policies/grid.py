"""What policies share that keep tokens by where they are: the latest first, and of a scale regular sub-grids."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import IntArray
from heatkv.policies.dynamic import Candidates


def carried_recency(seen: Candidates, first_scales: int) -> Tensor:
    """The `recency` of every candidate, (R, H, C, 1): carried along for held tokens, looked up for new ones. Tokens of
    the first scales, which stay in any case, have +inf."""
    scores = seen.carried_RHCX.clone()
    scores[:, :, seen.held :, 0] = _of_scale(seen.schedule, seen.target, first_scales, scores.device)
    return scores


@cache
def _of_scale(schedule: ScaleSchedule, scale: int, first_scales: int, device: torch.device) -> Tensor:
    if scale < first_scales:
        return torch.full((schedule.tokens[scale],), math.inf, device=device)
    return recency(schedule)[schedule.slice(scale)].to(device)


@cache
def recency(schedule: ScaleSchedule) -> Tensor:
    """A score for every token of the sequence: later scales first, and within a scale regular sub-grids, the coarsest
    first, so that whatever is kept of a scale is spread over it."""
    scores = []
    for scale, (frames, height, width) in enumerate(schedule.scales):
        row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        finest = max(height, width).bit_length()
        fineness = np.minimum(_trailing_zeros(row, finest), _trailing_zeros(column, finest))
        # tokens of one sub-grid in order of their rows, spread by a large step, rather than the upper ones first
        order = (row * width + column) * 0.618034 % 1
        scores.append(np.tile((scale * 64 + fineness + order).reshape(-1), frames))
    return torch.from_numpy(np.concatenate(scores)).float()


def _trailing_zeros(numbers: IntArray, most: int) -> IntArray:
    """How often each number is divisible by two; `most` for 0."""
    zeros = np.zeros_like(numbers)
    for power in range(1, most + 1):
        zeros += numbers % (1 << power) == 0
    return zeros
