"""The arena cache: one buffer for all layers, as large as the plan's peak, behind the one verb `attend`.

Cells that a plan holds at a coarser level are made from the finer one when its last reader is done, within the budget.
Shapes: R rows, H heads, N tokens of the running scale, D head size, P arena slots, I members of a pooled token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from heatkv.core.checks import of_kind, shown, whole
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.storage_type import STORAGE_BYTES
from heatkv.engine.attention.grouped import CallShape
from heatkv.engine.attention.kernels import choose_kernel
from heatkv.engine.attention.pooling import Reduction
from heatkv.engine.layout import ArenaLayout, slots_in
from heatkv.engine.spans import ATTENTION, CACHE_UPDATE, span
from heatkv.engine.store import Places, Store, check_code
from heatkv.engine.watch import Watch
from heatkv.errors import PlanError

Members = TypeVar("Members", Places, Tensor)


class Turn:
    """Which call of attention is due: the layers of a scale one after the other, then those of the next scale.

    `rows` is 0 until it is known; a cache knows it from the start.
    """

    def __init__(self, geometry: CacheGeometry, rows: int = 0) -> None:
        self.geometry, self.rows = geometry, rows
        self.target, self.layer = 0, 0

    def restart(self) -> None:
        """Expect the first call of new images."""
        self.target, self.layer = 0, 0

    @property
    def done(self) -> bool:
        """Whether all scales have run in all layers."""
        return self.target == len(self.geometry.schedule) or self.layer == self.geometry.layers

    def check(self, layer: int, rows: int, tokens: int) -> None:
        """Raise PlanError unless a call of this layer, with so many rows and tokens of the scale, is due."""
        if self.done or layer != self.layer:
            raise PlanError(
                f"attend was called for layer {layer} when layer {self.layer} of scale {self.target} was due; "
                "call reset() before new images"
            )
        expected = (self.rows or rows, self.geometry.schedule.tokens[self.target])
        if (rows, tokens) != expected:
            raise PlanError(
                f"{rows} rows of {tokens} tokens arrived in layer {layer} of scale {self.target}; the plan's schedule "
                f"and these images need {expected[0]} of {expected[1]}"
            )

    def advance(self) -> None:
        """Go on to the call that is due next."""
        self.layer += 1
        if self.layer == self.geometry.layers:
            self.target, self.layer = self.target + 1, 0


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


class ArenaCache(ABC):
    """What every cache is: one arena for all layers, and the order in which a model calls it.

    A model calls `attend(layer, q, k, v)`, layer by layer and scale by scale; the cache counts the scales itself.
    Slots are read only after they were written for the running images, so neither a pad nor a leftover can be seen.
    """

    turns: type[Turn] = Turn
    """The order in which the cache is called."""

    wants_input = False
    """Whether the model must call `see_input` before every `attend`."""

    _steps: Any
    """What every target and layer does: nested sequences and dataclasses of tensors."""

    def __init__(
        self,
        plan: CachePlan,
        slots: int,
        uncoded_slots: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        code: str | None,
        attention: str,
    ) -> None:
        if str(dtype).removeprefix("torch.") not in STORAGE_BYTES:
            raise PlanError(f"dtype {shown(dtype)} cannot hold keys and values; use torch.float32 or torch.bfloat16")
        device = torch.device(device)
        check_code(code, device)
        self.geometry = plan.geometry
        self.rows = whole(rows, "rows", PlanError, 1)
        self.turn = self.turns(plan.geometry, self.rows)
        self.store = Store(self.rows, slots, plan.geometry.head_dim, dtype, device, code, uncoded_slots)
        self.kernel = choose_kernel(attention, self.store)
        self.watch = Watch(plan.geometry, self.rows, dtype, device)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that hold what is cached."""
        return self.store.buffers

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the real storage of all that is held, with the scales of coded tokens."""
        return storage_bytes(self.held)

    @property
    def tables(self) -> list[Tensor]:
        """The tensors that say what is read and written where."""
        return tensors_in(self._steps)

    @property
    def index_bytes(self) -> int:
        """Bytes of the tables, the same for any number of rows."""
        return storage_bytes(self.tables)

    @property
    def attention(self) -> str:
        """The name of the attention kernel that runs."""
        return self.kernel.name

    @property
    def workspace_bytes(self) -> int:
        """Bytes that attention keeps beside the arena to work in."""
        return self.kernel.workspace_bytes

    @property
    def current_bytes(self) -> int:
        """Bytes of the keys and values of the running scale of one layer, where that is largest: they come from the
        model, and are not cached, but are there beside the arena."""
        geometry = self.geometry
        tokens = max(geometry.schedule.tokens)
        return 2 * self.rows * geometry.heads * tokens * geometry.head_dim * self.store.dtype.itemsize

    @property
    def _target(self) -> int:
        """The running scale."""
        return self.turn.target

    def reset(self) -> None:
        """Start the next images; nothing that is held needs clearing."""
        self.turn.restart()
        self.watch.clear()

    def see_input(self, layer: int, attention_input_RNW: Tensor) -> None:
        """What the next layer's queries, keys and values are made from; only a cache that `wants_input` looks at it."""
        del layer, attention_input_RNW

    def check(self, images: int | None = None) -> None:
        """Call this when images are done; it waits for the device.

        Raises NumericsError when a query, key or value was not finite, and names the first one; with `images`, the
        number of them, its row is named as one of theirs.
        """
        broken = self.watch.first(images)
        if broken is not None:
            raise broken[1]

    def attend(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """Attention over what the plan still holds plus the current scale; then drop, then write what is kept.

        q, k, v are (R, H, N, D) in one dtype, q already scaled, k as it is to be cached (normalised, rotated).
        Returns (R, H, N, D). Raises PlanError for another layer than the next, and other rows or tokens than expected.
        """
        self.turn.check(layer, v_RHND.shape[0], v_RHND.shape[2])
        self.watch.see(self.turn.target, layer, q_RHND, k_RHND, v_RHND)
        out = self._run(layer, q_RHND, k_RHND, v_RHND)
        self.turn.advance()
        return out

    @abstractmethod
    def _run(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """What `attend` returns, after which the cache holds what the next target reads."""


class KVCache(ArenaCache):
    """Keys and values that a static plan keeps, for `rows` rows of images drawn together.

    Dropping is free: a slot whose last reader is done is overwritten by its next owner. `key_angles` are, for models
    that rotate keys, the angles of every token, (N, D/2) per scale; a plan with coarse cells needs them to pool.
    `code` is "int8" or "fp8" for 8-bit codes, sinks excepted, and None for the compute type; `attention` names the
    kernel, "ragged", "triton", or "auto" for the one that suits the device. Raises PlanError for what cannot run here.
    """

    def __init__(
        self,
        plan: Plan,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        key_angles: Sequence[Tensor] | None = None,
        code: str | None = None,
        attention: str = "auto",
    ) -> None:
        of_kind(plan, Plan, "plan", PlanError, "make one with model.plan, or load one with Plan.load")
        self.plan, self.key_angles = plan, key_angles
        self.layout = ArenaLayout.for_plan(plan, code is not None)
        super().__init__(plan, self.layout.slots, self.layout.uncoded_slots, rows, dtype, device, code, attention)
        self._steps: list[list[LayerStep]] = self._prepare()
        self.reset()

    def _prepare(self) -> list[list[LayerStep]]:
        """The steps of every target and layer."""
        steps = _Steps(self)
        targets, layers = range(len(self.plan.schedule)), range(self.geometry.layers)
        return [[steps.step(target, layer) for layer in layers] for target in targets]

    def _run(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        step = self._steps[self.turn.target][layer]
        with span(ATTENTION):
            out = self._attention(layer, q_RHND, k_RHND, v_RHND, step)
        with span(CACHE_UPDATE):
            self._keep(k_RHND, v_RHND, step)
        return out

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        return self.kernel.attend(q_RHND, k_RHND, v_RHND, step.reads)

    def _keep(self, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> None:
        """Write what later targets read; everything is made before a slot changes hands."""
        held, new, writes = step.pooled_held, step.pooled_new, []
        if held is not None:
            writes.append(held.pooled(*self.store.read(held.members)))
        if new is not None:
            writes.append(new.pooled(*(x.flatten(1, 2).index_select(1, new.members) for x in (k_RHND, v_RHND))))
        for slots, k, v in writes:
            self.store.write(slots, k, v)
        if step.kept is not None:
            self.kernel.keep(k_RHND, v_RHND, step.kept)


class _Steps:
    """Works out, from a cache's plan and layout, what every layer does at every target."""

    def __init__(self, cache: KVCache) -> None:
        self.plan, self.store, self.kernel, self.rows = cache.plan, cache.store, cache.kernel, cache.rows
        self.key_angles = cache.key_angles
        self.slots = {cell: slots_in(runs) for cell, runs in cache.layout.runs.items()}
        self.biases = [None, *(cells.log_bias for cells in self.plan.coarse)]
        self.dropped = len(self.plan.levels)  # the level of a cell that is not held at all
        # [target][layer][head][source]: the level at which a cell is read, and, after the last target, that of none
        self.levels = [self.plan.level_read(target).tolist() for target in range(len(self.plan.schedule))]
        self.levels.append(np.full(self.plan.last_read.shape, self.dropped).tolist())
        self._reductions: dict[tuple[int, int, int], Reduction] = {}

    def step(self, target: int, layer: int) -> LayerStep:
        tokens = self.plan.schedule.tokens[target]
        now, then = self.levels[target][layer], self.levels[target + 1][layer]
        # cells (head, source, level, coarser level) that fall to a coarser level; new tokens come at level 0
        falls = [
            (head, source, level, coarser)
            for head, levels in enumerate(then if self.plan.coarse else [])
            for source, (level, coarser) in enumerate(zip([*now[head], 0], levels, strict=False))
            if level < coarser < self.dropped
        ]
        new, held = [x for x in falls if x[1] == target], [x for x in falls if x[1] != target]
        new_members = [head * tokens + np.arange(tokens) for head, *_ in new]
        held_members = [self.slots[level, layer, head, source] for head, source, level, _ in held]
        on = self.store.device
        return LayerStep(
            self._reads(target, layer),
            self._kept(target, layer),
            Pooling(torch.from_numpy(np.concatenate(new_members)).to(on), *self._coarser(layer, new)) if new else None,
            Pooling(self.store.places(np.concatenate(held_members)), *self._coarser(layer, held)) if held else None,
        )

    def _reads(self, target: int, layer: int) -> Any:
        """What the kernel prepares of the slots that every head reads, and of what is added to their logits."""
        none = np.zeros(0, dtype=np.int64)
        slots_of_head, bias_of_head = [], []
        for head, levels in enumerate(self.levels[target][layer]):
            slots, biases = [none], [none.astype(np.float64)]
            for source, level in enumerate(levels):
                if level == self.dropped:
                    continue
                slots.append(self.slots[level, layer, head, source])
                bias = self.biases[level]
                biases.append(np.full(len(slots[-1]), 0.0 if bias is None else bias[layer, head, source]))
            slots_of_head.append(np.concatenate(slots))
            bias_of_head.append(np.concatenate(biases))
        shape = CallShape(
            self.rows, self.plan.schedule.tokens[target], self.plan.geometry.head_dim, self.store.dtype.itemsize
        )
        return self.kernel.prepare(slots_of_head, bias_of_head if self.plan.coarse else None, shape)

    def _kept(self, target: int, layer: int) -> Any:
        """What the kernel prepares for the heads that keep their new tokens whole."""
        heads = [head for head, levels in enumerate(self.levels[target + 1][layer]) if levels[target] == 0]
        slots = [self.slots[0, layer, head, target] for head in heads]
        return self.kernel.prepare_kept(heads, np.stack(slots)) if heads else None

    def _coarser(self, layer: int, cells: list[tuple[int, int, int, int]]) -> tuple[Reduction, Places]:
        """How cells (head, source, level, coarser level) are made coarser together, and the slots they then have."""
        reductions = [self._reduction(source, level, coarser) for _, source, level, coarser in cells]
        slots = [self.slots[coarser, layer, head, source] for head, source, _, coarser in cells]
        return Reduction.together(reductions), self.store.places(np.concatenate(slots), writing=True)

    def _reduction(self, source: int, level: int, coarser: int) -> Reduction:
        key = (source, level, coarser)
        if key not in self._reductions:
            names = [self.plan.levels[index][0] for index in (level, coarser)]
            angles = None if self.key_angles is None else self.key_angles[source]
            scale = self.plan.schedule.scales[source]
            self._reductions[key] = Reduction.of(scale, *names, self.store.device, angles)
        return self._reductions[key]


def tensors_in(prepared: Any) -> list[Tensor]:
    """All tensors in nested sequences and dataclasses."""
    tensors: list[Tensor] = []
    todo = [prepared]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, list | tuple):
            todo += item
        elif is_dataclass(item):
            todo += [getattr(item, field.name) for field in fields(item)]
    return tensors


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
