"""Answers from shapes, without weights: `heatkv solve` makes a plan, `heatkv fit` says what a memory holds."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heatkv.cli import options
from heatkv.cli.opening import is_guided, make_plan, parse_dtype, parse_size, say_template, statistics_of_model
from heatkv.cli.options import Planning
from heatkv.cli.output import Fact, facts_json, facts_table, plan_facts, show
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import check_place
from heatkv.core.plan import CachePlan
from heatkv.core.plan_file import load_plan
from heatkv.core.storage_type import StorageType
from heatkv.errors import FormatError, HeatKVError
from heatkv.models.catalogue import model_info
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import HeatKV

if TYPE_CHECKING:
    from heatkv.profiling.analysis.fit import Fit, Footprint


def solve(
    *,
    model: options.Model = "emoji",
    planning: Planning,
    sink_scales: Annotated[
        int | None, typer.Option("--sink-scales", help="first scales that are never dropped; default: the policy's")
    ] = None,
    solve_seconds: Annotated[
        float | None,
        typer.Option("--solve-seconds", help="time to bring a solved plan closer to its bound; default 10"),
    ] = None,
    size: options.Size = None,
    rows: options.Rows = None,
    dtype: options.Dtype = "bfloat16",
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="plan.json to write")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compute a plan from geometry and statistics or published rankings; needs no weights. With --plan a finished plan
    is checked and described.

    Example: heatkv solve --model infinity-2b --policy heatkv --budget 0.1 --orders orders.json --out plan.json
    """
    info, storage = model_info(model), parse_dtype(dtype)
    area, ratio = parse_size(size)
    geometry, rows = info.geometry(area, ratio), 2 if rows is None else rows
    if out is not None:
        _check_replaceable(out)
    named = {"sink_scales": sink_scales, "solve_seconds": solve_seconds}
    set_ = [f"{name}={value}" for name, value in named.items() if value is not None]
    planning = replace(planning, set=[*(planning.set or []), *set_] or None)
    plan = make_plan(
        planning, "heatkv", geometry, model, lambda path: statistics_of_model(path, model),
        seed=seed, rows=rows, storage=storage,
    )  # fmt: skip
    plan.check_bytes(rows, str(storage))
    if out is not None:
        plan.save(out)
    say_template(model, ratio)
    facts = _facts(plan, geometry, model, rows, storage, out)
    title = f"{plan.policy} at {plan.budget:.4g} of the cache of {model}"
    show(facts_table(title, facts), as_json, facts_json(facts))


def _facts(
    plan: CachePlan, geometry: CacheGeometry, model: str, rows: int, storage: StorageType, out: Path | None
) -> list[Fact]:
    target, layer = plan.peak_checkpoint
    share = plan.peak_token_heads / max(plan.budget_token_heads, 1)
    held, full = plan.bytes(rows, str(storage)), geometry.full_bytes(rows, storage.compute)
    return [
        Fact("model", model),
        Fact("policy", plan.policy),
        Fact("schedule", str(geometry.schedule), "schedule"),
        Fact("budget", plan.budget),
        Fact("budget_token_heads", plan.budget_token_heads),
        Fact("peak_token_heads", plan.peak_token_heads, "peak",
             f"{plan.peak_token_heads} of {plan.budget_token_heads} token-heads ({share:.2%} of the budget)"),
        Fact("peak_over_budget", share),
        Fact("peak_checkpoint", {"scale": target, "layer": layer}, "at", f"after layer {layer} of scale {target}"),
        Fact("full_token_heads", geometry.full_token_heads),
        Fact("planned_bytes", held, "bytes",
             f"{held / 2**20:.2f} MiB of {full / 2**20:.2f} MiB in {storage.compute} ({rows} rows, {storage})"),
        Fact("full_bytes", full),
        Fact("rows", rows),
        Fact("dtype", storage.compute),
        Fact("storage", str(storage)),
        *plan_facts(plan),
        Fact("out", None if out is None else str(out), "written"),
    ]  # fmt: skip


def _check_replaceable(out: Path) -> None:
    """Refuse to write a plan over anything but a plan, and where none can be written."""
    if not out.exists():
        check_place(out)
        return
    try:
        load_plan(out, head_dim=1)
    except HeatKVError as error:
        raise FormatError(f"{out} exists and is no plan; name another file") from error


def fit(
    *,
    memory: Annotated[str, typer.Option("--memory", help="what there is, as 24GiB or 24GB")],
    model: options.Model = "infinity-2b",
    batch: Annotated[int | None, typer.Option("--batch", help="images at once (default 1)")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="cache budget (bytes: of one image): then the largest batch is found")
    ] = None,
    size: options.Size = None,
    cfg: options.Cfg = None,
    dtype: options.Dtype = "bfloat16",
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="length of a prompt (Infinity), of which the encoder takes up to 512")
    ] = 77,
    keep_text_encoder: Annotated[
        bool, typer.Option("--keep-text-encoder", help="beside the transformer, as a server does (Infinity)")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """What fits in a memory: weights, prompts, a step of the largest scale, and the largest budget or batch.

    What does not fit is shown in full as well, with what is missing; then the exit code is 2.

    Example: heatkv fit --model infinity-8b --memory 40GiB --batch 4
    """
    from heatkv.profiling.analysis.fit import footprint, largest_batch, largest_share, parse_memory

    available, info, storage = parse_memory(memory), model_info(model), parse_dtype(dtype)
    guided, (area, ratio), policy = is_guided(info, cfg), parse_size(size), HeatKV()
    if batch is not None and budget is not None:
        raise HeatKVError("--batch asks for the largest budget, --budget for the largest batch; give one of them")
    problem = PlanningProblem(
        info.geometry(area, ratio), Budget.parse(budget or "100%"), rows=2 if guided else 1, storage=str(storage)
    )
    policy.check(problem)
    schedule = problem.geometry.schedule
    least = Fraction(schedule.offsets[policy.sink_scales], schedule.cached_tokens)
    taken, one = (
        footprint(
            info, images, size=area, ratio=ratio, dtype=storage.compute, code=storage.code, guided=guided,
            keep_text_encoder=keep_text_encoder, prompt_tokens=prompt_tokens,
        )
        for images in (1 if batch is None else batch, 1)
    )  # fmt: skip
    if budget is None:
        found = largest_share(taken, available, least)
        answer = "the full cache fits" if found.share == 1 else f"the largest budget is {_percent(found.share)}"
    else:
        found = largest_batch(taken, available, problem.share)
        answer = f"the largest batch is {found.taken.images}"
    say_template(model, ratio)
    head = [Fact("model", model), Fact("dtype", storage.compute), Fact("storage", str(storage)),
            Fact("schedule", str(schedule))]  # fmt: skip
    facts = [*head, *_fit_facts(found, replace(found, share=least).cache, policy.sink_scales)]
    facts += _side_by_side(one, available, max(least, Fraction(1, 10)))
    title = f"{model} in {memory}: {found.taken.images} at once, {storage}"
    table = facts_table(title, facts, ("what", "GiB"))
    table.caption = (
        f"{answer if found.fits else 'it does not fit'}; from shapes (docs/fit.md), without the driver's own memory "
        "and fragmentation"
    )
    show(table, as_json, facts_json(facts))
    if not found.fits:
        held = f"of the {policy.sink_scales} sink scales alone" if budget is None else f"at {_percent(found.share)}"
        raise HeatKVError(
            f"{memory} do not hold a batch of {found.taken.images} of {model}: with the cache {held} it takes "
            f"{math.ceil(found.total / 2**30 * 100) / 100:.2f} GiB"
        )


def _side_by_side(one: Footprint, memory: int, tenth: Fraction) -> list[Fact]:
    """The most images with the full cache and with a tenth of it, and the least memory for one, from its footprint."""
    from heatkv.profiling.analysis.fit import Fit, largest_batch

    full, most = (largest_batch(one, memory, share) for share in (Fraction(1), tenth))
    lowest = Fit(one, memory, tenth).total
    return [
        Fact("most_images_full", full.taken.images if full.fits else 0, "images at once with the full cache"),
        Fact("most_images_tenth", most.taken.images if most.fits else 0, "images at once at 10% of it"),
        Fact("one_image_bytes", lowest, "least memory for one image at 10%", f"{lowest / 2**30:.3f}"),
    ]


def _fit_facts(found: Fit, sinks: int, sink_scales: int) -> list[Fact]:
    """What is taken; `sinks` are the bytes of the sink scales."""
    taken, left = found.taken, found.memory - found.total

    def size(key: str, value: int, label: str = "") -> Fact:
        return Fact(key, value, label, f"{value / 2**30:.3f}")

    return [
        size("transformer_bytes", taken.transformer, "transformer"),
        size("decoder_bytes", taken.decoder, "decoder of codes"),
        size(
            "text_encoder_bytes", taken.text_encoder, "text encoder" + " (gone before)" * (not taken.keeps_text_encoder)
        ),
        size("prompt_bytes", taken.prompt + taken.shared_prompt, "classes or prompts"),
        size("codes_bytes", taken.codes, "codes"),
        size("step_bytes", taken.step, "step of the largest scale, one image"),
        size("attention_bytes", taken.attention, "attention: tables, gathered heads"),
        size("decoding_bytes", taken.decoding, "decoding one picture (afterwards)"),
        size("full_cache_bytes", taken.full_cache, "cache, full"),
        size("sinks_bytes", sinks, f"cache of the {sink_scales} sink scales"),
        size("cache_bytes", found.cache, f"cache at {_percent(found.share)}"),
        size("total_bytes", found.total, "total with that"),
        size("left_bytes", max(0, left), "left" if found.fits else ""),
        size("missing_bytes", found.missing, "" if found.fits else "missing"),
        Fact("images", taken.images),
        Fact("rows", taken.rows),
        Fact("sink_scales", sink_scales),
        Fact("budget", float(found.share)),
        Fact("memory_bytes", found.memory),
        Fact("fits", found.fits),
        Fact("least_memory_bytes", max(taken.without_cache + sinks, taken.otherwise)),
    ]


def _percent(share: Fraction) -> str:
    """Rounded down, so that a budget that was found fits when it is asked for."""
    return f"{math.floor(share * 10000) / 100:g}%"
