"""A static plan: which cell (layer, head, source scale) is read until which target scale.

Everything a cache does follows from one array, `last_read[l, h, s]` in s..T-1: the last target scale whose attention
in layer l reads the cell; s itself means that it is never cached. Arrays: L layers, H heads, T scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heatkv.errors import FormatError, HeatKVError, PlanError
from heatkv.files import check_header, read_json, write_json
from heatkv.geometry import CacheGeometry
from heatkv.schedule import ScaleSchedule

FORMAT, VERSION = "heatkv-plan", 1

IntArray = NDArray[np.int64]


def held_after(last_read_LHT: IntArray, tokens: tuple[int, ...]) -> IntArray:
    """Token-heads every layer holds once it has run target t, shape (L, T)."""
    layers, _, scales = last_read_LHT.shape
    held = np.zeros((layers, scales), dtype=np.int64)
    for target in range(scales):
        kept_LS = (last_read_LHT[:, :, : target + 1] > target).sum(axis=1)
        held[:, target] = kept_LS @ np.asarray(tokens[: target + 1], dtype=np.int64)
    return held


def live_token_heads(last_read_LHT: IntArray, tokens: tuple[int, ...]) -> IntArray:
    """live(t, l), shape (T, L): token-heads in the whole cache after layer l has run target scale t.

    Layers up to l already hold what target t+1 needs, the others still what t needs.
    """
    after_LT = held_after(last_read_LHT, tokens)
    before_LT = np.concatenate([np.zeros_like(after_LT[:, :1]), after_LT[:, :-1]], axis=1)
    done = after_LT.cumsum(axis=0)
    waiting = before_LT.sum(axis=0) - before_LT.cumsum(axis=0)
    return np.ascontiguousarray((done + waiting).T)


@dataclass(frozen=True, eq=False)
class Plan:
    """An immutable, validated static plan with what it was made for.

    Raises PlanError when `last_read` has the wrong shape or a value outside s..T-1, when a sink cell is not kept to
    the end, or when a checkpoint holds more than `budget_token_heads`.
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

    def __post_init__(self) -> None:
        layers, heads, scales = self.geometry.layers, self.geometry.heads, len(self.schedule)
        try:
            given = np.asarray(self.last_read)
        except ValueError as error:
            raise PlanError(f"last_read is no regular array: {str(error).splitlines()[0]}") from error
        if given.shape != (layers, heads, scales):
            raise PlanError(
                f"last_read has shape {given.shape}; {layers} layers, {heads} heads, {scales} scales need it"
            )
        if not np.issubdtype(given.dtype, np.integer):
            raise PlanError(f"last_read holds {given.dtype} values; it must hold whole numbers")
        array = given.astype(np.int64)
        array.setflags(write=False)
        object.__setattr__(self, "last_read", array)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        sources = np.arange(scales)
        wrong = np.argwhere((array < sources) | (array > scales - 1))
        if len(wrong):
            layer, head, source = (int(i) for i in wrong[0])
            raise PlanError(
                f"last_read[{layer}][{head}][{source}] is {array[layer, head, source]}; it must be from {source} "
                f"(never cached) to {scales - 1} (kept to the end)"
            )
        if not 0 <= self.sink_scales <= scales - 1:
            raise PlanError(f"sink_scales is {self.sink_scales}; {scales} scales allow 0 to {scales - 1}")
        if (array[:, :, : self.sink_scales] != scales - 1).any():
            raise PlanError(f"a cell of the first {self.sink_scales} scales, the sinks, is dropped before the end")
        if not 0 < self.budget <= 1:
            raise PlanError(f"budget is {self.budget}; it must be a share above 0 and at most 1")
        if not 0 <= self.budget_token_heads <= self.geometry.full_token_heads:
            raise PlanError(
                f"budget_token_heads is {self.budget_token_heads}; it must be from 0 to the full cache of "
                f"{self.geometry.full_token_heads}"
            )
        if self.budget_token_heads > self.budget * self.geometry.full_token_heads * (1 + 1e-9):
            raise PlanError(
                f"budget_token_heads is {self.budget_token_heads}, more than {self.budget:.6g} of the full cache of "
                f"{self.geometry.full_token_heads}"
            )
        if self.peak_token_heads > self.budget_token_heads:
            target, layer = self.peak_checkpoint
            raise PlanError(
                f"the plan holds {self.peak_token_heads} token-heads after layer {layer} of scale {target}; the budget "
                f"is {self.budget_token_heads}"
            )

    @property
    def schedule(self) -> ScaleSchedule:
        return self.geometry.schedule

    @cached_property
    def live(self) -> IntArray:
        """Token-heads held at every checkpoint, shape (T, L)."""
        live = live_token_heads(self.last_read, self.schedule.tokens)
        live.setflags(write=False)
        return live

    @cached_property
    def peak_token_heads(self) -> int:
        return int(self.live.max())

    @property
    def peak_checkpoint(self) -> tuple[int, int]:
        """(target scale, layer) of the first checkpoint that holds the peak."""
        target, layer = np.unravel_index(int(self.live.argmax()), self.live.shape)
        return int(target), int(layer)

    def reads(self, target: int) -> NDArray[np.bool_]:
        """Which cells of earlier scales target scale `target` reads, shape (L, H, target)."""
        return self.last_read[:, :, :target] >= target

    def had_no_effect(self) -> bool:
        """True when every cell that can be cached is kept to the end, as the full cache does."""
        return bool((self.last_read == len(self.schedule) - 1).all())

    def bytes(self, rows: int, storage: str) -> int:
        """Bytes the plan's peak takes with this many rows and this storage type."""
        return self.geometry.bytes(self.peak_token_heads, rows, storage)

    def check_geometry(self, geometry: CacheGeometry) -> None:
        """Raise PlanError unless the plan was made for a model of this geometry and schedule."""
        mine = self.geometry
        if (mine.layers, mine.heads) != (geometry.layers, geometry.heads):
            raise PlanError(
                f"the plan is for {mine.layers} layers x {mine.heads} heads, the model has {geometry.layers} x "
                f"{geometry.heads}; solve a plan for this model"
            )
        if mine.schedule != geometry.schedule:
            raise PlanError(
                f"the plan is for the schedule {mine.schedule}, the model runs {geometry.schedule}; solve a plan for it"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.policy, self.model, self.last_read.tobytes()))

    # ------------------------------------------------------------------ files

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "policy": self.policy,
            "settings": dict(self.settings),
            "model": self.model,
            "schedule": self.schedule.to_json(),
            "layers": self.geometry.layers,
            "heads": self.geometry.heads,
            "head_dim": self.geometry.head_dim,
            "sink_scales": self.sink_scales,
            "budget": self.budget,
            "budget_token_heads": self.budget_token_heads,
            "peak_token_heads": self.peak_token_heads,
        }
        for name in ("value", "value_bound", "gap"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        out["last_read"] = self.last_read.tolist()
        return out

    @classmethod
    def from_json(cls, value: Any, source: str | Path = "plan", head_dim: int | None = None) -> Plan:
        """Validate a parsed plan.json. Raises FormatError, PlanError or ScheduleError; `source` names it in messages.

        `head_dim` is the head size of a plan that does not state its own (it only matters for bytes).
        """
        data = check_header(value, source, FORMAT, VERSION)
        for name in ("coarse", "capacity"):
            if name in data:
                raise FormatError(f"{source} holds {name!r}, which this release cannot run")
        try:
            plan = cls(
                policy=_typed(data, "policy", str),
                settings=_typed(data, "settings", dict),
                model=_typed(data, "model", str),
                geometry=CacheGeometry(
                    layers=_typed(data, "layers", int),
                    heads=_typed(data, "heads", int),
                    head_dim=_typed({"head_dim": head_dim} | data, "head_dim", int),
                    schedule=ScaleSchedule.of(_typed(data, "schedule", list)),
                ),
                last_read=_integer_array(data.get("last_read"), "last_read"),
                sink_scales=_typed(data, "sink_scales", int),
                budget=_number(data, "budget"),
                budget_token_heads=_typed(data, "budget_token_heads", int),
                value=_optional_number(data, "value"),
                value_bound=_optional_number(data, "value_bound"),
                gap=_optional_number(data, "gap"),
            )
            told_peak = _typed(data, "peak_token_heads", int)
        except HeatKVError as error:
            raise type(error)(f"{source}: {error}") from error
        if told_peak != plan.peak_token_heads:
            raise PlanError(
                f"{source}: peak_token_heads says {told_peak}, last_read gives {plan.peak_token_heads}; the file was "
                "changed by hand"
            )
        return plan

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path, head_dim: int | None = None) -> Plan:
        """Read a plan.json, as `from_json` does."""
        return cls.from_json(read_json(path), path, head_dim)


def _typed(data: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = data.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{name!r} is {_short(value)}, not of the kind it must be")
    return value


def _number(data: Mapping[str, Any], name: str) -> float:
    value = _typed(data, name, (int, float))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FormatError(f"{name!r} is {_short(value)}; it must be a finite number")
    return number


def _optional_number(data: Mapping[str, Any], name: str) -> float | None:
    return None if data.get(name) is None else _number(data, name)


def _integer_array(value: Any, name: str) -> IntArray:
    """Nested lists of whole numbers to an array; floats, booleans and ragged lists are refused."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise FormatError(f"{name!r} is not a regular array of whole numbers: {error}") from error
    whole = array.ndim == 3 and array.dtype == np.int64
    # among whole numbers numpy takes a boolean for one
    if not whole or any(isinstance(cell, bool) for heads in value for cells in heads for cell in cells):
        raise FormatError(f"{name!r} must be [layers][heads][scales] whole numbers, not {_short(value)}")
    return array


def _short(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
