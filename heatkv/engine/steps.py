"""What every layer does at every target scale under a static plan, worked out before the first image.

Shapes: H heads, N tokens of the running scale, D head size, I members of a pooled token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from heatkv.core.plan import Plan
from heatkv.engine.attention.base import AttentionKernel, CallShape
from heatkv.engine.attention.pooling import Reduction
from heatkv.engine.layout import ArenaLayout, slots_in
from heatkv.engine.store import Places, Store

Members = TypeVar("Members", Places, Tensor)


@dataclass(frozen=True)
class Pooling(Generic[Members]):
    """Tokens of a coarser level to write at `slots`: made of held ones, or of new ones by their place in (H * N)."""

    members: Members
    reduction: Reduction
    slots: Places

    def pooled(self, k_RID: Tensor, v_RID: Tensor) -> tuple[Places, Tensor, Tensor]:
        """What to write where."""
        return self.slots, self.reduction.keys(k_RID), self.reduction.values(v_RID)


@dataclass(frozen=True)
class LayerStep:
    """What one layer does at one target scale: whom it reads, and what it keeps where.

    `reads` and `kept` are what the attention kernel prepared, the second for heads that keep their new tokens whole,
    None where no head does; `pooled_new` are made from new tokens, `pooled_held` from held ones.
    """

    reads: Any
    kept: Any
    pooled_new: Pooling[Tensor] | None
    pooled_held: Pooling[Places] | None


Fall = tuple[int, int, int, int]
"""A cell that goes to a coarser level: head, source scale, level, coarser level."""


class PlanSteps:
    """The steps of a plan that is laid out in a store, for one kernel and so many rows at once, per scale."""

    def __init__(
        self,
        plan: Plan,
        layout: ArenaLayout,
        store: Store,
        kernel: AttentionKernel,
        rows_at_once: Sequence[int],
        key_angles: Sequence[Tensor] | None,
    ) -> None:
        self._plan, self._store, self._kernel, self._rows_at_once = plan, store, kernel, rows_at_once
        self._key_angles = key_angles
        self._slots = {cell: slots_in(runs) for cell, runs in layout.runs.items()}
        self._biases = [np.zeros(plan.last_read.shape), *(cells.log_bias for cells in plan.coarse)]
        self._dropped = len(plan.levels)  # the level of a cell that is not held at all
        # [target][layer][head][source]: the level at which a cell is read; after the last target, none is
        self._levels = [plan.level_read(target).tolist() for target in range(len(plan.schedule))]
        self._levels.append(np.full(plan.last_read.shape, self._dropped).tolist())
        self._reductions: dict[tuple[int, int, int], Reduction] = {}

    def step(self, target: int, layer: int) -> LayerStep:
        tokens, device = self._plan.schedule.tokens[target], self._store.device
        falls = self._falls(target, layer) if self._plan.coarse else []
        new, held = [x for x in falls if x[1] == target], [x for x in falls if x[1] < target]
        pooled_new, pooled_held = None, None
        if new:
            members = np.concatenate([head * tokens + np.arange(tokens) for head, *_ in new])
            pooled_new = Pooling(torch.from_numpy(members).to(device), *self._pooling(layer, new))
        if held:
            members = np.concatenate([self._slots[level, layer, head, source] for head, source, level, _ in held])
            pooled_held = Pooling(self._store.places(members), *self._pooling(layer, held))
        return LayerStep(self._reads(target, layer), self._kept(target, layer), pooled_new, pooled_held)

    def _reads(self, target: int, layer: int) -> Any:
        """What the kernel prepares of the slots that every head reads, and of what is added to their logits."""
        slots_of_head, bias_of_head = [], []
        for head, levels in enumerate(self._levels[target][layer]):
            cells = [(level, source) for source, level in enumerate(levels) if level < self._dropped]
            slots = [self._slots[level, layer, head, source] for level, source in cells]
            slots_of_head.append(np.concatenate([np.zeros(0, dtype=np.int64), *slots]))
            if self._plan.coarse:
                bias = [self._biases[level][layer, head, source] for level, source in cells]
                bias_of_head.append(np.repeat(bias, [len(x) for x in slots]) if cells else np.zeros(0))
        shape = CallShape(
            self._rows_at_once[target],
            self._plan.schedule.tokens[target],
            self._store.head_dim,
            self._store.dtype.itemsize,
        )
        return self._kernel.prepare(slots_of_head, bias_of_head or None, shape)

    def _kept(self, target: int, layer: int) -> Any:
        """What the kernel prepares for the heads that keep their new tokens whole."""
        heads = [head for head, levels in enumerate(self._levels[target + 1][layer]) if levels[target] == 0]
        slots = [self._slots[0, layer, head, target] for head in heads]
        return self._kernel.prepare_kept(heads, np.stack(slots)) if heads else None

    def _falls(self, target: int, layer: int) -> list[Fall]:
        """The cells that the next target reads at a coarser level than this one; new tokens come at level 0."""
        now, then = self._levels[target][layer], self._levels[target + 1][layer]
        return [
            (head, source, level, coarser)
            for head, levels in enumerate(then)
            for source, (level, coarser) in enumerate(zip([*now[head], 0], levels, strict=False))
            if level < coarser < self._dropped
        ]

    def _pooling(self, layer: int, falls: list[Fall]) -> tuple[Reduction, Places]:
        """How cells are made coarser together, and the slots they then have."""
        reductions = [self._reduction(source, level, coarser) for _, source, level, coarser in falls]
        slots = [self._slots[coarser, layer, head, source] for head, source, _, coarser in falls]
        return Reduction.together(reductions), self._store.places(np.concatenate(slots), writing=True)

    def _reduction(self, source: int, level: int, coarser: int) -> Reduction:
        key = (source, level, coarser)
        if key not in self._reductions:
            finer_name, coarser_name = (self._plan.levels[index][0] for index in (level, coarser))
            angles = None if self._key_angles is None else self._key_angles[source]
            scale = self._plan.schedule.scales[source]
            self._reductions[key] = Reduction.of(scale, finer_name, coarser_name, self._store.device, angles)
        return self._reductions[key]
