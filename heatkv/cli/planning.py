"""Answers from shapes, without weights: `heatkv solve` makes a plan, `heatkv fit` says what a memory holds."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from heatkv.cli import options
from heatkv.cli.opening import (
    is_guided,
    known_dtype,
    open_only_plan,
    open_rankings,
    parse_ratio,
    say_template,
    statistics_of_model,
)
from heatkv.cli.output import certificate, pairs, say, show
from heatkv.cli.settings import policy_options
from heatkv.errors import HeatKVError
from heatkv.geometry import Budget
from heatkv.models import model_info
from heatkv.policies.base import PlanningProblem, make_policy


def solve(
    *,
    model: options.Model = "emoji",
    policy: options.Policy = "heatkv",
    budget: options.BudgetText = None,
    ranking: options.Ranking,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="check and describe this plan.json instead of solving")
    ] = None,
    size: options.Size = None,
    ratio: options.Ratio = None,
    rows: options.Rows = None,
    dtype: options.Dtype = "bfloat16",
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
    storage = known_dtype(dtype)
    rows = rows if rows is not None else (2 if guided else 1)
    if plan is not None:
        solved = open_only_plan(plan, geometry, model, budget, ranking)
    else:
        if budget is None:
            raise HeatKVError(
                "solve needs --budget, written 10%, 0.1, 600MiB, 2GB or 650tokens (or --plan to check a file)"
            )
        chosen = make_policy(policy, **policy_options([policy], ranking)[policy])
        loaded = None if ranking.statistics is None else statistics_of_model(ranking.statistics, model)
        problem = PlanningProblem(
            geometry,
            Budget.parse(budget),
            loaded,
            open_rankings(ranking.orders, geometry, model),
            seed,
            rows,
            storage,
            model,
        )
        solved = chosen.plan(problem)
    if out is not None:
        solved.save(out)
    target, layer = solved.peak_checkpoint
    share = solved.peak_token_heads / max(solved.budget_token_heads, 1)
    facts = {
        "model": model, "policy": solved.policy, "schedule": str(geometry.schedule),
        "budget": solved.budget, "budget_token_heads": solved.budget_token_heads,
        "peak_token_heads": solved.peak_token_heads, "peak_over_budget": share,
        "peak_checkpoint": {"scale": target, "layer": layer}, "full_token_heads": geometry.full_token_heads,
        "planned_bytes": solved.bytes(rows, storage), "full_bytes": geometry.full_bytes(rows, storage),
        "rows": rows, "dtype": storage, "sink_scales": solved.sink_scales, "value": solved.value,
        "value_bound": solved.value_bound, "gap": solved.gap, "had_no_effect": solved.had_no_effect(),
        "out": None if out is None else str(out),
    }  # fmt: skip
    held, full = solved.bytes(rows, storage) / 2**20, geometry.full_bytes(rows, storage) / 2**20
    told = {
        "schedule": str(geometry.schedule),
        "peak": f"{solved.peak_token_heads} of {solved.budget_token_heads} token-heads ({share:.2%} of the budget)",
        "at": f"after layer {layer} of scale {target}",
        "bytes": f"{held:.2f} MiB of {full:.2f} MiB ({rows} rows, {storage})",
        "sink scales": str(solved.sink_scales),
        **certificate(solved),
    }
    if solved.had_no_effect():
        told["note"] = "the plan has no effect: nothing is dropped at this budget"
    if out is not None:
        told["written"] = str(out)
    say_template(model, ratio)
    title = f"{solved.policy} at {solved.budget:.4g} of the cache of {model}"
    show(pairs(title, ("what", "value"), told), as_json, facts)


def fit(
    memory: Annotated[str, typer.Option("--memory", help="what there is, as 24GiB or 24GB")],
    model: options.Model = "infinity-2b",
    batch: Annotated[int | None, typer.Option("--batch", help="images at once (default 1)")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="cache budget (bytes: of one image): then the largest batch is found")
    ] = None,
    size: options.Size = None,
    ratio: options.Ratio = None,
    cfg: options.Cfg = None,
    dtype: options.Dtype = "bfloat16",
    text_encoder: Annotated[bool, typer.Option(help="keep Infinity's text encoder in the same memory")] = True,
    as_json: options.AsJson = False,
) -> None:
    """What fits in a memory: weights, text encoder, working memory, and the largest budget or batch.

    Example: heatkv fit --model infinity-8b --memory 24GiB --batch 4
    """
    from heatkv.profiling.fit import Footprint, footprint, largest_batch, largest_share, parse_memory

    info, available = model_info(model), parse_memory(memory)
    known_dtype(dtype)
    guided, shape = is_guided(info, cfg), parse_ratio(ratio)

    def measure(images: int) -> Footprint:
        return footprint(info, images, size=size, ratio=shape, dtype=dtype, guided=guided, text_encoder=text_encoder)

    if batch is not None and budget is not None:
        raise HeatKVError("--batch asks for the largest budget, --budget for the largest batch; give one of them")
    if budget is None:
        taken = measure(1 if batch is None else batch)
        share = largest_share(taken, available)
    else:
        geometry = info.geometry(size, shape)
        share = Budget.parse(budget).share(geometry, 2 if guided else 1, dtype)
        taken = largest_batch(measure, available, share)
    held = int(share * taken.full_cache)
    total = taken.without_cache + held
    percent = f"{math.floor(share * 1000) / 10}%"  # rounded down, so that asked back it fits
    facts = {
        "model": model, "memory_bytes": available, "images": taken.images, "rows": taken.rows, "dtype": dtype,
        "schedule": str(info.schedule(size, shape)), "transformer_bytes": taken.transformer,
        "decoder_bytes": taken.decoder, "text_encoder_bytes": taken.text_encoder, "prompt_bytes": taken.prompt,
        "working_bytes": taken.working, "full_cache_bytes": taken.full_cache, "budget": float(share),
        "cache_bytes": held, "total_bytes": total,
    }  # fmt: skip
    told = {
        "transformer": taken.transformer,
        "decoder of codes": taken.decoder,
        "text encoder": taken.text_encoder,
        "classes or prompts (longest)": taken.prompt,
        "working memory (peak)": taken.working,
        "cache, full": taken.full_cache,
        f"cache at {percent}": held,
        "total with that": total,
    }
    title = f"{model} in {memory}: {taken.images} at once, {dtype}"
    table = pairs(title, ("what", "GiB"), {name: f"{value / 2**30:.3f}" for name, value in told.items()})
    found = "the full cache fits" if share == 1 else f"the largest budget is {percent}"
    table.caption = (
        f"{found if budget is None else f'the largest batch is {taken.images}'}; from shapes, without the driver's own "
        "memory and fragmentation"
    )
    say_template(model, ratio)
    schedule, sinks = info.schedule(size, shape), make_policy("heatkv").sink_scales
    least = Fraction(schedule.offsets[min(sinks, len(schedule) - 1)], schedule.cached_tokens)
    if share < least:
        say(f"the {sinks} sink scales of HeatKV's rule alone are {float(least):.2%}")
    show(table, as_json, facts)
