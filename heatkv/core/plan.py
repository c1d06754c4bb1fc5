"""A static plan: which cell (layer, head, source scale) is read until which target scale.

Everything a cache does follows from one array, `last_read[l, h, s]` in s..T-1: the last target scale whose attention
in layer l reads the cell; s itself means that it is never cached. A plan may also hold cells at coarser levels, each
with an array of its own: the last target that reads the cell at that level or a finer one. Arrays: L layers, H heads,
T scales.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heatkv.core.checks import as_number, number, of_kind, regular_array, shown, whole
from heatkv.core.contents import EqualByContents
from heatkv.core.geometry import UNCODED_SCALES, CacheGeometry
from heatkv.core.io import check_header, read_json, write_json
from heatkv.core.levels import FULL, LEVELS, level_tokens, log_counts
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import FormatError, HeatKVError, PlanError

FORMAT, VERSION = "heatkv-plan", 1

_MOST_BIAS = 1000.0
"""Far beyond every logit: temperatures are up to 100."""

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CoarseCells(EqualByContents):
    """Cells at one coarser level: `last_read` is the last target that reads the cell at this level or a finer one.

    `log_bias[l, h, s]` is added to the logits of the level's tokens, each of which stands for many.
    """

    level: str
    last_read: IntArray
    log_bias: FloatArray

    def __hash__(self) -> int:
        return hash((self.level, np.shape(self.last_read)))

    @classmethod
    def uncalibrated(cls, level: str, last_read: IntArray, schedule: ScaleSchedule) -> CoarseCells:
        """With the log of the count as bias."""
        if level not in LEVELS[1:]:
            raise PlanError(f"unknown coarse level {level!r}; known: {', '.join(LEVELS[1:])}")
        if np.shape(last_read)[-1:] != (len(schedule),):
            raise PlanError(
                f"last_read of level {level!r} has shape {np.shape(last_read)}; the schedule has {len(schedule)} scales"
            )
        bias = np.broadcast_to(log_counts(schedule, level), np.shape(last_read))
        return cls(level, last_read, bias)


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


def live_token_heads(last_read_LHT: IntArray, tokens: tuple[int, ...]) -> IntArray:
    """live(t, l), shape (T, L): token-heads in the whole cache after layer l has run target scale t."""
    return live_of_held(held_for_targets([last_read_LHT], [tokens]).sum(axis=1))


class CachePlan(ABC):
    """What every plan is: a promise how much a cache holds at any checkpoint, and what it was made for.

    Subclasses are frozen dataclasses that say what is held; `check_budget` belongs into their `__post_init__`.
    """

    policy: str
    geometry: CacheGeometry
    budget: float
    budget_token_heads: int
    model: str
    settings: Mapping[str, Any]

    @property
    @abstractmethod
    def held(self) -> IntArray:
        """Past tokens that every head holds for every target, (L, H, T)."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """As plan.json has it."""

    @abstractmethod
    def had_no_effect(self) -> bool:
        """True when everything that can be cached is kept to the end, as the full cache does."""

    @property
    def schedule(self) -> ScaleSchedule:
        return self.geometry.schedule

    @cached_property
    def live(self) -> IntArray:
        """Token-heads held at every checkpoint, shape (T, L)."""
        live = live_of_held(self.held.sum(axis=1))
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

    def bytes(self, rows: int, storage: str) -> int:
        """Bytes the plan's peak takes with this many rows and this storage type."""
        return self.bytes_of(self.peak_token_heads, rows, storage)

    @abstractmethod
    def bytes_of(self, token_heads: int, rows: int, storage: str) -> int:
        """The most bytes that the cache takes while it holds so many token-heads, as at a checkpoint of `live`."""

    @property
    def uncoded_scales(self) -> int:
        """The first scales that a coded arena holds in the compute type."""
        return 0

    def budget_bytes(self, rows: int, storage: str) -> int:
        """Bytes that the budget allows."""
        return self.geometry.bytes(self.budget_token_heads, rows, storage, self.uncoded_scales)

    def check_budget(self) -> None:
        """Raise PlanError when a checkpoint holds more than the budget, or the budget is none."""
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

    def check_bytes(self, rows: int, storage: str) -> None:
        """Raise PlanError when the plan takes more than its budget in this storage type: what is carried with tokens
        does not shrink with it."""
        needed, allowed = self.bytes(rows, storage), self.budget_bytes(rows, storage)
        if needed > allowed:
            raise PlanError(
                f"the plan was made for another type: with {rows} rows in {storage} it takes {needed} bytes, the "
                f"budget is {allowed}; solve it for {storage} (--dtype, --storage)"
            )

    @property
    def predicted_kl(self) -> float | None:
        """The KL that the policy foretold, in nats per token, when it did. Raises PlanError for what is none."""
        told = self.settings.get("predicted_kl")
        if told is None:
            return None
        found = as_number(told)
        if not 0 <= found < math.inf:
            raise PlanError(f"predicted_kl is {shown(told)} in the plan's settings; it must be a number of at least 0")
        return found

    def check_geometry(self, geometry: CacheGeometry) -> None:
        """Raise PlanError unless the plan was made for a model of this geometry and schedule."""
        of_kind(geometry, CacheGeometry, "geometry", PlanError, "give the CacheGeometry of a model: model.geometry")
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

    def _common_json(self) -> dict[str, Any]:
        """The fields that every plan.json has."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "policy": self.policy,
            "settings": dict(self.settings),
            "model": self.model,
            "schedule": self.schedule.to_json(),
            "layers": self.geometry.layers,
            "heads": self.geometry.heads,
            "head_dim": self.geometry.head_dim,
            "budget": self.budget,
            "budget_token_heads": self.budget_token_heads,
            "peak_token_heads": self.peak_token_heads,
        }

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_json())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CachePlan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.policy, self.model, self.held.tobytes()))


@dataclass(frozen=True, eq=False)
class Plan(CachePlan):
    """An immutable, validated static plan with what it was made for.

    `last_read` is (L, H, T), whole numbers; `budget` is a share of the full cache, `budget_token_heads` the same in
    token-heads. Plans are equal when all they hold is.
    Raises PlanError when `last_read` has the wrong shape or a value outside s..T-1, when a sink cell is not kept to
    the end, when a checkpoint holds more than `budget_token_heads`, or for what is of the wrong kind.
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

    def __post_init__(self) -> None:
        of_kind(
            self.geometry, CacheGeometry, "geometry", PlanError, "give the CacheGeometry of a model: model.geometry"
        )
        of_kind(self.settings, Mapping, "settings", PlanError, "give a dictionary of what decided the plan")
        for name in ("policy", "model"):
            of_kind(getattr(self, name), str, name, PlanError, "give its name as text")
        for name in ("sink_scales", "budget_token_heads"):
            object.__setattr__(self, name, whole(getattr(self, name), name, PlanError))
        object.__setattr__(self, "budget", number(self.budget, "budget", PlanError))
        for name in ("value", "value_bound", "gap"):
            if (told := getattr(self, name)) is not None:
                object.__setattr__(self, name, number(told, name, PlanError))
        scales = len(self.schedule)
        array = self._checked_last_read(self.last_read, "last_read")
        object.__setattr__(self, "last_read", array)
        object.__setattr__(self, "coarse", self._checked_coarse())
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        if not 0 <= self.sink_scales <= scales - 1:
            raise PlanError(f"sink_scales is {self.sink_scales}; {scales} scales allow 0 to {scales - 1}")
        if (array[:, :, : self.sink_scales] != scales - 1).any():
            raise PlanError(f"a cell of the first {self.sink_scales} scales, the sinks, is dropped before the end")
        self.check_budget()
        if self.value is not None and self.value_bound is not None:
            slack = 1e-9 * max(abs(self.value), abs(self.value_bound), 1e-300)
            if self.value > self.value_bound + slack:
                raise PlanError(f"the plan's value is {self.value}, more than its bound, {self.value_bound}")
        if self.gap is not None and self.gap < 0:
            raise PlanError(f"the plan's gap is {self.gap}; a plan cannot be better than its bound")

    def _checked_last_read(self, value: Any, name: str) -> IntArray:
        layers, heads, scales = self.geometry.layers, self.geometry.heads, len(self.schedule)
        try:
            given = np.asarray(value)
        except ValueError as error:
            raise PlanError(f"{name} is no regular array: {str(error).splitlines()[0]}") from error
        if given.shape != (layers, heads, scales):
            raise PlanError(f"{name} has shape {given.shape}; {layers} layers, {heads} heads, {scales} scales need it")
        if not np.issubdtype(given.dtype, np.integer):
            raise PlanError(f"{name} holds {given.dtype} values; it must hold whole numbers")
        array = given.astype(np.int64)
        array.setflags(write=False)
        wrong = np.argwhere((array < np.arange(scales)) | (array > scales - 1))
        if len(wrong):
            layer, head, source = (int(i) for i in wrong[0])
            raise PlanError(
                f"{name}[{layer}][{head}][{source}] is {array[layer, head, source]}; it must be from {source} "
                f"(never cached) to {scales - 1} (kept to the end)"
            )
        return array

    def _checked_coarse(self) -> tuple[CoarseCells, ...]:
        """The coarser levels with read-only arrays of their types."""
        way_out = "give a tuple of CoarseCells, fine to coarse"
        of_kind(self.coarse, Sequence, "coarse", PlanError, way_out)
        for cells in self.coarse:
            of_kind(cells, CoarseCells, "an entry of coarse", PlanError, way_out)
        checked: list[CoarseCells] = []
        finer, finer_name = self.last_read, "last_read"
        order = [cells.level for cells in self.coarse]
        if order != [level for level in LEVELS[1:] if level in order]:
            raise PlanError(f"the coarse levels are {order}; known, and in this order, are {list(LEVELS[1:])}")
        for cells in self.coarse:
            name = f"last_read of level {cells.level}"
            array = self._checked_last_read(cells.last_read, name)
            if (array < finer).any():
                layer, head, source = (int(i) for i in np.argwhere(array < finer)[0])
                raise PlanError(
                    f"{name}[{layer}][{head}][{source}] is {array[layer, head, source]}, less than that of "
                    f"{finer_name}, {finer[layer, head, source]}; it counts the finer levels too"
                )
            try:
                bias = np.array(cells.log_bias, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise PlanError(f"log_bias of level {cells.level} is no regular array of numbers") from error
            if bias.shape != array.shape or not (np.abs(bias) <= _MOST_BIAS).all():
                raise PlanError(
                    f"log_bias of level {cells.level} is of shape {bias.shape}; it must be finite numbers from "
                    f"-{_MOST_BIAS:g} to {_MOST_BIAS:g}, {array.shape}"
                )
            bias.setflags(write=False)
            checked.append(CoarseCells(cells.level, array, bias))
            finer, finer_name = array, f"level {cells.level}"
        return tuple(checked)

    @property
    def levels(self) -> tuple[tuple[str, IntArray], ...]:
        """Every level with its last_read, fine to coarse; "full" is always the first."""
        return ((FULL, self.last_read), *((cells.level, cells.last_read) for cells in self.coarse))

    def level_read(self, target: int) -> IntArray:
        """At which level target scale `target` reads each cell of earlier scales, (L, H, target): an index into
        `levels`, or their number where the cell is not read at all. Raises PlanError for a scale there is not."""
        target = self._checked_target(target)
        reads: IntArray = sum(
            ((last_read[:, :, :target] < target).astype(np.int64) for _, last_read in self.levels),
            start=np.zeros_like(self.last_read[:, :, :target]),
        )
        return reads

    @cached_property
    def held(self) -> IntArray:
        """Past tokens that every head holds for every target, (L, H, T)."""
        arrays = [last_read for _, last_read in self.levels]
        held = held_for_targets(arrays, [level_tokens(self.schedule, level) for level, _ in self.levels])
        held.setflags(write=False)
        return held

    def reads(self, target: int) -> NDArray[np.bool_]:
        """Which cells of earlier scales target scale `target` reads, at any level, shape (L, H, target).

        Raises PlanError for a scale there is not.
        """
        target = self._checked_target(target)
        return self.levels[-1][1][:, :, :target] >= target

    def _checked_target(self, target: int) -> int:
        return whole(target, "target", PlanError, 0, len(self.schedule) - 1)

    @property
    def uncoded_scales(self) -> int:
        """The sink scales that a coded arena holds in the compute type."""
        return min(UNCODED_SCALES, self.sink_scales, len(self.schedule) - 1)

    def bytes_of(self, token_heads: int, rows: int, storage: str) -> int:
        """The most bytes that the cache takes while it holds so many token-heads, sinks that are not coded first."""
        return self.geometry.bytes(token_heads, rows, storage, self.uncoded_scales)

    def had_no_effect(self) -> bool:
        """True when everything that can be cached is kept to the end, as the full cache does."""
        return bool((self.last_read == len(self.schedule) - 1).all())

    # ------------------------------------------------------------------ files

    def to_json(self) -> dict[str, Any]:
        """The plan as in a plan.json."""
        out = self._common_json()
        out["sink_scales"] = self.sink_scales
        for name in ("value", "value_bound", "gap"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        out["last_read"] = self.last_read.tolist()
        if self.coarse:
            out["coarse"] = [
                {"level": cells.level, "last_read": cells.last_read.tolist(), "log_bias": cells.log_bias.tolist()}
                for cells in self.coarse
            ]
        return out

    @classmethod
    def from_json(cls, value: Any, source: str | Path = "plan", head_dim: int | None = None) -> Plan:
        """Validate a parsed plan.json. Raises FormatError, PlanError or ScheduleError; `source` names it in messages.

        `head_dim` is the head size of a plan that does not state its own (it only matters for bytes).
        """
        data = check_header(value, source, FORMAT, VERSION)
        if "capacity" in data:
            raise FormatError(f"{source} holds 'capacity': it is of a dynamic policy, read it with load_plan")
        with named(source):
            plan = cls(
                **common_fields(data, head_dim),
                last_read=integer_array(data.get("last_read"), "last_read"),
                sink_scales=typed(data, "sink_scales", int),
                value=_optional_number(data, "value"),
                value_bound=_optional_number(data, "value_bound"),
                gap=_optional_number(data, "gap"),
                coarse=tuple(
                    _coarse_cells(entry, ScaleSchedule.of(data["schedule"]))
                    for entry in typed({"coarse": []} | data, "coarse", list)
                ),
            )
            check_peak(data, plan, "last_read")
        return plan

    @classmethod
    def load(cls, path: str | Path, head_dim: int | None = None) -> Plan:
        """Read a plan.json, as `from_json` does. Raises FormatError, PlanError or ScheduleError."""
        return cls.from_json(read_json(path), path, head_dim)


@contextmanager
def named(source: str | Path) -> Iterator[None]:
    """Errors inside the block begin with the file's name."""
    try:
        yield
    except HeatKVError as error:
        raise type(error)(f"{source}: {error}") from error


def common_fields(data: Mapping[str, Any], head_dim: int | None) -> dict[str, Any]:
    """What every plan is made with, from a parsed plan.json; `head_dim` is for files that do not state it."""
    return {
        "policy": typed(data, "policy", str),
        "settings": typed(data, "settings", dict),
        "model": typed(data, "model", str),
        "geometry": CacheGeometry(
            layers=typed(data, "layers", int),
            heads=typed(data, "heads", int),
            head_dim=typed({"head_dim": head_dim, **data}, "head_dim", int),
            schedule=ScaleSchedule.of(typed(data, "schedule", list)),
        ),
        "budget": _number(data, "budget"),
        "budget_token_heads": typed(data, "budget_token_heads", int),
    }


def check_peak(data: Mapping[str, Any], plan: CachePlan, name: str) -> None:
    """Raise PlanError when the file states another peak than its array `name` has."""
    room = math.floor(plan.budget * plan.geometry.full_token_heads * (1 + 1e-9))
    if room - plan.budget_token_heads > 1:
        raise PlanError(
            f"budget_token_heads says {plan.budget_token_heads}, a budget of {plan.budget} gives {room}; the file was "
            "changed by hand"
        )
    told = typed(data, "peak_token_heads", int)
    if told != plan.peak_token_heads:
        raise PlanError(
            f"peak_token_heads says {told}, {name} gives {plan.peak_token_heads}; the file was changed by hand"
        )


def typed(data: Mapping[str, Any], name: str, kind: Any) -> Any:
    """The field of this name. Raises FormatError when it is missing or of another type."""
    value = data.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise FormatError(f"{name!r} is {_short(value)}, not of the kind it must be")
    if isinstance(value, str) and not value.isprintable():  # half of a pair of surrogates cannot be printed at all
        raise FormatError(f"{name!r} is {_short(value)}, which cannot be printed")
    return value


def _coarse_cells(entry: Any, schedule: ScaleSchedule) -> CoarseCells:
    """One entry of "coarse"; without "log_bias" the log of the count is the bias."""
    if not isinstance(entry, dict):
        raise FormatError(f"an entry of 'coarse' is {_short(entry)}, not an object")
    level, last_read = typed(entry, "level", str), integer_array(entry.get("last_read"), "last_read of coarse")
    if last_read.shape[2] != len(schedule):
        raise PlanError(f"last_read of level {level!r} has {last_read.shape[2]} scales, the schedule {len(schedule)}")
    if entry.get("log_bias") is None:
        return CoarseCells.uncalibrated(level, last_read, schedule)
    return CoarseCells(level, last_read, _float_array(typed(entry, "log_bias", list), "log_bias"))


def _number(data: Mapping[str, Any], name: str) -> float:
    value = typed(data, name, (int, float))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FormatError(f"{name!r} is {_short(value)}; it must be a finite number")
    return number


def _optional_number(data: Mapping[str, Any], name: str) -> float | None:
    return None if data.get(name) is None else _number(data, name)


def integer_array(value: Any, name: str) -> IntArray:
    """Nested lists of whole numbers to an array; floats, booleans and ragged lists are refused."""
    array = regular_array(value, 3)
    if array is None:
        raise FormatError(f"{name!r} must be [layers][heads][scales] whole numbers, not {_short(value)}")
    return array


def _float_array(value: Any, name: str) -> FloatArray:
    """Nested lists of numbers to an array; texts, booleans and ragged lists are refused."""
    array = regular_array(value, 3, floats=True)
    if array is None:
        raise FormatError(f"{name!r} must be [layers][heads][scales] numbers, not {_short(value)}")
    return array


def _short(value: Any) -> str:
    return "missing" if value is None else shown(value)
