"""The arena cache: one buffer for all layers, as large as the plan's peak, behind the one verb `attend`.

Cells that a plan holds at a coarser level are made from the finer one when its last reader is done, within the budget.
Shapes: R rows, H heads, N tokens of the running scale, D head size, P arena slots, I members of a pooled token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.core.levels import level_tokens
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.schema import of_kind, shown, whole
from heatkv.engine.attention.grouping import CallShape
from heatkv.engine.attention.kernels import choose_kernel
from heatkv.engine.attention.pooling import Reduction
from heatkv.engine.layout import ArenaLayout, Run
from heatkv.engine.spans import ATTENTION, CACHE_UPDATE, span
from heatkv.engine.store import Places, Store, known_device
from heatkv.engine.watch import Watch
from heatkv.errors import PlanError

IntArray = NDArray[np.int64]

COMPUTE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types that keys and values can be held in as they are."""


@dataclass(frozen=True)
class Pooling:
    """Tokens of a coarser level to write at `slots`: made of held ones, or of new ones by their place in (H * N)."""

    members: Places | Tensor
    reduction: Reduction
    slots: Places


@dataclass(frozen=True)
class LayerStep:
    """What one layer does at one target scale: whom it reads, and what it keeps where.

    `reads` and `kept` are what the attention kernel prepared, the second for heads that keep their new tokens whole,
    None where no head does; `pooled_new` are made from new tokens, `pooled_held` from held ones.
    """

    reads: Any
    kept: Any
    pooled_new: Pooling | None
    pooled_held: Pooling | None


class ArenaCache(ABC):
    """What every cache is: one arena for all layers, and the order in which a model calls it.

    A model calls `attend(layer, q, k, v)`, layer by layer and scale by scale; the cache counts the scales itself.
    Slots are read only after they were written for the running images, so neither a pad nor a leftover can be seen.
    Raises PlanError when it is called in another order, with another shape than the plan's, or in several dtypes.
    """

    def __init__(
        self,
        plan: CachePlan,
        slots: int,
        uncoded_slots: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        storage: str | None,
    ) -> None:
        of_kind(dtype, torch.dtype, "dtype", PlanError, "give a type of torch, such as torch.float32")
        if dtype not in COMPUTE_TYPES:
            known = ", ".join(str(kind) for kind in COMPUTE_TYPES)
            raise PlanError(f"dtype {dtype} cannot hold keys and values; known: {known}; for 8 bits, give storage")
        self.geometry = plan.geometry
        self.rows = whole(rows, "rows", PlanError, 1)
        self.store = Store(
            self.rows, slots, plan.geometry.head_dim, dtype, known_device(device), storage, uncoded_slots
        )
        self.watch = Watch(plan.geometry, self.rows, dtype, self.store.device)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the real storage of all that is held, with the scales of coded tokens."""
        return storage_bytes(self.held)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that hold what is cached."""
        return self.store.buffers

    @property
    def tables(self) -> list[Tensor]:
        """The tensors that say what is read and written where."""
        return tensors_in(self._prepared())

    @property
    def attention(self) -> str:
        """The name of the attention kernel that runs."""
        return "ragged"

    @property
    def index_bytes(self) -> int:
        """Bytes of the tables, the same for any number of rows."""
        return storage_bytes(self.tables)

    @property
    def workspace_bytes(self) -> int:
        """Bytes that attention keeps beside the arena to work in."""
        return 0

    @property
    def current_bytes(self) -> int:
        """Bytes of the keys and values of the running scale of one layer, where that is largest: they come from the
        model, and are not cached, but are there beside the arena."""
        geometry = self.geometry
        tokens = max(geometry.schedule.tokens)
        return 2 * self.rows * geometry.heads * tokens * geometry.head_dim * self.store.dtype.itemsize

    @abstractmethod
    def _prepared(self) -> Any:
        """All that was prepared for the plan: nested sequences and dataclasses of tensors."""

    def reset(self) -> None:
        """Start the next images; nothing that is held needs clearing."""
        self._target, self._next_layer = 0, 0
        self.watch.clear()

    def check(self, images: int | None = None) -> None:
        """Call this when images are done; it waits for the device.

        Raises NumericsError when a query, key or value was not finite, and names the first one; with `images`, the
        number of them, its row is told as one of theirs.
        """
        found = self.watch.first(images)
        if found is not None:
            raise found[1]

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
            if not x.dtype.is_floating_point:
                raise PlanError(f"{name} is of {x.dtype}; attention is over floating-point numbers")
            if x.dtype != v_RHND.dtype:
                raise PlanError(f"{name} is of {x.dtype}, v of {v_RHND.dtype}; give q, k and v in one type")
            if x.shape != expected:
                raise PlanError(
                    f"{name} of layer {layer}, scale {self._target} is {tuple(x.shape)}; the plan needs (rows, heads, "
                    f"tokens, head_dim) = {expected}"
                )
        self.watch.see(self._target, layer, q_RHND, k_RHND, v_RHND)
        out = self._run(layer, q_RHND, k_RHND, v_RHND)
        self._advance()
        return out

    def _advance(self) -> None:
        """Go on to the call that is due next."""
        self._next_layer += 1
        if self._next_layer == self.geometry.layers:
            self._target, self._next_layer = self._target + 1, 0

    @abstractmethod
    def _run(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """What `attend` gives, after which the cache holds what the next target reads."""


class KVCache(ArenaCache):
    """Keys and values that a static plan keeps, for `rows` rows of images drawn together.

    Dropping is free: a slot whose last reader is done is overwritten by its next owner. `key_angles` are, for models
    that rotate keys, the angles of every token, (N, D/2) per scale; a plan with coarse cells needs them to pool.
    `storage` is "int8" or "fp8" for 8-bit codes, sinks excepted, and None for the compute type; `attention` names the
    kernel, "ragged", "triton", or "auto" for the one that suits the device. Raises PlanError for what cannot run here.
    """

    def __init__(
        self,
        plan: Plan,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        key_angles: Sequence[Tensor] | None = None,
        storage: str | None = None,
        attention: str = "auto",
    ) -> None:
        of_kind(plan, Plan, "plan", PlanError, "make one with model.plan, or load one with Plan.load")
        if key_angles is not None and (not isinstance(key_angles, Sequence) or len(key_angles) != len(plan.schedule)):
            raise PlanError(f"key_angles is {shown(key_angles)}; give one tensor (N, D/2) per scale, or none")
        self.plan = plan
        self.key_angles = key_angles
        self.layout = ArenaLayout.of(plan, storage is not None)
        slots, uncoded = self.layout.slots, self.layout.uncoded_slots
        super().__init__(plan, slots, uncoded, rows, dtype, device, storage)
        self.kernel = choose_kernel(attention, self.store)
        self._steps = self._prepare()
        self.reset()

    def _prepare(self) -> list[list[LayerStep]]:
        plan, device = self.plan, self.store.device
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

        def pooling(parts: Sequence[tuple[IntArray, Reduction, IntArray]], held: bool) -> Pooling | None:
            if not parts:
                return None
            members, made, places = zip(*parts, strict=True)
            sources = np.concatenate(members)
            return Pooling(
                self.store.places(sources) if held else torch.from_numpy(sources).to(device),
                Reduction.together(made),
                self.store.places(np.concatenate(places), writing=True),
            )

        steps = []
        for target, tokens in enumerate(plan.schedule.tokens):
            row = []
            shape = CallShape(self.rows, tokens, plan.geometry.head_dim, self.store.dtype.itemsize)
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
                        self.kernel.prepare(
                            [np.concatenate([none, *(slots(layer, h, s, i) for s, i in held[h])]) for h in heads],
                            [self._bias(layer, h, held[h]) for h in heads] if plan.coarse else None,
                            shape,
                        ),
                        self.kernel.prepare_kept(kept, np.stack([slots(layer, h, target, 0) for h in kept]))
                        if kept
                        else None,
                        pooling(new, held=False),
                        pooling(old, held=True),
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
        with span(ATTENTION):
            out = self._attention(layer, q_RHND, k_RHND, v_RHND, step)
        with span(CACHE_UPDATE):
            self._keep(k_RHND, v_RHND, step)
        return out

    def _keep(self, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> None:
        """Write what later targets read; everything is made before a slot changes hands."""
        writes: list[tuple[Places, Tensor, Tensor]] = []
        if step.pooled_held is not None:
            made, members = step.pooled_held.reduction, step.pooled_held.members
            assert isinstance(members, Places)
            k_RID, v_RID = self.store.read(members)
            writes.append((step.pooled_held.slots, made.keys(k_RID), made.values(v_RID)))
        if step.pooled_new is not None:
            made, members = step.pooled_new.reduction, step.pooled_new.members
            assert isinstance(members, Tensor)
            k_RID, v_RID = (x.flatten(1, 2).index_select(1, members) for x in (k_RHND, v_RHND))
            writes.append((step.pooled_new.slots, made.keys(k_RID), made.values(v_RID)))
        for slots, k, v in writes:
            self.store.write(slots, k, v)
        if step.kept is not None:
            self.kernel.keep(k_RHND, v_RHND, step.kept)

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        return self.kernel.attend(q_RHND, k_RHND, v_RHND, step.reads)

    def _prepared(self) -> Any:
        return self._steps

    @property
    def attention(self) -> str:
        return self.kernel.name

    @property
    def workspace_bytes(self) -> int:
        return self.kernel.workspace_bytes


def _slots(runs: tuple[Run, ...]) -> IntArray:
    """The slots of a cell in token order."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(first, first + size) for first, size in runs)])


def tensors_in(prepared: Any) -> list[Tensor]:
    """All tensors in nested sequences and dataclasses."""
    found: list[Tensor] = []
    todo = [prepared]
    while todo:
        one = todo.pop()
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            todo += one
        elif is_dataclass(one):
            todo += [getattr(one, field.name) for field in fields(one)]
    return found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
