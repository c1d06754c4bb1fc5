"""plan.json, as `docs/formats.md` has it: reading plans of static and dynamic policies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct

from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import check_header, in_file, read_json
from heatkv.core.levels import log_counts
from heatkv.core.plan import FORMAT, VERSION, CachePlan, CoarseCells, Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import convert
from heatkv.errors import FormatError, PlanError


class _PlanFile(Struct, kw_only=True):
    policy: str
    settings: dict[str, Any]
    model: str
    schedule: list[list[int]]
    layers: int
    heads: int
    head_dim: int
    budget: Annotated[float, Meta(gt=0, le=1)]
    budget_token_heads: Annotated[int, Meta(ge=0, le=2**56)]
    peak_token_heads: int
    weights: str = ""

    def common(self) -> dict[str, Any]:
        """What plans of both kinds are made with."""
        return {
            "policy": self.policy,
            "settings": self.settings,
            "model": self.model,
            "geometry": CacheGeometry(self.layers, self.heads, self.head_dim, ScaleSchedule.of(self.schedule)),
            "budget": self.budget,
            "budget_token_heads": self.budget_token_heads,
            "weights": self.weights,
        }

    def check(self, plan: CachePlan) -> None:
        """Raise PlanError for another budget or peak than the file states."""
        room = self.budget * plan.geometry.full_token_heads
        if not math.isclose(self.budget_token_heads, room, abs_tol=1):
            raise PlanError(
                f"budget_token_heads says {self.budget_token_heads}, a budget of {self.budget} gives {math.floor(room)}"
                "; the file was changed by hand"
            )
        if self.peak_token_heads != plan.peak_token_heads:
            raise PlanError(
                f"peak_token_heads says {self.peak_token_heads}, the plan holds {plan.peak_token_heads}; the file was "
                "changed by hand"
            )


class _Coarse(Struct):
    level: Literal["pool2", "mean"]
    last_read: list[list[list[int]]]
    log_bias: list[list[list[float]]] | None = None

    def cells(self, geometry: CacheGeometry) -> CoarseCells:
        bias: Any = self.log_bias
        if bias is None:
            bias = np.broadcast_to(log_counts(geometry.schedule, self.level), geometry.shape)
        return CoarseCells(self.level, self.last_read, bias)  # type: ignore[arg-type]


class _StaticFile(_PlanFile, kw_only=True):
    sink_scales: int
    last_read: list[list[list[int]]]
    value: float | None = None
    value_bound: float | None = None
    gap: Annotated[float, Meta(ge=0)] | None = None
    coarse: list[_Coarse] = []

    def plan(self) -> Plan:
        common = self.common()
        return Plan(
            **common, last_read=self.last_read, sink_scales=self.sink_scales, value=self.value,  # type: ignore[arg-type]
            value_bound=self.value_bound, gap=self.gap,
            coarse=tuple(cells.cells(common["geometry"]) for cells in self.coarse),
        )  # fmt: skip


class _CapacityFile(_PlanFile, kw_only=True):
    capacity: list[list[list[int]]]
    shared: bool
    carried: int

    def plan(self) -> CapacityPlan:
        return CapacityPlan(
            **self.common(), capacity=self.capacity, shared=self.shared, carried=self.carried  # type: ignore[arg-type]
        )  # fmt: skip


def load_plan(path: str | Path, head_dim: int | None = None) -> CachePlan:
    """Read a plan.json, of a static or a dynamic policy. Raises FormatError, PlanError or ScheduleError.

    `head_dim` is the head size of a plan that does not state its own (it only matters for bytes).
    """
    return plan_from_json(read_json(path), path, head_dim)


def plan_from_json(value: Any, source: str | Path = "plan", head_dim: int | None = None) -> CachePlan:
    """Read a parsed plan.json of a static or a dynamic policy; `source` names it in messages.

    Raises what `load_plan` raises.
    """
    data = check_header(value, source, FORMAT, VERSION)
    if head_dim is not None:
        data = {"head_dim": head_dim} | data
    if "last_read" in data and "capacity" in data:
        raise FormatError(f"{source} holds both 'last_read' and 'capacity'; a plan is of a static or a dynamic policy")
    kind: type[_StaticFile | _CapacityFile] = _CapacityFile if "capacity" in data else _StaticFile
    file = convert(data, kind, source)
    with in_file(source):
        plan = file.plan()
        file.check(plan)
    return plan
