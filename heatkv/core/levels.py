"""The levels at which a cell can be held: whole, pooled 2x2, as one mean token, or not at all.

A pooled key or value is the plain average of a block's tokens; blocks at odd edges average what is there. A pooled
token stands for several, so its logit gets a bias: by default the log of how many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray, IntArray

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
    rows, columns = -(-height // 2), -(-width // 2)
    frame, row, column = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    of = (frame * rows + row // 2) * columns + column // 2
    return Blocks(tuple(of.reshape(-1).tolist()))


@cache
def level_tokens(schedule: ScaleSchedule, level: str) -> tuple[int, ...]:
    """Tokens of every scale at a level."""
    if level == FULL:
        return schedule.tokens
    if level == MEAN:
        return (1,) * len(schedule)
    return tuple(frames * -(-height // 2) * -(-width // 2) for frames, height, width in schedule.scales)


def log_counts(schedule: ScaleSchedule, level: str) -> FloatArray:
    """Log of how many tokens a token of the level stands for on average, per scale: the bias without calibration."""
    logs: FloatArray = np.log(np.asarray(schedule.tokens) / np.asarray(level_tokens(schedule, level)))
    return logs


def useful_levels(scale: tuple[int, int, int]) -> tuple[str, ...]:
    """The levels worth choosing from, fine to coarse: pooling pays from 4 x 4 tokens on."""
    frames, height, width = scale
    if frames * height * width == 1:
        return (FULL,)
    return LEVELS if min(height, width) >= 4 else (FULL, MEAN)


SINK_SCALES = 2
"""Scales that stay whole unless another number is chosen: the third is small enough to be priced like the others."""

NONE = len(LEVELS)
"""The index, after those of LEVELS, of a cell that is not held."""


@dataclass(frozen=True)
class LevelChoices:
    """What a plan may choose for one head: a level for every source, jointly for the largest sources of a target.

    The first `sink_scales` scales stay full. The `joint` largest other sources of a target are combined freely; the
    rest are full, mean or none, each for itself. Levels are indices into LEVELS, or NONE.
    """

    schedule: ScaleSchedule
    sink_scales: int = SINK_SCALES
    joint: int = 5

    def of_source(self, source: int) -> tuple[int, ...]:
        """The levels of a source, fine to coarse, NONE last."""
        useful = useful_levels(self.schedule.scales[source])
        return (*(LEVELS.index(level) for level in useful), NONE)

    def joint_sources(self, target: int) -> tuple[int, ...]:
        """The largest sources of a target, in order."""
        free = range(self.sink_scales, target)
        largest = sorted(free, key=lambda s: (self.schedule.tokens[s], s))[-self.joint :] if self.joint else []
        return tuple(sorted(largest))

    def other_sources(self, target: int) -> tuple[int, ...]:
        """The sources that are neither sinks nor among the largest."""
        joint = self.joint_sources(target)
        return tuple(source for source in range(self.sink_scales, target) if source not in joint)

    def of_other(self, source: int) -> tuple[int, ...]:
        """The levels of a source that is not among the largest: a pooled cell has become a mean."""
        return tuple(level for level in self.of_source(source) if level != LEVELS.index(POOL2))

    def shape(self, target: int) -> tuple[int, ...]:
        """How many levels every joint source of a target has; their product counts the combinations."""
        return tuple(len(self.of_source(source)) for source in self.joint_sources(target))

    def combinations(self, target: int) -> IntArray:
        """The levels of every combination, (combinations, joint sources), the last source's changing fastest."""
        axes = [self.of_source(source) for source in self.joint_sources(target)]
        grids = np.meshgrid(*axes, indexing="ij")
        count = int(np.prod(self.shape(target)))
        return np.stack([grid.ravel() for grid in grids], axis=-1) if axes else np.zeros((count, 0), dtype=np.int64)

    def tokens(self, source: int) -> IntArray:
        """Tokens of a source at every level, NONE's 0 last."""
        return np.array([*(level_tokens(self.schedule, level)[source] for level in LEVELS), 0], dtype=np.int64)
