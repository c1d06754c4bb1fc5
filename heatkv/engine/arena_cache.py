"""The arena cache: one buffer for all layers, as large as the plan's peak, behind the one verb `attend`.

Cells that a plan holds at a coarser level are made from the finer one when its last reader is done, within the budget.
Shapes: R rows, H heads, N tokens of the running scale, D head size, I members of a pooled token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from operator import mul
from typing import Any, Protocol

import torch
from torch import Tensor

from heatkv.core.plan import CachePlan, Plan
from heatkv.core.schema import shown, whole
from heatkv.core.storage_type import STORAGE_BYTES
from heatkv.engine.attention.kernels import choose_kernel
from heatkv.engine.layout import ArenaLayout
from heatkv.engine.spans import ATTENTION, CACHE_UPDATE, span
from heatkv.engine.steps import LayerStep, PlanSteps
from heatkv.engine.store import Store, check_code
from heatkv.engine.turns import Rows, Turn
from heatkv.engine.watch import Watch
from heatkv.errors import PlanError


class Attend(Protocol):
    """What a model's blocks call: attention of this scale's queries over whatever is still held.

    q, k, v are (rows, heads, tokens, head size); q already carries the softmax scale. `attend` returns q's shape.
    """

    def attend(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor: ...

    def see_input(self, layer: int, attention_input_RNW: Tensor) -> None:
        """What the layer's queries, keys and values are made from, before it calls `attend`."""
        del layer, attention_input_RNW


class ArenaCache(Attend, ABC):
    """What every cache is: one arena for all layers, and the order in which a model calls it.

    A model calls `attend(layer, q, k, v)`, layer by layer and scale by scale; the cache counts the scales itself.
    Slots are read only after they were written for the running images, so neither a pad nor a leftover can be seen.
    """

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
        rows_at_once: Sequence[int] | None,
    ) -> None:
        if not isinstance(dtype, torch.dtype) or str(dtype).removeprefix("torch.") not in STORAGE_BYTES:
            raise PlanError(f"dtype {shown(dtype)} cannot hold keys and values; use torch.float32 or torch.bfloat16")
        device = torch.device(device)
        check_code(code, device)
        self.geometry = plan.geometry
        self.rows = whole(rows, "rows", PlanError, 1)
        self.rows_at_once = rows_at_once or [self.rows] * len(plan.schedule)
        self.turn = Turn(plan.geometry, self.rows)
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
        tokens: int = max(map(mul, self.rows_at_once, geometry.schedule.tokens))
        return 2 * geometry.heads * tokens * geometry.head_dim * self.store.dtype.itemsize

    def reset(self) -> None:
        """Start the next images; nothing that is held needs clearing."""
        self.turn.restart()
        self.store.serve(Rows(1, 0, self.rows))
        self.watch.clear()

    def serve(self, rows: Rows) -> None:
        """Expect calls of these rows until others are named: those of a scale may come through all layers a few
        images at a time, and are read from and written to the arena where they would be otherwise."""
        self.turn.serve(len(rows))
        self.store.serve(rows)

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
        self.watch.see(self.turn.target, layer, q_RHND, k_RHND, v_RHND, self.store.rows)
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
    kernel, "ragged", "triton", or "auto" for the one that suits the device; `rows_at_once`, per scale, how many rows
    `serve` will name at most. Raises PlanError for what cannot run here.
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
        rows_at_once: Sequence[int] | None = None,
    ) -> None:
        self.plan, self.key_angles = plan, key_angles
        self.layout = ArenaLayout.for_plan(plan, code is not None)
        super().__init__(
            plan, self.layout.slots, self.layout.uncoded_slots, rows, dtype, device, code, attention, rows_at_once
        )
        steps = PlanSteps(plan, self.layout, self.store, self.kernel, self.rows_at_once, key_angles)
        targets, layers = range(len(plan.schedule)), range(self.geometry.layers)
        self._steps: list[list[LayerStep]] = [[steps.step(target, layer) for layer in layers] for target in targets]
        self.reset()

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


def tensors_in(prepared: Any) -> list[Tensor]:
    """All tensors in nested sequences and dataclasses."""
    if isinstance(prepared, Tensor):
        return [prepared]
    if is_dataclass(prepared):
        prepared = [getattr(prepared, field.name) for field in fields(prepared)]
    return [x for part in prepared for x in tensors_in(part)] if isinstance(prepared, list | tuple) else []


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
