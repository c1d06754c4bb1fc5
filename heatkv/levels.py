"""The levels at which a cell can be held: whole, pooled 2x2, as one mean token, or not at all.

A pooled key or value is the plain average of a block's tokens; blocks at odd edges average what is there. A pooled
token stands for several, so its logit gets a bias: by default the log of how many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from heatkv.schedule import ScaleSchedule

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

FULL, POOL2, MEAN = "full", "pool2", "mean"
LEVELS = (FULL, POOL2, MEAN)
"""Fine to coarse; a cell only ever goes to the right, and then is dropped."""


@dataclass(frozen=True)
class Blocks:
    """Which of a scale's tokens every token of a level stands for: `of[i]` is the block of token i, in order."""

    of: tuple[int, ...]

    @property
    def count(self) -> int:
        return max(self.of) + 1

    @property
    def sizes(self) -> IntArray:
        """Tokens of every block."""
        return np.bincount(np.asarray(self.of, dtype=np.int64))


@cache
def blocks(scale: tuple[int, int, int], level: str) -> Blocks:
    """The blocks of a scale (t, h, w) at a level; frames are pooled one by one, the mean is over all of them."""
    frames, height, width = scale
    if level == FULL:
        return Blocks(tuple(range(frames * height * width)))
    if level == MEAN:
        return Blocks((0,) * (frames * height * width))
    if level != POOL2:
        raise ValueError(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
    rows, columns = -(-height // 2), -(-width // 2)
    frame, row, column = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    of = (frame * rows + row // 2) * columns + column // 2
    return Blocks(tuple(of.reshape(-1).tolist()))


@cache
def level_tokens(schedule: ScaleSchedule, level: str) -> tuple[int, ...]:
    """Tokens of every scale at a level."""
    return tuple(blocks(scale, level).count for scale in schedule.scales)


def log_counts(schedule: ScaleSchedule, level: str) -> FloatArray:
    """Log of how many tokens a token of the level stands for on average, per scale: the bias without calibration."""
    return np.log(np.asarray(schedule.tokens) / np.asarray(level_tokens(schedule, level)))


def useful_levels(scale: tuple[int, int, int]) -> tuple[str, ...]:
    """The levels worth choosing from, fine to coarse: pooling pays from 4 x 4 tokens on."""
    frames, height, width = scale
    if frames * height * width == 1:
        return (FULL,)
    return LEVELS if min(height, width) >= 4 else (FULL, MEAN)
