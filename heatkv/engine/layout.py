"""The static slot layout of a plan: where in the one arena every cached cell lies, known before the first image.

A slot holds the key and the value of one token in one head. Cells come and go at known checkpoints, so places are
assigned once: nothing moves during generation, and the arena is exactly as large as the plan's peak.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heatkv.core.levels import level_tokens
from heatkv.core.plan import Plan
from heatkv.core.schema import IntArray

Run = tuple[int, int]
"""(first slot, number of slots)."""

Cell = tuple[int, int, int, int]
"""(level, layer, head, source scale); the level is an index into the plan's levels, 0 for whole cells."""


class FreeSlots:
    """Free stretches of the arena, by size for best fit and by both ends for joining neighbours."""

    def __init__(self, first: int, capacity: int) -> None:
        self._by_size: list[tuple[int, int]] = []
        self._size_at: dict[int, int] = {}
        self._start_of_end: dict[int, int] = {}
        if capacity:
            self._add(first, capacity)

    def _add(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))
        self._size_at[start] = size
        self._start_of_end[start + size] = start

    def _remove(self, start: int) -> int:
        size = self._size_at.pop(start)
        del self._start_of_end[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        return size

    def take(self, count: int) -> tuple[Run, ...]:
        """The smallest stretch that is large enough; when there is none, the largest ones until `count` is reached."""
        runs: list[Run] = []
        while count:
            at = bisect_left(self._by_size, (count, -1))
            size, start = self._by_size[at if at < len(self._by_size) else -1]
            self._remove(start)
            used = min(size, count)
            if used < size:
                self._add(start + used, size - used)
            runs.append((start, used))
            count -= used
        return tuple(runs)

    def give(self, runs: Sequence[Run]) -> None:
        for start, size in runs:
            if start + size in self._size_at:
                size += self._remove(start + size)
            if start in self._start_of_end:
                before = self._start_of_end[start]
                start, size = before, self._remove(before) + size
            self._add(start, size)


@dataclass(frozen=True)
class ArenaLayout:
    """The runs of every cell that a static plan holds, once for every level it is held at.

    A cell lies in one run where best fit finds room, in several where it does not; tokens fill the runs in order.
    The first `uncoded_slots` of a coded arena are for the sinks that are not coded; in any other there are none.
    """

    slots: int
    runs: dict[Cell, tuple[Run, ...]]
    uncoded_slots: int = 0

    @classmethod
    def for_plan(cls, plan: Plan, coded: bool = False) -> ArenaLayout:
        """Lay out a plan in as many slots as its peak, in the order in which a cache runs."""
        tokens = [level_tokens(plan.schedule, level) for level, _ in plan.levels]
        # sinks are never dropped, so that the other cells have their peak while all of them are held
        uncoded_scales = plan.uncoded_scales if coded else 0
        uncoded = plan.geometry.uncoded_token_heads(uncoded_scales)
        pools = FreeSlots(0, uncoded), FreeSlots(uncoded, plan.peak_token_heads - uncoded)
        runs: dict[Cell, tuple[Run, ...]] = {}
        for _, layer, begins, _, head, source, level in _events(plan).tolist():
            cell, free = (level, layer, head, source), pools[source >= uncoded_scales]
            if begins:
                runs[cell] = free.take(tokens[level][source])
            else:
                free.give(runs[cell])
        return cls(plan.peak_token_heads, runs, uncoded)


def _events(plan: Plan) -> IntArray:
    """When cells begin and end to be held, in order: (target, layer, begins, last target, head, source, level).

    A cell is held at a level from when the finer ones end, or it is drawn, until its own last target. Those that begin
    together are in the order of their last target: cells that go together lie together and leave long free stretches.
    """
    events = []
    finer = np.broadcast_to(np.arange(len(plan.schedule)), plan.last_read.shape)
    for level, (_, last_read) in enumerate(plan.levels):
        layer, head, source = np.nonzero(last_read > finer)
        start, end = finer[layer, head, source], last_read[layer, head, source]
        for target, begins in ((end, 0), (start, 1)):
            columns = (target, layer, begins, end, head, source, level)
            events.append(np.stack(np.broadcast_arrays(*columns), axis=1))
        finer = last_read
    table: IntArray = np.concatenate(events)
    return table[np.lexsort(table.T[::-1])]


def slots_in(runs: Sequence[Run]) -> IntArray:
    """The slots of these runs in order."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(first, first + size) for first, size in runs)])
