"""From options to what a command works with: a model and its settings, statistics and rankings, policies, plans."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from heatkv.cli.options import Ranking, Running, Source
from heatkv.cli.output import say
from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import in_file, read_bytes
from heatkv.core.plan import CachePlan
from heatkv.core.plan_file import load_plan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import seed_of, shown
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import CODES, DTYPES, StorageType
from heatkv.engine.open_cache import policy_of
from heatkv.engine.watch import run_deterministically
from heatkv.errors import BudgetError, FormatError, HeatKVError, ModelError, PlanError, ScheduleError, StatisticsError
from heatkv.models.base import ImageModel
from heatkv.models.catalogue import MODELS, ModelInfo, load_model, model_info
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import Settings
from heatkv.models.text_conditional import TextConditionalModel
from heatkv.parallel.ranks import current

MOST = 1_000_000
"""Of whatever is counted on the command line."""

_MOST_PROMPT_BYTES = 64 << 20

Loaded = ClassConditionalModel | TextConditionalModel


def positive(**values: int) -> None:
    """Refuse the first of these options that is below one, or above what anybody waits for."""
    for name, value in values.items():
        if not 1 <= value <= MOST:
            raise HeatKVError(f"--{name.replace('_', '-')} is {value}; it must be at least 1 and at most {MOST}")


def parse_names(text: str, what: str) -> list[str]:
    """Names separated by commas, each once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise HeatKVError(f"no {what} was named")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise HeatKVError(f"{what} {shown(twice[0])} is named twice")
    return names


def parse_ratio(text: str | None) -> float | None:
    """Height/width as a number or h:w."""
    if text is None:
        return None
    try:
        height, colon, width = text.partition(":")
        return float(height) / (float(width) if colon else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise ScheduleError(f"cannot read the height/width ratio {shown(text)}; write it as 1.5 or 3:2") from error


def say_template(model: str, ratio: str | None) -> None:
    """Say which published height/width is drawn when it is not the one asked for; theirs are cut to 3 decimals."""
    wanted = parse_ratio(ratio)
    if wanted is None or model_info(model).family != "infinity":
        return
    taken = ScaleSchedule.infinity_template(wanted)
    if abs(taken - wanted) > 0.0015:
        say(f"no published schedule has height/width {wanted:.4g}; taking the nearest, {taken:.4g}")


def known_dtype(dtype: str) -> str:
    """The name of a type, when it is known."""
    if dtype not in DTYPES:
        near = difflib.get_close_matches(dtype, DTYPES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ModelError(f"unknown dtype {dtype!r}{hint} Known: {', '.join(DTYPES)}")
    return dtype


def check_device(name: str) -> None:
    """Refuse what is no name of a device, where only that matters."""
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"unknown device {name!r}; write cpu, cuda, cuda:1 or mps") from error


def load_arguments(source: Source, running: Running) -> dict[str, Any]:
    """What `load_model` is called with, in JSON's types: the name, weights, prompts of a file, type and device."""
    return {
        "name": source.model,
        "weights": None if source.weights is None else str(source.weights),
        "vae": None if source.vae is None else str(source.vae),
        "text_encoder": source.text_encoder,
        "prompts": [] if source.prompts is None else _prompts(source.prompts),
        "size": source.size,
        "ratio": parse_ratio(source.ratio),
        "dtype": known_dtype(running.dtype),
        "device": current().device(running.device),
    }


def open_model(source: Source, running: Running, measuring: bool = True) -> tuple[Loaded, Settings]:
    """The named model, with the prompts of a file for measurements, and the settings that it draws with."""
    if measuring and source.prompts is None and model_info(source.model).family == "infinity":
        raise ModelError(f"measuring {source.model} needs prompts to draw; name a file of them (--prompts)")
    seed_of(running.seed, HeatKVError)
    if running.deterministic:
        run_deterministically()
    model = load_model(**load_arguments(source, running))
    say_template(source.model, source.ratio)
    return model, model.sampling if running.cfg is None else replace(model.sampling, cfg=running.cfg)


def is_guided(info: ModelInfo, cfg: float | None) -> bool:
    """Whether guidance of that strength takes a second cache row per image. Raises HeatKVError for a bad one."""
    if cfg is not None and not 0 <= cfg <= 100:
        raise HeatKVError(f"cfg is {cfg}; guidance is from 0 to 100")
    return cfg is None or cfg != (1.0 if info.family == "infinity" else 0.0)


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


def open_rankings(path: Path | None, geometry: CacheGeometry, model: str) -> HeadRankings | None:
    """Published rankings from a file, when they fit this geometry; says when they may be of another schedule."""
    if path is None:
        return None
    rankings = HeadRankings.load_orders(path, geometry)
    own = model_info(model).schedule()
    if geometry.schedule != own:
        say(
            f"{path} does not tell its schedule; published rankings are of a model's own, of {model} {own}. They are "
            f"taken for {geometry.schedule}, scale by scale from the last cached one backwards; heatkv calibrate "
            "measures this one"
        )
    return rankings


def open_statistics(path: Path | None, model: ImageModel[Any], settings: Settings | None = None) -> Statistics | None:
    """Statistics from a file, when they are of this very model, and of the guidance that it is to run with."""
    if path is None:
        return None
    statistics = Statistics.load(path)
    statistics.check_geometry(model.geometry)
    statistics.check_fingerprint(model.fingerprint)
    measured = statistics.provenance.cfg
    wanted = None if settings is None else settings.to_json()["cfg"]
    if measured is not None and wanted is not None and measured != wanted:
        raise StatisticsError(
            f"{path} was measured at cfg {measured:g}, this run has {wanted}; calibrate at that, or set --cfg"
        )
    return statistics


def statistics_of_model(path: Path, model: str) -> Statistics:
    """Statistics from a file, for a model that is only named; one whose weights are at hand must be that very one."""
    statistics = Statistics.load(path)
    if model in MODELS and MODELS[model].bundled:
        statistics.check_fingerprint(load_model(model).fingerprint)
    return statistics


def storage_of(model: ImageModel[Any], coding: str | None = None) -> str:
    """How the model's cache is stored: in the type that it computes in, or coded. Raises BudgetError."""
    return storage_name(str(model.compute_dtype).removeprefix("torch."), coding)


def storage_name(dtype: str, coding: str | None) -> str:
    """The name of a storage type. Raises BudgetError for an unknown coding."""
    if coding is not None and coding not in CODES:
        raise BudgetError(f"unknown storage {coding!r}; known: {', '.join(CODES)}; leave it out for {dtype}")
    return str(StorageType(dtype, coding))


def open_plan(path: Path, geometry: CacheGeometry, model: str) -> CachePlan:
    """A finished plan, when it is of this geometry and of no other model that has a name here.

    Attached models have names of their own, those of their classes.
    """
    plan = load_plan(path, geometry.head_dim)
    with in_file(path):
        plan.check_geometry(geometry)
    if plan.geometry.head_dim != geometry.head_dim:
        raise PlanError(
            f"{path}: the plan is for heads of size {plan.geometry.head_dim}, those of {model} have "
            f"{geometry.head_dim}; solve it again"
        )
    if isinstance(plan, CapacityPlan):
        policy_of(plan)
    if plan.model != model and plan.model in MODELS:
        raise PlanError(f"{path} was made for {plan.model}, not for {model}; name that model (--model) or solve again")
    return plan


def say_bytes(plan: CachePlan, name: str, rows: int, storage: str) -> None:
    """Say that a budget in bytes was meant for other rows or another type, where it does not hold here."""
    asked = plan.settings.get("budget")
    try:
        budget = Budget.parse(asked) if isinstance(asked, str) else None
    except HeatKVError:
        return
    if budget is not None and budget.kind == "bytes" and plan.bytes(rows, storage) > budget.amount:
        say(
            f"{name} was made for {float(budget.amount) / 2**20:.2f} MiB with other rows or another type; with {rows} "
            f"rows in {storage} its cache takes {plan.bytes(rows, storage) / 2**20:.2f} MiB"
        )


def check_plan_alone(policy: str | None, budget: str | None, ranking: Ranking) -> None:
    """Refuse the options that would have gone into making a plan beside a finished one."""
    for name, value in {"policy": policy, "budget": budget, **vars(ranking)}.items():
        if value is not None:
            raise HeatKVError(f"--plan is a finished plan; leave --{name.replace('_', '-')} out")
