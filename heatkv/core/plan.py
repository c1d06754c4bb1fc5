"""A static plan: which cell (layer, head, source scale) is read until which target scale.

Everything a cache does follows from one array, `last_read[l, h, s]` in s..T-1: the last target scale whose attention
in layer l reads the cell; s itself means that it is never cached. A plan may also hold cells at coarser levels, each
with an array of its own: the last target that reads the cell at that level or a finer one. Arrays: L layers, H heads,
T scales.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import write_json
from heatkv.core.levels import FULL, LEVELS, level_tokens, log_counts
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import EqualByContents, FloatArray, IntArray, fixed, float_array, integer_array, number
from heatkv.core.storage_type import UNCODED_SCALES
from heatkv.errors import BudgetError, PlanError

FORMAT, VERSION = "heatkv-plan", 1

_MOST_BIAS = 1000.0
"""Far above every logit: temperatures are up to 100."""


def keep_first(shape_LHT: tuple[int, int, int], first: int) -> IntArray:
    """`last_read` of this shape that keeps the first scales, so many, to the end and caches nothing else: none of them
    are the empty cache, all T the full one."""
    last_read = np.arange(shape_LHT[2])
    last_read[:first] = shape_LHT[2] - 1
    return np.broadcast_to(last_read, shape_LHT).copy()


def held_for_targets(last_reads: Sequence[IntArray], tokens: Sequence[Sequence[int]]) -> IntArray:
    """Past tokens that every head holds for every target, (L, H, T), from the last_read and the tokens per scale of
    every level, fine to coarse."""
    layers, heads, scales = last_reads[0].shape
    # a cell's tokens at a level are held for the targets after the last that read a finer one, to the level's own last
    change = np.zeros((layers * heads, scales + 1), dtype=np.int64)
    pairs = np.arange(layers * heads)[:, None]
    before = np.broadcast_to(np.arange(scales), (layers * heads, scales))
    for last_read, sizes in zip(last_reads, tokens, strict=True):
        last = np.maximum(last_read.reshape(-1, scales), before)
        counts = np.broadcast_to(np.asarray(sizes, dtype=np.int64), last.shape)
        np.add.at(change, (pairs, before + 1), counts)
        np.subtract.at(change, (pairs, last + 1), counts)
        before = last
    return change[:, :-1].cumsum(axis=1).reshape(layers, heads, scales)


def live_of_held(held_LT: IntArray) -> IntArray:
    """live(t, l), (T, L), from the token-heads that every layer holds for every target: at a checkpoint the layers up
    to l already hold what target t+1 needs, the others still what t needs."""
    next_LT = np.concatenate([held_LT[:, 1:], np.zeros_like(held_LT[:, :1])], axis=1)
    waiting = held_LT.sum(axis=0) - held_LT.cumsum(axis=0)
    return np.ascontiguousarray((next_LT.cumsum(axis=0) + waiting).T)


class CachePlan(EqualByContents, ABC):
    """What every plan is: a promise how much a cache holds at any checkpoint, and what it was made for.

    `budget` is a share of the full cache, `budget_token_heads` the same in token-heads, rounded down. `weights` is the
    fingerprint of those that it was measured for, empty for a plan from shapes or published rankings. Plans are equal
    when all they hold is.
    """

    policy: str
    geometry: CacheGeometry
    budget: float
    budget_token_heads: int
    model: str
    settings: Mapping[str, Any]
    weights: str

    @property
    @abstractmethod
    def held(self) -> IntArray:
        """Past tokens that every head holds for every target, (L, H, T)."""

    @abstractmethod
    def had_no_effect(self) -> bool:
        """True when everything that can be cached is kept to the end, as the full cache does."""

    @property
    def schedule(self) -> ScaleSchedule:
        return self.geometry.schedule

    @cached_property
    def live(self) -> IntArray:
        """Token-heads held at every checkpoint, shape (T, L)."""
        return fixed(live_of_held(self.held.sum(axis=1)))

    @cached_property
    def peak_token_heads(self) -> int:
        return int(self.live.max())

    @property
    def peak_checkpoint(self) -> tuple[int, int]:
        """(target scale, layer) of the first checkpoint that holds the peak."""
        target, layer = np.unravel_index(int(self.live.argmax()), self.live.shape)
        return int(target), int(layer)

    @property
    def uncoded_scales(self) -> int:
        """The first scales that a coded arena holds in the compute type."""
        return 0

    @abstractmethod
    def bytes_of(self, token_heads: int, rows: int, storage: str) -> int:
        """The most bytes that the cache takes while it holds so many token-heads, as at a checkpoint of `live`."""

    def bytes(self, rows: int, storage: str) -> int:
        """Bytes the plan's peak takes with this many rows and this storage type."""
        return self.bytes_of(self.peak_token_heads, rows, storage)

    def budget_bytes(self, rows: int, storage: str) -> int:
        """Bytes that the budget allows."""
        return self.geometry.bytes(self.budget_token_heads, rows, storage, self.uncoded_scales)

    def check_budget(self) -> None:
        """Raise PlanError when a checkpoint holds more than the budget."""
        if self.peak_token_heads > self.budget_token_heads:
            target, layer = self.peak_checkpoint
            raise PlanError(
                f"the plan holds {self.peak_token_heads} token-heads after layer {layer} of scale {target}; the budget "
                f"is {self.budget_token_heads}"
            )

    @property
    def byte_limit(self) -> int | None:
        """The budget that was asked for, where that was one in bytes; it is of all rows."""
        try:
            budget = Budget.parse(str(self.settings.get("budget")))
        except BudgetError:  # a file may say anything
            return None
        return math.floor(budget.amount) if budget.kind == "bytes" else None

    def most_rows(self, storage: str) -> int | None:
        """How many rows a budget in bytes has room for in this storage type; None where any number keeps the budget."""
        return None if self.byte_limit is None else self.byte_limit // max(self.bytes(1, storage), 1)

    def check_bytes(self, rows: int, storage: str) -> None:
        """Raise PlanError when the plan takes more than its budget with so many rows in this storage type. A dynamic
        plan may carry numbers with every token, whose size does not depend on the type."""
        needed, limit = self.bytes(rows, storage), self.byte_limit
        allowed = self.budget_bytes(rows, storage) if limit is None else limit
        if needed > allowed:
            raise PlanError(
                f"with {rows} rows in {storage} the cache takes {needed} bytes, the budget of the plan is {allowed}; "
                f"solve it for {rows} rows in {storage}, or draw fewer images at once"
            )

    def check_geometry(self, geometry: CacheGeometry) -> None:
        """Raise PlanError unless the plan was made for a model of this geometry and schedule."""
        mine = self.geometry
        geometry.check_holds(
            mine.layers, mine.heads, mine.schedule, "solve a plan for this model: the plan is for", PlanError
        )

    @property
    def predicted_kl(self) -> float | None:
        """The KL that the policy predicted, in nats per token, when it did. Raises PlanError for another setting."""
        kl = self.settings.get("predicted_kl")
        return None if kl is None else number(kl, "predicted_kl in the plan's settings", PlanError, 0)

    def to_json(self) -> dict[str, Any]:
        """The plan as in a plan.json."""
        geometry = self.geometry
        return {
            "format": FORMAT, "version": VERSION,
            "policy": self.policy, "settings": dict(self.settings), "model": self.model,
            "schedule": self.schedule.to_json(),
            "layers": geometry.layers, "heads": geometry.heads, "head_dim": geometry.head_dim,
            "budget": self.budget, "budget_token_heads": self.budget_token_heads,
            "peak_token_heads": self.peak_token_heads, **({"weights": self.weights} if self.weights else {}),
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write a plan.json, whole or not at all. Raises FormatError."""
        write_json(path, self.to_json())

    def __hash__(self) -> int:
        return hash((self.policy, self.model, self.held.tobytes()))


@dataclass(frozen=True, eq=False)
class CoarseCells(EqualByContents):
    """Cells at one coarser level: `last_read` is the last target that reads the cell at this level or a finer one.

    `log_bias[l, h, s]` is added to the logits of the level's tokens, each of which stands for many.
    """

    level: str
    last_read: IntArray
    log_bias: FloatArray

    def __hash__(self) -> int:
        return hash((self.level, self.last_read.shape))

    def of_shape(self, shape: tuple[int, int, int]) -> CoarseCells:
        """The same in read-only arrays. Raises PlanError for arrays of another shape or type."""
        last_read = integer_array(self.last_read, shape, f"last_read of level {self.level}", PlanError)
        log_bias = float_array(self.log_bias, shape, f"log_bias of level {self.level}", PlanError)
        return CoarseCells(self.level, last_read, log_bias)

    @classmethod
    def uncalibrated(cls, level: str, last_read: IntArray, schedule: ScaleSchedule) -> CoarseCells:
        """With the log of the count as bias."""
        return cls(level, last_read, np.broadcast_to(log_counts(schedule, level), last_read.shape))


@dataclass(frozen=True, eq=False)
class Plan(CachePlan):
    """The plan of a static policy.

    `last_read` is (L, H, T), whole numbers; the first `sink_scales` scales are kept to the end in every head. `value`,
    `value_bound` and `gap` are what the plan is worth by the policy's measure, what no plan within the budget exceeds,
    and the distance of both as a share of the bound, where a solver certifies them. Raises PlanError for what no cache
    can follow, and for a checkpoint that holds more than the budget.
    """

    policy: str
    geometry: CacheGeometry
    last_read: IntArray
    budget: float
    budget_token_heads: int
    sink_scales: int
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None
    value_bound: float | None = None
    gap: float | None = None
    coarse: tuple[CoarseCells, ...] = ()
    weights: str = ""

    def __post_init__(self) -> None:
        shape = self.geometry.shape
        object.__setattr__(self, "last_read", integer_array(self.last_read, shape, "last_read", PlanError))
        object.__setattr__(self, "coarse", tuple(cells.of_shape(shape) for cells in self.coarse))
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        self._check()

    @property
    def levels(self) -> tuple[tuple[str, IntArray], ...]:
        """Every level with its last_read, fine to coarse; "full" is always the first."""
        return ((FULL, self.last_read), *((cells.level, cells.last_read) for cells in self.coarse))

    def level_read(self, target: int) -> IntArray:
        """At which level target scale `target` reads each cell of earlier scales, (L, H, target): an index into
        `levels`, or their number where the cell is not read at all."""
        reads = np.zeros_like(self.last_read[:, :, :target])
        for _, last_read in self.levels:
            reads += last_read[:, :, :target] < target
        return reads

    @cached_property
    def held(self) -> IntArray:
        arrays = [last_read for _, last_read in self.levels]
        return fixed(held_for_targets(arrays, [level_tokens(self.schedule, level) for level, _ in self.levels]))

    @property
    def uncoded_scales(self) -> int:
        return min(UNCODED_SCALES, self.sink_scales, len(self.schedule) - 1)

    def bytes_of(self, token_heads: int, rows: int, storage: str) -> int:
        return self.geometry.bytes(token_heads, rows, storage, self.uncoded_scales)

    def had_no_effect(self) -> bool:
        return bool((self.last_read == len(self.schedule) - 1).all())

    def _check(self) -> None:
        """Raise PlanError for a `last_read` outside s..T-1, a sink that is not kept to the end, coarse levels in
        another order or with impossible biases, and a checkpoint that holds more than the budget."""
        scales = len(self.schedule)
        if not 0 <= self.sink_scales <= scales - 1:
            raise PlanError(f"sink_scales is {self.sink_scales}; {scales} scales allow 0 to {scales - 1}")
        if (self.last_read[:, :, : self.sink_scales] != scales - 1).any():
            raise PlanError(f"a cell of the first {self.sink_scales} scales, the sinks, is dropped before the end")
        order = [cells.level for cells in self.coarse]
        if order != [level for level in LEVELS[1:] if level in order]:
            raise PlanError(f"the coarse levels are {order}; known, and in this order, are {list(LEVELS[1:])}")
        least: IntArray = np.broadcast_to(np.arange(scales), self.last_read.shape)
        for level, last_read in self.levels:
            wrong = np.argwhere((last_read < least) | (last_read > scales - 1))
            if len(wrong):
                cell = tuple(int(i) for i in wrong[0])
                raise PlanError(
                    f"last_read{list(cell)} of level {level} is {last_read[cell]}; it must be from {least[cell]} to "
                    f"{scales - 1}"
                )
            least = last_read
        for cells in self.coarse:
            if not (np.abs(cells.log_bias) <= _MOST_BIAS).all():
                raise PlanError(
                    f"log_bias of level {cells.level} must be numbers from -{_MOST_BIAS:g} to {_MOST_BIAS:g}"
                )
        self.check_budget()

    def to_json(self) -> dict[str, Any]:
        out = super().to_json() | {"sink_scales": self.sink_scales}
        out |= {name: x for name in ("value", "value_bound", "gap") if (x := getattr(self, name)) is not None}
        out["last_read"] = self.last_read.tolist()
        if self.coarse:
            out["coarse"] = [
                {"level": cells.level, "last_read": cells.last_read.tolist(), "log_bias": cells.log_bias.tolist()}
                for cells in self.coarse
            ]
        return out
