"""`heatkv.attach` and `heatkv.measure`: HeatKV under a model from another repository, without importing that."""

from __future__ import annotations

from typing import Any, get_args

from heatkv.attachment.attached import Attached, Kind, Measurement
from heatkv.attachment.discover import FoundModel, find
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import LEVELS, SINK_SCALES
from heatkv.core.plan import CachePlan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray, float_array, shown, whole
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import StorageType
from heatkv.engine.open_cache import check_cache
from heatkv.errors import BudgetError, ModelError, PlanError, PolicyError, ScheduleError, StatisticsError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.windows import Full


def attach(
    model: Any,
    keep: str | CachePlan,
    budget: str | float | Budget | None = None,
    *,
    statistics: Statistics | None = None,
    schedule: ScaleSchedule | None = None,
    guided: bool = True,
    rows: int | None = None,
    seed: int = 0,
    code: str | None = None,
    attention: str = "auto",
    **options: Any,
) -> Attached:
    """A context manager that puts HeatKV under the self-attention of `model` and restores it at the end.

    `keep` is a finished plan, or the name of a policy with its `budget`, `statistics`, `seed` and `options` (such as
    sink_scales), as in `model.plan`. `schedule` is needed where the model does not tell it: VAR does, in `patch_nums`
    or `lvl_1L`; Infinity needs it unless the plan or the statistics bring it. `guided` says that rows are doubled,
    conditional half first. `rows` (default: those of one image) only matters for a budget in bytes. `code` is "int8"
    or "fp8" for a cache of 8-bit codes, and `attention` names the kernel, as in `heatkv.generate`.

    Raises ModelError for a model that is not recognised, PlanError, StatisticsError, PolicyError, BudgetError or
    ScheduleError for what does not fit it.
    """
    found = find(model)
    if isinstance(keep, str):
        if budget is None:
            raise BudgetError(f"policy {keep!r} needs a budget; write it as 10%, 0.1, 600MiB, 2GB or 650tokens")
        geometry = _geometry(found, schedule, statistics)
        if statistics is not None:
            statistics.check_fingerprint(found.fingerprint())
        storage, image = str(StorageType.for_dtype(found.weight.dtype, code)), 2 if guided else 1
        problem = PlanningProblem(
            geometry, Budget.parse(budget), statistics, seed=seed, rows=rows or image, storage=storage, model=found.name
        )
        plan = make_policy(keep, **options).plan(problem)
    elif isinstance(keep, CachePlan):
        if budget is not None or statistics is not None or options:
            raise PolicyError("budget, statistics and options go with the name of a policy, not with a finished plan")
        plan, geometry = keep, _geometry(found, schedule, keep)
        plan.check_geometry(geometry)
        if plan.geometry.head_dim != geometry.head_dim:
            raise PlanError(
                f"the plan is for a head size of {keep.geometry.head_dim}, the model's is {geometry.head_dim}"
            )
    else:
        raise PolicyError(f"{shown(keep)} is neither the name of a policy nor a plan; load one with heatkv.load_plan")
    check_cache(plan, found.weight.dtype, found.weight.device, code, attention)
    return Attached(found, plan, guided, code, attention)


def measure(
    model: Any,
    kind: Kind = "mass",
    *,
    log_bias: FloatArray | None = None,
    sink_scales: int = SINK_SCALES,
    schedule: ScaleSchedule | None = None,
    guided: bool = True,
    seed: int = 0,
    first_sample: int = 0,
) -> Measurement:
    """A context manager under which `model` draws with the full cache, and is measured as `heatkv.calibrate` does.

    `kind` is "mass" for `statistics()`; "biases" for `log_bias()`; or "levels" for `level_statistics()`, costs under
    that `log_bias` of plans with `sink_scales` or more. `schedule` and `guided` are as in `attach`; `seed` and
    `first_sample` name the samples. Raises ModelError, StatisticsError, PolicyError or ScheduleError.
    """
    if kind not in get_args(Kind):
        raise PolicyError(f"cannot measure {shown(kind)}; known: {', '.join(get_args(Kind))}")
    if (kind == "levels") != (log_bias is not None):
        raise PolicyError("kind 'levels' and log_bias go together; kind 'biases' gives log_bias()")
    found = find(model)
    if kind == "levels" and not found.gated:
        raise ModelError(f"the blocks of {found.name} have no ada_lin or ada_gss, which level costs need")
    geometry = _geometry(found, schedule, None)
    if log_bias is not None:
        shape = (geometry.layers, geometry.heads, len(geometry.schedule), len(LEVELS))
        log_bias = float_array(log_bias, shape, "log_bias", StatisticsError)
    plan = Full().plan(PlanningProblem(geometry, Budget.parse("100%"), model=found.name))
    numbering = whole(seed, "seed", ModelError), whole(first_sample, "first_sample", ModelError)
    sinks = sink_scales if kind == "levels" else 0  # biases are of all scales
    return Measurement(found, plan, guided, kind, log_bias, sinks, numbering)


def _geometry(found: FoundModel, schedule: ScaleSchedule | None, other: CachePlan | Statistics | None) -> CacheGeometry:
    """The model's geometry, with the schedule that was given, or that the model, or a plan or statistics, bring."""
    known = schedule or found.schedule or (None if other is None else other.schedule)
    if known is None:
        raise ScheduleError(
            f"{found.name} does not tell its schedule; pass schedule=, for instance ScaleSchedule.var(256) or "
            'ScaleSchedule.infinity("1M", 1.0)'
        )
    return found.geometry(known)
