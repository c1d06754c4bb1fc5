"""The arena cache: one buffer for all layers, as large as the plan's peak, behind the one verb `attend`.

Shapes: R rows, H heads, N tokens of the running scale, D head size, P arena slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.arena import ArenaLayout, Run
from heatkv.attention.ragged import HeadGroup, group_heads, ragged_attention
from heatkv.errors import PlanError
from heatkv.plan import Plan


@dataclass(frozen=True)
class LayerStep:
    """What one layer does at one target scale: whom it reads, and which of its new tokens it keeps where."""

    groups: tuple[HeadGroup, ...]
    kept_heads: Tensor
    kept_slots: Tensor


class KVCache:
    """Keys and values that a plan keeps, for `rows` rows of images drawn together.

    A model calls `attend(layer, q, k, v)`, layer by layer and scale by scale; the cache counts the scales itself.
    Dropping is free: a slot whose last reader is done is overwritten by its next owner. Slots are read only after
    they were written for the running images, so neither a pad nor a leftover can be seen.
    Raises PlanError when it is called in another order or with another shape than the plan's.
    """

    def __init__(
        self, plan: Plan, rows: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        if rows < 1:
            raise PlanError(f"rows is {rows}; a cache has at least 1 row")
        self.plan = plan
        self.rows = rows
        self.layout = ArenaLayout.of(plan)
        self.arena_2RPD = torch.empty(
            (2, rows, self.layout.slots, plan.geometry.head_dim), dtype=dtype, device=torch.device(device)
        )
        self._steps = self._prepare()
        self.reset()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the arena's real storage."""
        return self.arena_2RPD.untyped_storage().nbytes()

    def reset(self) -> None:
        """Start the next images; nothing needs clearing."""
        self._target, self._next_layer = 0, 0

    def skip_to_last_scale(self) -> None:
        """Act as if all scales but the last had run, to measure the last one; what is held is not defined."""
        self._target, self._next_layer = len(self.plan.schedule) - 1, 0

    def _prepare(self) -> list[list[LayerStep]]:
        plan, device = self.plan, self.arena_2RPD.device
        none = np.zeros(0, dtype=np.int64)

        def slots_of(cells: Iterable[tuple[Run, ...]]) -> NDArray[np.int64]:
            return np.concatenate([none, *(np.arange(first, first + size) for cell in cells for first, size in cell)])

        steps = []
        for target in range(len(plan.schedule)):
            reads = plan.reads(target).tolist()
            row = []
            for layer_runs, layer_reads in zip(self.layout.runs, reads, strict=True):
                held = [
                    slots_of(cell for cell, read in zip(cells, wanted, strict=False) if read)
                    for cells, wanted in zip(layer_runs, layer_reads, strict=True)
                ]
                kept = [head for head, cells in enumerate(layer_runs) if cells[target]]
                row.append(
                    LayerStep(
                        group_heads(held, device),
                        torch.tensor(kept, dtype=torch.long, device=device),
                        torch.from_numpy(slots_of(layer_runs[head][target] for head in kept)).to(device),
                    )
                )
            steps.append(row)
        return steps

    def attend(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """Attention over what the plan still holds plus the current scale; then drop, then write what is kept.

        q, k, v are (R, H, N, D) in one dtype, q already scaled, k as it is to be cached (normalised, rotated).
        Returns (R, H, N, D).
        """
        geometry = self.plan.geometry
        if layer != self._next_layer or self._target >= len(self.plan.schedule):
            raise PlanError(
                f"attend was called for layer {layer} when layer {self._next_layer} of scale {self._target} was due; "
                "call reset() before new images"
            )
        expected = (self.rows, geometry.heads, self.plan.schedule.tokens[self._target], geometry.head_dim)
        for name, x in (("q", q_RHND), ("k", k_RHND), ("v", v_RHND)):
            if x.shape != expected:
                raise PlanError(
                    f"{name} of layer {layer}, scale {self._target} is {tuple(x.shape)}; the plan needs (rows, heads, "
                    f"tokens, head_dim) = {expected}"
                )
        step = self._steps[self._target][layer]
        out = self._attention(layer, q_RHND, k_RHND, v_RHND, step)
        if step.kept_slots.numel():
            for store_RPD, x in zip(self.arena_2RPD, (k_RHND, v_RHND), strict=True):
                kept = x if len(step.kept_heads) == geometry.heads else x.index_select(1, step.kept_heads)
                store_RPD.index_copy_(1, step.kept_slots, kept.flatten(1, 2).to(store_RPD.dtype))
        self._next_layer += 1
        if self._next_layer == geometry.layers:
            self._target, self._next_layer = self._target + 1, 0
        return out

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        return ragged_attention(q_RHND, k_RHND, v_RHND, self.arena_2RPD, step.groups)
