"""plan.json: reading plans of static and dynamic policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.io import check_header, read_json
from heatkv.core.plan import (
    FORMAT,
    RANKED_FORMAT,
    VERSION,
    CachePlan,
    Plan,
    check_peak,
    common_fields,
    integer_array,
    named,
    typed,
)
from heatkv.errors import FormatError


def load_plan(path: str | Path, head_dim: int | None = None) -> CachePlan:
    """Read a plan.json, of a static or a dynamic policy. Raises FormatError, PlanError or ScheduleError.

    `head_dim` is the head size of a plan that does not state its own (it only matters for bytes).
    """
    return plan_from_json(read_json(path), path, head_dim)


def plan_from_json(value: Any, source: str | Path = "plan", head_dim: int | None = None) -> CachePlan:
    """Validate a parsed plan.json of a static or a dynamic policy; `source` names it in messages.

    Raises what `load_plan` raises.
    """
    if isinstance(value, dict) and value.get("format") == RANKED_FORMAT:
        raise FormatError(f"{source} holds a plan for each of several ranks; read it with RankedPlan.load")
    data = check_header(value, source, FORMAT, VERSION)
    if "capacity" not in data:
        return Plan.from_json(value, source, head_dim)
    if "last_read" in data:
        raise FormatError(f"{source} holds both 'last_read' and 'capacity'; a plan is of a static or a dynamic policy")
    with named(source):
        plan = CapacityPlan(
            **common_fields(data, head_dim),
            capacity=integer_array(data["capacity"], "capacity"),
            shared=typed(data, "shared", bool),
            carried=typed(data, "carried", int),
        )
        check_peak(data, plan, "capacity")
    return plan
