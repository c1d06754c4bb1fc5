"""A plan for R devices that share the heads of one model (tensor parallel): who has which heads, and a plan for each.

Every rank runs its plan in an arena of its own, under its own part of the budget, as if its heads were a whole model.
Arrays: R ranks, L layers, H heads of the model, T scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import check_header, read_json, write_json
from heatkv.core.levels import LEVELS
from heatkv.core.plan import RANKED_FORMAT, CachePlan, CoarseCells, IntArray, Plan, integer_array, named, typed
from heatkv.core.plan_file import plan_from_json
from heatkv.core.schema import EqualByContents, number, of_kind, shown, whole
from heatkv.errors import FormatError, HeatKVError, PlanError
from heatkv.head_assignment import contiguous_heads

VERSION = 1


@dataclass(frozen=True, eq=False)
class RankedPlan(EqualByContents):
    """One plan per rank, and the heads it is of: `heads[r, l]`, (R, L, H / R), in the rank's own order.

    `budget_token_heads` is that of the whole cache, floor(b*N*L*H). `unsplit_value` is what the policy's plan for one
    device is worth, `unsplit_bound` what no plan for one device exceeds, and so none for any split, where a solver
    tells. Raises PlanError when a head of a layer is nobody's or somebody's twice, or the plans are not of one policy,
    model, geometry and budget.
    """

    heads: IntArray
    plans: tuple[CachePlan, ...]
    budget_token_heads: int
    unsplit_value: float | None = None
    unsplit_bound: float | None = None

    def __post_init__(self) -> None:
        of_kind(self.plans, Sequence, "plans", PlanError, "give one plan per rank")
        object.__setattr__(self, "plans", tuple(self.plans))
        for plan in self.plans:
            of_kind(plan, CachePlan, "an entry of plans", PlanError, "give one plan per rank")
        if not self.plans:
            raise PlanError("a plan for ranks holds no plan; give one per rank")
        self._check_alike()
        object.__setattr__(self, "heads", self._checked_heads())
        most = sum(plan.budget_token_heads for plan in self.plans)
        told = whole(self.budget_token_heads, "budget_token_heads", PlanError, most, most + self.ranks - 1)
        object.__setattr__(self, "budget_token_heads", told)
        for name in ("unsplit_value", "unsplit_bound"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number(getattr(self, name), name, PlanError))
        for name, value in (("value", self.value), ("unsplit_value", self.unsplit_value)):
            bound = self.unsplit_bound
            if value is not None and bound is not None and value > bound + 1e-9 * max(abs(value), abs(bound)):
                raise PlanError(f"{name} is {value}, more than {bound}, the bound of the whole cache")

    def _check_alike(self) -> None:
        first = self.plans[0]
        for rank, plan in enumerate(self.plans):
            pairs: list[tuple[str, object, object]] = [
                (name, getattr(plan, name), getattr(first, name)) for name in ("policy", "model", "budget", "geometry")
            ]
            pairs += [
                (name, getattr(plan, name, None), getattr(first, name, None))
                for name in ("budget_token_heads", "sink_scales", "shared", "carried")
            ]
            for name, mine, others in [("kind", type(plan).__name__, type(first).__name__), *pairs]:
                if mine != others:
                    raise PlanError(f"{name} of rank {rank} is {shown(mine)}, that of rank 0 {shown(others)}")

    def _checked_heads(self) -> IntArray:
        geometry = self.geometry
        try:
            given = np.asarray(self.heads)
        except ValueError:
            raise PlanError("heads is no regular array") from None
        expected = (self.ranks, geometry.layers, geometry.heads // self.ranks)
        if given.shape != expected or not np.issubdtype(given.dtype, np.integer):
            raise PlanError(f"heads is {given.dtype} of shape {given.shape}; it must be whole numbers, {expected}")
        heads = given.astype(np.int64)
        heads.setflags(write=False)
        of_layers = np.sort(heads.transpose(1, 0, 2).reshape(geometry.layers, -1), axis=1)
        wrong = np.flatnonzero((of_layers != np.arange(of_layers.shape[1])).any(axis=1))
        if len(wrong):
            raise PlanError(
                f"heads of layer {wrong[0]} are {shown(of_layers[wrong[0]].tolist())} over all ranks; every one of "
                f"{of_layers.shape[1]} must be there once"
            )
        return heads

    def __hash__(self) -> int:
        return hash((self.plans, self.heads.tobytes()))

    @property
    def ranks(self) -> int:
        return len(self.plans)

    @property
    def policy(self) -> str:
        return self.plans[0].policy

    @property
    def model(self) -> str:
        return self.plans[0].model

    @property
    def budget(self) -> float:
        """The share of the full cache, the same on every rank."""
        return self.plans[0].budget

    @cached_property
    def geometry(self) -> CacheGeometry:
        """That of the whole model."""
        of_rank = self.plans[0].geometry
        return of_rank.of_heads(of_rank.heads * self.ranks)

    @property
    def contiguous(self) -> bool:
        """Whether rank r has the r-th part of every layer's heads, as weights that were split elsewhere have them."""
        return np.array_equal(self.heads, contiguous_heads(self.geometry.layers, self.geometry.heads, self.ranks))

    def check_geometry(self, geometry: CacheGeometry) -> None:
        """Raise PlanError unless it was made for a whole model of this geometry and schedule."""
        of_kind(geometry, CacheGeometry, "geometry", PlanError, "give the CacheGeometry of a model: model.geometry")
        if geometry.heads != self.geometry.heads:
            raise PlanError(
                f"the plan is for {self.geometry.heads} heads over {self.ranks} ranks, the model has {geometry.heads}; "
                "solve a plan for this model"
            )
        self.plans[0].check_geometry(geometry.of_heads(geometry.heads // self.ranks))

    # ------------------------------------------------------------------ what it is worth

    @property
    def value(self) -> float | None:
        """Sum of what the ranks' plans are worth; None where the policy does not tell."""
        return self._sum("value")

    @property
    def value_bound(self) -> float | None:
        """What no plans are worth under this split."""
        return self._sum("value_bound")

    @property
    def gap(self) -> float | None:
        """Share of the bound (of the cost, where values are costs) that better plans could gain under this split."""
        return _gap(self.value, self.value_bound)

    @property
    def any_split_gap(self) -> float | None:
        """The same over every split: against the bound of one device with the whole budget."""
        return _gap(self.value, self.unsplit_bound)

    def _sum(self, name: str) -> float | None:
        values = [getattr(plan, name, None) for plan in self.plans]
        told = [value for value in values if value is not None]
        return math.fsum(told) if len(told) == len(values) else None

    # ------------------------------------------------------------------ one device

    def whole(self) -> CachePlan:
        """The plan of one device that holds and reads what all ranks do, under the whole budget.

        Raises PlanError where there is none: where the heads of a layer share their places, which each rank then does
        among its own, or where scores depend on settings that the ranks have for themselves.
        """
        first, settings = self.plans[0], self._settings()
        fields: dict[str, Any] = {
            "policy": first.policy,
            "geometry": self.geometry,
            "budget": first.budget,
            "budget_token_heads": self.budget_token_heads,
            "model": first.model,
            "settings": settings,
        }
        static = [plan for plan in self.plans if isinstance(plan, Plan)]
        if static:
            return Plan(
                **fields,
                last_read=self._gather([plan.last_read for plan in static]),
                sink_scales=static[0].sink_scales,
                value=self.value,
                value_bound=self.unsplit_bound,
                gap=self.any_split_gap,
                coarse=self._coarse(static),
            )
        dynamic = [plan for plan in self.plans if isinstance(plan, CapacityPlan)]
        way_out = f"run it on {self.ranks} ranks (torchrun --nproc-per-node {self.ranks} -m heatkv generate)"
        if dynamic[0].shared:
            raise PlanError(
                f"under policy {self.policy!r} the heads of a layer share their places, on each of the {self.ranks} "
                f"ranks for themselves, which one process cannot do; {way_out}"
            )
        apart = [name for name in settings if any(p.settings.get(name) != first.settings[name] for p in dynamic)]
        if apart:
            raise PlanError(f"under policy {self.policy!r} every rank has its own {' and '.join(apart)}; {way_out}")
        capacity = self._gather([plan.capacity for plan in dynamic])
        return CapacityPlan(**fields, capacity=capacity, carried=dynamic[0].carried)

    def _gather(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Arrays of the ranks, (L, H / R, ...), as one of the whole model, (L, H, ...)."""
        out = np.empty((self.geometry.layers, self.geometry.heads, *parts[0].shape[2:]), dtype=parts[0].dtype)
        for heads_LH, part in zip(self.heads, parts, strict=True):
            out[np.arange(len(heads_LH))[:, None], heads_LH] = part
        return out

    def _coarse(self, plans: Sequence[Plan]) -> tuple[CoarseCells, ...]:
        """The coarser levels that some rank has; another holds nothing at such a level."""
        found, last_reads = [], [plan.last_read for plan in plans]
        for level in LEVELS[1:]:
            of_ranks = [next((cells for cells in plan.coarse if cells.level == level), None) for plan in plans]
            if all(cells is None for cells in of_ranks):
                continue
            pairs = list(zip(of_ranks, last_reads, strict=True))
            last_reads = [finer if cells is None else cells.last_read for cells, finer in pairs]
            biases = [np.zeros(finer.shape) if cells is None else cells.log_bias for cells, finer in pairs]
            found.append(CoarseCells(level, self._gather(last_reads), self._gather(biases)))
        return tuple(found)

    def _settings(self) -> dict[str, Any]:
        """Those of all ranks: what is the same, sums of what adds up, and lists of the rest."""
        out: dict[str, Any] = {}
        for name in self.plans[0].settings:
            told = [plan.settings.get(name) for plan in self.plans]
            if name == "budget":
                out[name] = _times(told[0], self.ranks)
            elif name == "predicted_kl":
                out[name] = math.fsum(plan.predicted_kl or 0.0 for plan in self.plans)
            else:
                out[name] = told[0] if all(value == told[0] for value in told) else told
        return out

    # ------------------------------------------------------------------ files

    def to_json(self) -> dict[str, Any]:
        """The plan as in a file of `heatkv solve --ranks`."""
        out: dict[str, Any] = {
            "format": RANKED_FORMAT,
            "version": VERSION,
            "ranks": self.ranks,
            "budget_token_heads": self.budget_token_heads,
        }
        for name in ("unsplit_value", "unsplit_bound"):
            if getattr(self, name) is not None:
                out[name] = getattr(self, name)
        return out | {"heads": self.heads.tolist(), "plans": [plan.to_json() for plan in self.plans]}

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises FormatError."""
        write_json(path, self.to_json())

    @classmethod
    def from_json(cls, value: Any, source: str | Path = "plan", head_dim: int | None = None) -> RankedPlan:
        """Validate a parsed file. Raises FormatError, PlanError or ScheduleError; `source` names it in messages."""
        data = check_header(value, source, RANKED_FORMAT, VERSION)
        with named(source):
            ranks, plans = typed(data, "ranks", int), typed(data, "plans", list)
            if ranks != len(plans):
                raise FormatError(f"'ranks' is {ranks}, but 'plans' has {len(plans)} entries")
            return cls(
                integer_array(data.get("heads"), "heads"),
                tuple(plan_from_json(plan, f"plan of rank {rank}", head_dim) for rank, plan in enumerate(plans)),
                typed(data, "budget_token_heads", int),
                _optional(data, "unsplit_value"),
                _optional(data, "unsplit_bound"),
            )

    @classmethod
    def load(cls, path: str | Path, head_dim: int | None = None) -> RankedPlan:
        """Read a file, as `from_json` does. Raises FormatError, PlanError or ScheduleError."""
        return cls.from_json(read_json(path), path, head_dim)


def load_either(path: str | Path, head_dim: int | None = None) -> CachePlan | RankedPlan:
    """Read a plan of one device or of several. Raises FormatError, PlanError or ScheduleError."""
    value = read_json(path)
    if isinstance(value, dict) and value.get("format") == RANKED_FORMAT:
        return RankedPlan.from_json(value, path, head_dim)
    return plan_from_json(value, path, head_dim)


def _gap(value: float | None, bound: float | None) -> float | None:
    """(bound - value) as a share of the bound, or of the cost where a value is minus a cost."""
    if value is None or bound is None:
        return None
    of = bound if bound > 0 else -value
    return max(0.0, bound - value) / of if of > 0 else 0.0


def _times(budget: Any, ranks: int) -> Any:
    """The budget that was asked for over all ranks, as it is written; bytes were divided among them."""
    try:
        read = Budget.parse(budget)
    except HeatKVError:
        return budget
    return str(Budget("bytes", read.amount * ranks)) if read.kind == "bytes" else budget


def _optional(data: Mapping[str, Any], name: str) -> float | None:
    return None if data.get(name) is None else float(typed(data, name, (int, float)))
