"""Answers from shapes, without weights: `heatkv solve` makes a plan, `heatkv fit` says what a memory holds."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heatkv.cli import options
from heatkv.cli.opening import (
    check_device,
    check_plan_alone,
    is_guided,
    known_dtype,
    open_plan,
    open_rankings,
    parse_ratio,
    positive,
    say_template,
    statistics_of_model,
    storage_name,
)
from heatkv.cli.output import certificate, chosen_by_kl, pairs, show
from heatkv.cli.settings import policy_options
from heatkv.core.budget import Budget
from heatkv.core.io import check_place
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.plan_file import load_plan
from heatkv.errors import FormatError, HeatKVError
from heatkv.models.catalogue import model_info
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.heatkv import HeatKV

if TYPE_CHECKING:
    from heatkv.profiling.analysis.fit import Fit

DEFAULT_POLICY = "heatkv"


def solve(
    *,
    model: options.Model = "emoji",
    policy: options.Policy = None,
    budget: options.BudgetText = None,
    ranking: options.Ranking,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="check and describe this plan.json instead of solving")
    ] = None,
    size: options.Size = None,
    ratio: options.Ratio = None,
    rows: options.Rows = None,
    dtype: options.Dtype = "bfloat16",
    storage: options.Storage = None,
    cfg: options.Cfg = None,
    device: options.Device = "cpu",
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="plan.json to write")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compute a plan from geometry and statistics or published rankings; needs no weights.

    Example: heatkv solve --model infinity-2b --policy heatkv --budget 0.1 --orders orders.json --out plan.json
    """
    info = model_info(model)
    geometry = info.geometry(size, parse_ratio(ratio))
    guided = is_guided(info, cfg)
    held_as = storage_name(known_dtype(dtype), storage)
    rows = rows if rows is not None else (2 if guided else 1)
    positive(rows=rows)
    check_device(device)
    if out is not None:
        _check_replaceable(out)
    if plan is not None:
        check_plan_alone(policy, budget, ranking)
        solved: CachePlan = open_plan(plan, geometry, model)
        solved.check_bytes(rows, held_as)
    else:
        if budget is None:
            raise HeatKVError(
                "solve needs --budget, written 10%, 0.1, 600MiB, 2GB or 650tokens (or --plan to check a file)"
            )
        named = policy or DEFAULT_POLICY
        chosen = make_policy(named, **policy_options([named], ranking)[named])
        asked = Budget.parse(budget)
        loaded = None if ranking.statistics is None else statistics_of_model(ranking.statistics, model)
        problem = PlanningProblem(
            geometry,
            asked,
            loaded,
            open_rankings(ranking.orders, geometry, model),
            seed,
            rows,
            held_as,
            model,
        )
        solved = chosen.plan(problem)
    if out is not None:
        solved.save(out)
    static = solved if isinstance(solved, Plan) else None
    target, layer = solved.peak_checkpoint
    share = solved.peak_token_heads / max(solved.budget_token_heads, 1)
    facts = {
        "model": model, "policy": solved.policy, "schedule": str(geometry.schedule),
        "budget": solved.budget, "budget_token_heads": solved.budget_token_heads,
        "peak_token_heads": solved.peak_token_heads, "peak_over_budget": share,
        "peak_checkpoint": {"scale": target, "layer": layer}, "full_token_heads": geometry.full_token_heads,
        "planned_bytes": solved.bytes(rows, held_as), "full_bytes": geometry.full_bytes(rows, dtype),
        "rows": rows, "dtype": dtype, "storage": held_as,
        "sink_scales": static and static.sink_scales, "value": static and static.value,
        "value_bound": static and static.value_bound, "gap": static and static.gap,
        "budget_asked": solved.settings.get("budget"), "predicted_kl": solved.predicted_kl,
        "had_no_effect": solved.had_no_effect(), "out": None if out is None else str(out),
    }  # fmt: skip
    held, full = solved.bytes(rows, held_as) / 2**20, geometry.full_bytes(rows, dtype) / 2**20
    told = {
        "schedule": str(geometry.schedule),
        **chosen_by_kl(solved),
        "peak": f"{solved.peak_token_heads} of {solved.budget_token_heads} token-heads ({share:.2%} of the budget)",
        "at": f"after layer {layer} of scale {target}",
        "bytes": f"{held:.2f} MiB of {full:.2f} MiB in {dtype} ({rows} rows, {held_as})",
        **({} if static is None else {"sink scales": str(static.sink_scales), **certificate(static)}),
    }
    if solved.had_no_effect():
        told["note"] = "the plan has no effect: nothing is dropped at this budget"
    if out is not None:
        told["written"] = str(out)
    say_template(model, ratio)
    title = f"{solved.policy} at {solved.budget:.4g} of the cache of {model}"
    show(pairs(title, ("what", "value"), told), as_json, facts)


def _check_replaceable(out: Path) -> None:
    """Refuse to write a plan over anything but a plan, and where none can be written."""
    if not out.exists():
        check_place(out)
        return
    try:
        load_plan(out, head_dim=1)
    except HeatKVError as error:
        raise FormatError(f"{out} exists and is no plan; name another file (--out)") from error


def fit(
    memory: Annotated[str, typer.Option("--memory", help="what there is, as 24GiB or 24GB")],
    model: options.Model = "infinity-2b",
    batch: Annotated[int | None, typer.Option("--batch", help="images at once (default 1)")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="cache budget (bytes: of one image): then the largest batch is found")
    ] = None,
    sink_scales: options.SinkScales = None,
    size: options.Size = None,
    ratio: options.Ratio = None,
    cfg: options.Cfg = None,
    dtype: options.Dtype = "bfloat16",
    storage: options.Storage = None,
    text_encoder: Annotated[bool, typer.Option(help="keep Infinity's text encoder in the same memory")] = True,
    as_json: options.AsJson = False,
) -> None:
    """What fits in a memory: weights, text encoder, working memory, and the largest budget or batch.

    What does not fit is told in full as well, with what is missing; then the exit code is 2.

    Example: heatkv fit --model infinity-8b --memory 40GiB --batch 4
    """
    from heatkv.profiling.analysis.fit import footprint, largest_batch, largest_share, parse_memory

    available, info, dtype = parse_memory(memory), model_info(model), known_dtype(dtype)
    guided, shape = is_guided(info, cfg), parse_ratio(ratio)
    if batch is not None and budget is not None:
        raise HeatKVError("--batch asks for the largest budget, --budget for the largest batch; give one of them")
    policy = HeatKV() if sink_scales is None else HeatKV(sink_scales=sink_scales)
    problem = PlanningProblem(
        info.geometry(size, shape), Budget.parse(budget or "100%"), rows=2 if guided else 1,
        storage=storage_name(dtype, storage),
    )  # fmt: skip
    policy.check(problem)
    schedule = problem.geometry.schedule
    least = Fraction(schedule.offsets[policy.sink_scales], schedule.cached_tokens)
    taken = footprint(
        info, 1 if batch is None else batch, size=size, ratio=shape, dtype=dtype, storage=storage, guided=guided,
        text_encoder=text_encoder,
    )  # fmt: skip
    if budget is None:
        found = largest_share(taken, available, least)
        answer = "the full cache fits" if found.share == 1 else f"the largest budget is {_percent(found.share)}"
    else:
        found = largest_batch(taken, available, problem.share)
        answer = f"the largest batch is {found.taken.images}"
    head = {"model": model, "dtype": dtype, "storage": problem.storage, "schedule": str(schedule)}
    say_template(model, ratio)
    _show_fit(
        found, replace(found, share=least).cache, policy.sink_scales, head, f"{model} in {memory}", answer, as_json
    )
    if not found.fits:
        held = f"of the {policy.sink_scales} sink scales alone" if budget is None else f"at {_percent(found.share)}"
        raise HeatKVError(
            f"{available / 2**30:.2f} GiB do not hold a batch of {found.taken.images} of {model}: with the cache "
            f"{held} it takes {found.total / 2**30:.2f} GiB"
        )


def _show_fit(
    found: Fit, sinks: int, sink_scales: int, head: dict[str, Any], title: str, answer: str, as_json: bool
) -> None:
    """The table of what is taken, or all facts; `sinks` are the bytes of the sink scales."""
    taken, left = found.taken, found.memory - found.total
    sizes = {
        "transformer_bytes": ("transformer", taken.transformer),
        "decoder_bytes": ("decoder of codes", taken.decoder),
        "text_encoder_bytes": ("text encoder", taken.text_encoder),
        "prompt_bytes": ("classes or prompts (longest)", taken.prompt),
        "working_bytes": ("working memory (peak)", taken.working),
        "attention_bytes": ("attention: tables, gathered heads", taken.attention),
        "full_cache_bytes": ("cache, full", taken.full_cache),
        "sinks_bytes": (f"cache of the {sink_scales} sink scales", sinks),
        "cache_bytes": (f"cache at {_percent(found.share)}", found.cache),
        "total_bytes": ("total with that", found.total),
    }
    facts = head | {name: size for name, (_, size) in sizes.items()} | {
        "images": taken.images, "rows": taken.rows, "sink_scales": sink_scales, "budget": float(found.share),
        "memory_bytes": found.memory, "fits": found.fits, "left_bytes": max(0, left), "missing_bytes": found.missing,
        "least_memory_bytes": taken.without_cache + sinks,
    }  # fmt: skip
    told = [*sizes.values(), ("left" if found.fits else "missing", abs(left))]
    table = pairs(
        f"{title}: {taken.images} at once, {head['storage']}", ("what", "GiB"),
        {name: f"{size / 2**30:.3f}" for name, size in told},
    )  # fmt: skip
    answer = answer if found.fits else "it does not fit"
    table.caption = f"{answer}; from shapes (docs/fit.md), without the driver's own memory and fragmentation"
    show(table, as_json, facts)


def _percent(share: Fraction) -> str:
    """Rounded down, so that a budget that was found fits when it is asked for."""
    return f"{math.floor(share * 10000) / 100:g}%"
