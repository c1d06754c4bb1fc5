"""The static slot layout of a plan: where in the one arena every cached cell lies, known before the first image.

A slot holds the key and the value of one token in one head. Cells come and go at known checkpoints, so places are
assigned once: nothing moves during generation, and the arena is exactly as large as the plan's peak.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.levels import level_tokens
from heatkv.core.plan import Plan

Run = tuple[int, int]
"""(first slot, number of slots)."""


class _FreeSlots:
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
            if not self._by_size:
                raise AssertionError("the arena is smaller than the plan's peak")
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


Cells = tuple[tuple[tuple[tuple[Run, ...], ...], ...], ...]
"""Runs of every cell, [layer][head][source scale]; empty for a cell that is never held."""


@dataclass(frozen=True)
class ArenaLayout:
    """Slots of every held cell at every level of the plan, fine to coarse: `levels[i][l][h][s]`.

    A cell lies in one run where best fit finds room, in several where it does not; tokens fill the runs in order.
    The first `uncoded_slots` are for sinks alone, where an arena is coded.
    """

    slots: int
    levels: tuple[Cells, ...]
    uncoded_slots: int = 0

    @property
    def runs(self) -> Cells:
        """Slots of the cells that are held whole."""
        return self.levels[0]

    @classmethod
    def of(cls, plan: Plan, coded: bool = False) -> ArenaLayout:
        """Lay out a plan in as many slots as its peak, in the order in which a cache runs.

        Where the arena is coded, the sinks that are not come first, in slots of their own.
        """
        layers, heads, scales = plan.last_read.shape
        tokens = [level_tokens(plan.schedule, level) for level, _ in plan.levels]
        # sinks are never dropped, so that the other cells have their peak while all of them are held
        first, uncoded_scales = (
            (plan.geometry.uncoded_token_heads(plan.uncoded_scales), plan.uncoded_scales) if coded else (0, 0)
        )
        pools = _FreeSlots(0, first), _FreeSlots(first, plan.peak_token_heads - first)
        runs: list[list[list[list[tuple[Run, ...]]]]] = [
            [[[()] * scales for _ in range(heads)] for _ in range(layers)] for _ in plan.levels
        ]
        # a cell is held at a level from when the finer ones end, or it is drawn, until its own last target
        starting: dict[tuple[int, int], list[tuple[int, int, int, int]]] = defaultdict(list)
        ending: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
        finer = np.broadcast_to(np.arange(scales), plan.last_read.shape)
        for level, (_, last_read) in enumerate(plan.levels):
            held = np.argwhere(last_read > finer)
            starts, ends = (array[tuple(held.T)].tolist() for array in (finer, last_read))
            for (layer, head, source), start, end in zip(held.tolist(), starts, ends, strict=True):
                starting[start, layer].append((end, head, source, level))
                ending[end, layer].append((head, source, level))
            finer = last_read
        for target in range(scales):
            for layer in range(layers):
                for head, source, level in ending[target, layer]:
                    free = pools[source >= uncoded_scales]
                    free.give(runs[level][layer][head][source])
                # cells that go together lie together, so that they leave long free stretches
                for _, head, source, level in sorted(starting[target, layer]):
                    free = pools[source >= uncoded_scales]
                    runs[level][layer][head][source] = free.take(tokens[level][source])
        frozen = (tuple(tuple(tuple(cells) for cells in layer) for layer in level) for level in runs)
        return cls(plan.peak_token_heads, tuple(frozen), first)

    @cached_property
    def cells(self) -> int:
        """Cells that are held at all, once for every level."""
        return sum(1 for level in self.levels for layer in level for head in layer for cell in head if cell)


@dataclass(frozen=True)
class CapacityLayout:
    """Slots of every head while every target runs: `places[t][l][h]`, in the order of the tokens they hold.

    Where heads share, a layer has one list for all of them, as if it were one head.
    """

    slots: int
    places: tuple[tuple[tuple[NDArray[np.int64], ...], ...], ...]

    @classmethod
    def of(cls, plan: CapacityPlan) -> CapacityLayout:
        """Lay out a plan in as many slots as its peak, in the order in which a cache runs.

        A head that grows keeps its slots and gets more, one that shrinks keeps its first ones.
        """
        counts = plan.capacity.sum(axis=1, keepdims=True) if plan.shared else plan.capacity
        layers, holders, scales = counts.shape
        free = _FreeSlots(0, plan.peak_token_heads)
        none = np.zeros(0, dtype=np.int64)
        now = [[none] * holders for _ in range(layers)]
        places = [tuple(tuple(layer) for layer in now)]
        for target in range(scales - 1):
            for layer in range(layers):
                wanted = counts[layer, :, target + 1].tolist()
                for holder, count in enumerate(wanted):
                    held = now[layer][holder]
                    if len(held) > count:
                        free.give(_runs(held[count:]))
                        now[layer][holder] = held[:count]
                for holder, count in enumerate(wanted):
                    held = now[layer][holder]
                    if len(held) < count:
                        taken = free.take(count - len(held))
                        now[layer][holder] = np.concatenate([held, *(np.arange(a, a + n) for a, n in taken)])
            places.append(tuple(tuple(layer) for layer in now))
        return cls(plan.peak_token_heads, tuple(places))


def _runs(slots: NDArray[np.int64]) -> list[Run]:
    """The stretches of neighbouring slots."""
    pieces = np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1)
    return [(int(piece[0]), len(piece)) for piece in pieces]
