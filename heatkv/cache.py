"""The arena cache: one buffer for all layers, as large as the plan's peak, behind the one verb `attend`.

Cells that a plan holds at a coarser level are made from the finer one when its last reader is done, within the budget.
Shapes: R rows, H heads, N tokens of the running scale, D head size, P arena slots, I members of a pooled token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.arena import ArenaLayout, Run
from heatkv.attention.pooling import Reduction
from heatkv.attention.ragged import HeadGroup, group_heads, ragged_attention
from heatkv.checks import of_kind, shown, whole
from heatkv.errors import PlanError
from heatkv.levels import level_tokens
from heatkv.plan import CachePlan, Plan

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Pooling:
    """Tokens of a coarser level to write at `slots`: made from members, slots of the arena or places in (H * N)."""

    members: Tensor
    reduction: Reduction
    slots: Tensor


@dataclass(frozen=True)
class LayerStep:
    """What one layer does at one target scale: whom it reads, and what it keeps where.

    `kept_heads` keep their new tokens whole; `pooled_new` are made from new tokens, `pooled_held` from held ones.
    """

    groups: tuple[HeadGroup, ...]
    kept_heads: Tensor
    kept_slots: Tensor
    pooled_new: Pooling | None
    pooled_held: Pooling | None


class ArenaCache(ABC):
    """What every cache is: one arena for all layers, and the order in which a model calls it.

    A model calls `attend(layer, q, k, v)`, layer by layer and scale by scale; the cache counts the scales itself.
    Slots are read only after they were written for the running images, so neither a pad nor a leftover can be seen.
    `correct(target, layer, q, out)` may change what attention gives. Raises PlanError when it is called in another
    order, with another shape than the plan's, or in several dtypes.
    """

    def __init__(
        self,
        plan: CachePlan,
        slots: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        correct: Callable[[int, int, Tensor, Tensor], Tensor] | None,
    ) -> None:
        of_kind(dtype, torch.dtype, "dtype", PlanError, "give a type of torch, such as torch.float32")
        self.geometry = plan.geometry
        self.rows = whole(rows, "rows", PlanError, 1)
        self._correct = correct
        shape = (2, self.rows, slots, plan.geometry.head_dim)
        self.arena_2RPD = torch.empty(shape, dtype=dtype, device=torch.device(device))

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the real storage of all that is held."""
        return self.arena_2RPD.untyped_storage().nbytes()

    def reset(self) -> None:
        """Start the next images; nothing needs clearing."""
        self._target, self._next_layer = 0, 0

    def attend(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """Attention over what the plan still holds plus the current scale; then drop, then write what is kept.

        q, k, v are (R, H, N, D) in one dtype, q already scaled, k as it is to be cached (normalised, rotated).
        Returns (R, H, N, D). Raises PlanError for another layer than the next, another shape, or several dtypes.
        """
        geometry = self.geometry
        if layer != self._next_layer or self._target >= len(geometry.schedule):
            raise PlanError(
                f"attend was called for layer {layer} when layer {self._next_layer} of scale {self._target} was due; "
                "call reset() before new images"
            )
        expected = (self.rows, geometry.heads, geometry.schedule.tokens[self._target], geometry.head_dim)
        for name, x in (("v", v_RHND), ("q", q_RHND), ("k", k_RHND)):
            if not isinstance(x, Tensor):
                raise PlanError(f"{name} of layer {layer}, scale {self._target} is {shown(x)}; it must be a tensor")
            if x.dtype != v_RHND.dtype:
                raise PlanError(f"{name} is of {x.dtype}, v of {v_RHND.dtype}; give q, k and v in one type")
            if x.shape != expected:
                raise PlanError(
                    f"{name} of layer {layer}, scale {self._target} is {tuple(x.shape)}; the plan needs (rows, heads, "
                    f"tokens, head_dim) = {expected}"
                )
        out = self._run(layer, q_RHND, k_RHND, v_RHND)
        self._next_layer += 1
        if self._next_layer == geometry.layers:
            self._target, self._next_layer = self._target + 1, 0
        return out

    @abstractmethod
    def _run(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """What `attend` gives, after which the cache holds what the next target reads."""

    def _corrected(self, layer: int, q_RHND: Tensor, out_RHND: Tensor) -> Tensor:
        return out_RHND if self._correct is None else self._correct(self._target, layer, q_RHND, out_RHND)

    def _write(self, slots: Tensor, k_RPD: Tensor, v_RPD: Tensor) -> None:
        for store_RPD, x_RPD in zip(self.arena_2RPD, (k_RPD, v_RPD), strict=True):
            store_RPD.index_copy_(1, slots, x_RPD.to(store_RPD.dtype))


class KVCache(ArenaCache):
    """Keys and values that a static plan keeps, for `rows` rows of images drawn together.

    Dropping is free: a slot whose last reader is done is overwritten by its next owner. `key_angles` are, for models
    that rotate keys, the angles of every token, (N, D/2) per scale; a plan with coarse cells needs them to pool.
    """

    def __init__(
        self,
        plan: Plan,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        key_angles: Sequence[Tensor] | None = None,
        correct: Callable[[int, int, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        of_kind(plan, Plan, "plan", PlanError, "make one with model.plan, or load one with Plan.load")
        if key_angles is not None and (not isinstance(key_angles, Sequence) or len(key_angles) != len(plan.schedule)):
            raise PlanError(f"key_angles is {shown(key_angles)}; give one tensor (N, D/2) per scale, or none")
        self.plan = plan
        self.key_angles = key_angles
        self.layout = ArenaLayout.of(plan)
        super().__init__(plan, self.layout.slots, rows, dtype, device, correct)
        self._steps = self._prepare()
        self.reset()

    def _prepare(self) -> list[list[LayerStep]]:
        plan, device = self.plan, self.arena_2RPD.device
        layers, heads = plan.geometry.layers, range(plan.geometry.heads)
        biases = [None, *(cells.log_bias for cells in plan.coarse)]
        none = np.zeros(0, dtype=np.int64)
        # level at which each cell is read by each target, and after it; the number of levels where it is not
        levels = [plan.level_read(target).tolist() for target in range(len(plan.schedule))]
        levels.append(np.full((layers, len(heads), len(plan.schedule)), len(biases)).tolist())
        reductions: dict[tuple[int, int, int], Reduction] = {}

        def reduction(source: int, held: int, wanted: int) -> Reduction:
            key = (source, held, wanted)
            if key not in reductions:
                angles = None if self.key_angles is None else self.key_angles[source]
                finer, coarser = plan.levels[held][0], plan.levels[wanted][0]
                reductions[key] = Reduction.of(plan.schedule.scales[source], finer, coarser, device, angles)
            return reductions[key]

        def slots(layer: int, head: int, source: int, level: int) -> IntArray:
            return _slots(self.layout.levels[level][layer][head][source])

        def pooling(parts: Sequence[tuple[IntArray, Reduction, IntArray]]) -> Pooling | None:
            if not parts:
                return None
            members, made, places = zip(*parts, strict=True)
            return Pooling(
                torch.from_numpy(np.concatenate(members)).to(device),
                Reduction.together(made),
                torch.from_numpy(np.concatenate(places)).to(device),
            )

        steps = []
        for target, tokens in enumerate(plan.schedule.tokens):
            row = []
            for layer in range(layers):
                now, then = levels[target][layer], levels[target + 1][layer]
                held = [[(s, level) for s, level in enumerate(now[head]) if level < len(biases)] for head in heads]
                kept = [head for head in heads if then[head][target] == 0]
                new = [
                    (head * tokens + np.arange(tokens), reduction(target, 0, level), slots(layer, head, target, level))
                    for head in heads
                    if 0 < (level := then[head][target]) < len(biases)
                ]
                old = [
                    (slots(layer, head, s, level), reduction(s, level, after), slots(layer, head, s, after))
                    for head in heads
                    for s, level in held[head]
                    if level < (after := then[head][s]) < len(biases)
                ]
                row.append(
                    LayerStep(
                        group_heads(
                            [np.concatenate([none, *(slots(layer, h, s, i) for s, i in held[h])]) for h in heads],
                            device,
                            [self._bias(layer, h, held[h]) for h in heads] if plan.coarse else None,
                        ),
                        torch.tensor(kept, dtype=torch.long, device=device),
                        torch.from_numpy(np.concatenate([none, *(slots(layer, h, target, 0) for h in kept)])).to(
                            device
                        ),
                        pooling(new),
                        pooling(old),
                    )
                )
            steps.append(row)
        return steps

    def _bias(self, layer: int, head: int, held: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
        """The bias of every held token of a head, of (source, level) cells in turn."""
        sizes = [level_tokens(self.plan.schedule, level) for level, _ in self.plan.levels]
        parts = [np.full(sizes[i][s], self.plan.coarse[i - 1].log_bias[layer, head, s] if i else 0.0) for s, i in held]
        return np.concatenate([np.zeros(0), *parts])

    def _run(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        step = self._steps[self._target][layer]
        out = self._corrected(layer, q_RHND, self._attention(layer, q_RHND, k_RHND, v_RHND, step))
        self._keep(k_RHND, v_RHND, step)
        return out

    def _keep(self, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> None:
        """Write what later targets read; everything is made before a slot changes hands."""
        writes: list[tuple[Tensor, Tensor, Tensor]] = []
        if step.pooled_held is not None:
            made, members = step.pooled_held.reduction, step.pooled_held.members
            k_RID, v_RID = (store.index_select(1, members) for store in self.arena_2RPD)
            writes.append((step.pooled_held.slots, made.keys(k_RID), made.values(v_RID)))
        if step.pooled_new is not None:
            made, members = step.pooled_new.reduction, step.pooled_new.members
            k_RID, v_RID = (x.flatten(1, 2).index_select(1, members) for x in (k_RHND, v_RHND))
            writes.append((step.pooled_new.slots, made.keys(k_RID), made.values(v_RID)))
        if step.kept_slots.numel():
            whole = len(step.kept_heads) == k_RHND.shape[1]
            k, v = (x if whole else x.index_select(1, step.kept_heads) for x in (k_RHND, v_RHND))
            writes.append((step.kept_slots, k.flatten(1, 2), v.flatten(1, 2)))
        for slots, k, v in writes:
            self._write(slots, k, v)

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        return ragged_attention(q_RHND, k_RHND, v_RHND, self.arena_2RPD, step.groups)


def _slots(runs: tuple[Run, ...]) -> IntArray:
    """The slots of a cell in token order."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(first, first + size) for first, size in runs)])
