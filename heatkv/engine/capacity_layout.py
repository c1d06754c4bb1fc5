"""The slots of a dynamic plan: how many every head holds is known before the first image, which tokens is not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.schema import IntArray
from heatkv.engine.layout import FreeSlots, Run, slots_in


@dataclass(frozen=True)
class CapacityLayout:
    """Slots of every head while every target runs: `places[t][l][h]`, in the order of the tokens they hold.

    One more entry than there are targets: after the last one nothing is held. Where heads share, a layer has one list
    for all of them, as if it were one head.
    """

    slots: int
    places: tuple[tuple[tuple[IntArray, ...], ...], ...]

    @classmethod
    def for_plan(cls, plan: CapacityPlan) -> CapacityLayout:
        """Lay out a plan in as many slots as its peak, in the order in which a cache runs.

        A head that grows keeps its slots and gets more, one that shrinks keeps its first ones.
        """
        counts = plan.capacity.sum(axis=1, keepdims=True) if plan.shared else plan.capacity
        layers, holders, scales = counts.shape
        free = FreeSlots(0, plan.peak_token_heads)
        nothing = [[np.zeros(0, dtype=np.int64)] * holders for _ in range(layers)]
        now = [list(layer) for layer in nothing]
        places = [now]
        for target in range(1, scales):
            now = [list(layer) for layer in now]
            for layer, held in enumerate(now):
                wanted = counts[layer, :, target].tolist()
                for holder, count in enumerate(wanted):
                    if len(held[holder]) > count:
                        free.give(_runs(held[holder][count:]))
                        held[holder] = held[holder][:count]
                for holder, count in enumerate(wanted):
                    if len(held[holder]) < count:
                        held[holder] = np.concatenate([held[holder], slots_in(free.take(count - len(held[holder])))])
            places.append(now)
        places.append(nothing)
        return cls(plan.peak_token_heads, tuple(tuple(tuple(layer) for layer in target) for target in places))


def _runs(slots: IntArray) -> list[Run]:
    """The stretches of neighbouring slots."""
    pieces = np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1)
    return [(int(piece[0]), len(piece)) for piece in pieces]
