"""From options to what a command works with: a model and its settings, statistics and rankings, policies, plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from heatkv.calibration.run import check_statistics
from heatkv.cli.options import MeasuredSource, Planning, Ranking, Running, Source, settings_of
from heatkv.cli.output import say
from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import in_file, read_bytes
from heatkv.core.plan import CachePlan
from heatkv.core.plan_file import load_plan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import shown, suggest
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import CODES, DTYPES, StorageType
from heatkv.engine.open_cache import policy_of
from heatkv.errors import FormatError, HeatKVError, ModelError, PlanError, PolicyError, ScheduleError
from heatkv.models.catalogue import MODELS, ModelInfo, load_model, model_info
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import Settings
from heatkv.models.text_conditional import TextConditionalModel
from heatkv.parallel.ranks import current
from heatkv.policies.base import EvictionPolicy, PlanningProblem, StaticPolicy, make_policy
from heatkv.policies.options import options_of
from heatkv.registry import find_policy

_MOST_PROMPT_BYTES = 64 << 20


@dataclass(frozen=True)
class Opened:
    """A model, the settings that it draws with, the storage type of its cache, and what `load_model` was called with,
    in JSON's types."""

    model: ClassConditionalModel | TextConditionalModel
    settings: Settings
    storage: StorageType
    loading: dict[str, Any]


def open_model(source: Source, running: Running, texts: Sequence[str] = ()) -> Opened:
    """The named model; one that draws prompts is measured with those of a file, and has these texts or those of the
    file encoded before its weights are read."""
    storage, measured = parse_dtype(running.dtype), isinstance(source, MeasuredSource)
    prompts = list(texts)
    if isinstance(source, MeasuredSource) and source.prompts is not None:
        prompts = _prompts(source.prompts)
    if measured and not prompts and model_info(source.model).family == "infinity":
        raise ModelError(f"measuring {source.model} needs prompts to draw; name a file of them (--prompts)")
    size, ratio = parse_size(source.size)
    arguments: dict[str, Any] = {
        "name": source.model, **_weights(source.weights or []), "prompts": prompts, "size": size, "ratio": ratio,
        "dtype": storage.compute, "device": current().device(running.device),
    }  # fmt: skip
    model = load_model(**arguments)
    say_template(source.model, ratio)
    settings = model.sampling if running.cfg is None else replace(model.sampling, cfg=running.cfg)
    return Opened(model, settings, storage, arguments)


def parse_dtype(text: str) -> StorageType:
    """The compute type, and the code of the cache before a slash where there is one."""
    code, slash, compute = text.rpartition("/")
    if compute not in DTYPES:
        raise ModelError(f"unknown dtype {shown(compute)}{suggest(compute, DTYPES)}")
    if slash and code not in CODES:
        raise ModelError(f"unknown code {shown(code)} in {shown(text)}{suggest(code, CODES)}")
    return StorageType(compute, code or None)


def parse_size(text: str | None) -> tuple[str | None, float | None]:
    """The size and the height/width of `1M`, `1M,3:2`, `3:2` or `1.5`."""
    size, comma, ratio = (text or "").partition(",")
    if not comma and not size.endswith("M"):
        size, ratio = "", size
    if not (comma or ratio):
        return size or None, None
    try:
        height, colon, width = ratio.partition(":")
        return size or None, float(height) / (float(width) if colon else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise ScheduleError(f"cannot read {shown(ratio)} of --size; write 1M, or height/width as 1.5 or 3:2") from error


def say_template(model: str, wanted: float | None) -> None:
    """Say which published height/width is drawn when it is not the one asked for; theirs are cut to 3 decimals."""
    if wanted is None or model_info(model).family != "infinity":
        return
    taken = ScaleSchedule.infinity_template(wanted)
    if abs(taken - wanted) > 0.0015:
        say(f"no published schedule has height/width {wanted:.4g}; taking the nearest, {taken:.4g}")


def is_guided(info: ModelInfo, cfg: float | None) -> bool:
    """Whether guidance of that strength takes a second cache row per image. Raises HeatKVError for a bad one."""
    if cfg is not None and not 0 <= cfg <= 100:
        raise HeatKVError(f"cfg is {cfg}; guidance is from 0 to 100")
    return cfg is None or cfg != (1.0 if info.family == "infinity" else 0.0)


def _weights(texts: Sequence[str]) -> dict[str, str]:
    """The arguments of `load_model` for weights; what begins with neither vae= nor text= is the transformer's path."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        argument = {"vae": "vae", "text": "text_encoder"}.get(name, "weights") if equals else "weights"
        if argument in found:
            raise HeatKVError(f"--weights {shown(text)}: {argument.replace('_', ' ')} is named twice")
        found[argument] = text if argument == "weights" else path
    return found


def _prompts(path: Path) -> list[str]:
    """The lines of a text file, empty ones left out."""
    try:
        lines = read_bytes(path, _MOST_PROMPT_BYTES, "prompts").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is no UTF-8 text, one prompt a line") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise FormatError(f"{path} holds no prompt; write one a line")
    return found


# ------------------------------------------------------------------------------------ what policies plan from


def open_rankings(
    path: Path | None, geometry: CacheGeometry, model: str, policies: Sequence[EvictionPolicy]
) -> HeadRankings | None:
    """Published rankings from a file, when they fit this geometry and the sinks of the policies; says when they may be
    of another schedule."""
    if path is None:
        return None
    sinks = {policy.sink_scales for policy in policies if isinstance(policy, StaticPolicy)}
    rankings = HeadRankings.load_orders(path, geometry, sinks)
    own = model_info(model).schedule()
    if geometry.schedule != own:
        say(
            f"{path}: published rankings are those of {model}'s own schedule, {own}; they are taken for "
            f"{geometry.schedule}, scale by scale from the last cached one backwards"
        )
    return rankings


def open_statistics(path: Path, opened: Opened) -> Statistics:
    """Statistics from a file, when they are of this very model, and of the guidance that it runs with."""
    statistics = Statistics.load(path)
    with in_file(path):
        check_statistics(statistics, opened.model, opened.settings)
    return statistics


def statistics_of_model(path: Path, model: str) -> Statistics:
    """Statistics from a file, for a model that is only named; one whose weights are at hand must be that very one."""
    statistics = Statistics.load(path)
    if model in MODELS and MODELS[model].bundled:
        statistics.check_fingerprint(load_model(model).fingerprint)
    return statistics


def make_policies(names: Sequence[str], ranking: Ranking) -> list[EvictionPolicy]:
    """The policies of these names; an option that is set goes to those that have it."""
    known = {name: options_of(find_policy(name)) for name in names}
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, text in settings_of(ranking.set or [], "--set").items():
        having = [name for name in names if option in known[name]]
        if not having:
            every = list(dict.fromkeys(other for name in names for other in known[name]))
            raise PolicyError(f"{', '.join(names)}: no option {shown(option)}{suggest(option, every)}")
        for name in having:
            options[name][option] = known[name][option].parse(text, name)
    return [make_policy(name, **options[name]) for name in names]


# ------------------------------------------------------------------------------------------------------ plans


def make_plan(
    planning: Planning,
    default: str,
    geometry: CacheGeometry,
    model: str,
    load: Callable[[Path], Statistics],
    *,
    seed: int,
    rows: int,
    storage: StorageType,
) -> CachePlan:
    """The finished plan that is named, or that of the policy, `default` where none is named."""
    if planning.plan is not None:
        return open_plan(planning.plan, geometry, model, [rows], storage)
    name = planning.policy or default
    (policy,) = make_policies([name], planning)
    budget = planning.budget or ("100%" if name == "full" else None)
    if budget is None:
        raise HeatKVError(f"policy {name!r} needs --budget, written 10%, 0.1, 600MiB, 2GB or 650tokens")
    amount = Budget.parse(budget)
    statistics = None if planning.statistics is None else load(planning.statistics)
    rankings = open_rankings(planning.orders, geometry, model, [policy])
    return policy.plan(PlanningProblem(geometry, amount, statistics, rankings, seed, rows, str(storage), model))


def open_plan(
    path: Path, geometry: CacheGeometry, model: str, rows: Iterable[int], storage: StorageType
) -> CachePlan:  # fmt: skip
    """A finished plan, when it is of this geometry and of no other model that has a name here, and keeps its budget
    with these rows.

    Attached models have names of their own, those of their classes.
    """
    plan = load_plan(path, geometry.head_dim)
    with in_file(path):
        plan.check_geometry(geometry)
        if plan.geometry.head_dim != geometry.head_dim:
            raise PlanError(
                f"the plan is for heads of size {plan.geometry.head_dim}, those of {model} have {geometry.head_dim}; "
                "solve it again"
            )
        if isinstance(plan, CapacityPlan):
            policy_of(plan)
        if plan.model != model and plan.model in MODELS:
            raise PlanError(f"the plan was made for {plan.model}, not for {model}; name that model or solve again")
        for count in rows:
            plan.check_bytes(count, str(storage))
    return plan
