"""`heatkv explain`: what a plan keeps, where and when, and what its budget is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Group

from heatkv.cli import options
from heatkv.cli.opening import statistics_of_model
from heatkv.cli.output import certificate, chosen_by_kl, make_folder, pairs, progress, say, show
from heatkv.core.levels import FULL, level_tokens
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.plan_file import load_plan
from heatkv.errors import HeatKVError, PlanError, PolicyError, StatisticsError
from heatkv.models.catalogue import MODELS

if TYPE_CHECKING:
    from heatkv.profiling.analysis.explain import Worth

UNTOLD = ("format", "version", "head_dim", "last_read", "coarse", "capacity")
"""What of a plan's file is not repeated."""


def explain(
    *,
    plan: Annotated[Path, typer.Argument(help="plan.json of `heatkv solve`")],
    statistics: options.Statistic = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder to draw charts to, as PNG")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what a plan keeps of every scale and layer and how full the cache gets; with statistics, what room is worth.

    Example: heatkv explain plan.json --statistics statistics.safetensors --out charts
    """
    from heatkv.profiling.analysis import explain as explaining
    from heatkv.profiling.analysis import plan_view as report

    told = load_plan(plan, head_dim=1)  # nothing here is in bytes, so a plan need not tell its head size
    if not isinstance(told, Plan):
        _explain_capacities(told, statistics, out, as_json)
        return
    worth, unjudged = (None, "") if statistics is None else _worth(told, statistics)
    last_reads = [last_read for _, last_read in told.levels]
    tokens = [level_tokens(told.schedule, level) for level, _ in told.levels]
    scales, heads = explaining.kept_of_scales(last_reads, tokens), explaining.kept_of_heads(told.held, tokens[0])
    names = _names(told)
    files = [] if out is None else _draw(told, names, make_folder(out))
    shown: list[Any] = [
        _summary(told),
        report.scales_table(told.levels, scales, names),
        report.layers_table(heads),
        report.use_table(told.live, told.budget_token_heads, names),
    ]
    if unjudged:
        shown.append(f"not judged: {unjudged}")
    if worth is not None:
        shown += [report.worth_table(worth), *report.worth_lines(worth)]
    ends, served = explaining.ends_of_cells(last_reads[-1]), explaining.reads_of_scales(last_reads)
    facts = {
        **{name: value for name, value in told.to_json().items() if name not in UNTOLD},
        "slack_token_heads": told.budget_token_heads - told.peak_token_heads,
        "predicted_kl": told.predicted_kl,
        "source_scales": [
            {"kept_token_time": share, "never_cached": never, "dropped_early": early, "to_the_end": whole}
            for share, (never, early, whole) in zip(scales.tolist(), ends.tolist(), strict=True)
        ],
        "reads_of_source_scales": {
            level: shares for (level, _), shares in zip(told.levels, served.tolist(), strict=True)
        },
        "layers": [{"kept_token_time": float(np.mean(of_heads)), "of_heads": of_heads} for of_heads in heads.tolist()],
        "live_token_heads": told.live.tolist(),
        "worth": None if worth is None else _worth_facts(worth),
        "not_judged": unjudged or None,
        "files": [str(file) for file in files],
    }
    show(Group(*shown), as_json, facts)
    if files:
        say(f"written: {', '.join(str(file) for file in files)}")


def _names(plan: CachePlan) -> list[str]:
    return [f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}" for t, h, w in plan.schedule.scales]


def _explain_capacities(plan: CachePlan, statistics: Path | None, out: Path | None, as_json: bool) -> None:
    """What a dynamic policy may hold: which tokens these are is only known while images are drawn."""
    from heatkv.profiling.analysis import explain as explaining
    from heatkv.profiling.analysis import plan_view as report

    if statistics is not None:
        raise HeatKVError(
            f"policy {plan.policy!r} chooses tokens while images are drawn, so statistics do not say what its plan is "
            "worth; leave --statistics out and compare it with others (heatkv compare)"
        )
    names, heads = _names(plan), explaining.kept_of_heads(plan.held, plan.schedule.tokens)
    files = []
    if out is not None:
        files.append(make_folder(out) / "cache_use.png")
        title = f"{plan.policy} at {plan.budget:.4g} of the cache of {plan.model or 'a model'}"
        report.save_use(files[0], plan.live, explaining.full_use(plan), plan.budget_token_heads, names, title)
    shown = [_summary(plan), report.layers_table(heads), report.use_table(plan.live, plan.budget_token_heads, names)]
    facts = {
        **{name: value for name, value in plan.to_json().items() if name not in UNTOLD},
        "slack_token_heads": plan.budget_token_heads - plan.peak_token_heads,
        "layers": [{"kept_token_time": float(np.mean(of_heads)), "of_heads": of_heads} for of_heads in heads.tolist()],
        "live_token_heads": plan.live.tolist(),
        "files": [str(file) for file in files],
    }
    show(Group(*shown), as_json, facts)
    if files:
        say(f"written: {files[0]}")


def _draw(plan: Plan, names: list[str], folder: Path) -> list[Path]:
    """All charts of a plan, with a heat map for every level."""
    from heatkv.profiling.analysis import plan_view as report
    from heatkv.profiling.analysis.explain import full_use

    title = f"{plan.policy} at {plan.budget:.4g} of the cache of {plan.model or 'a model'}"
    files = []
    for level, last_read in plan.levels:
        coarse = level != FULL
        files.append(folder / (f"last_read_{level}.png" if coarse else "last_read.png"))
        report.save_last_read(files[-1], last_read, names, f"{title}, {level} or finer" if coarse else title)
    files.append(folder / "cache_use.png")
    report.save_use(files[-1], plan.live, full_use(plan), plan.budget_token_heads, names, title)
    return files


def _worth(plan: Plan, path: Path) -> tuple[Worth | None, str]:
    """The plan judged by statistics of the model that it was made for, or why it cannot be."""
    from heatkv.profiling.analysis.explain import worth_of

    statistics = statistics_of_model(path, plan.model)
    measured = statistics.provenance.model
    # other names may be of the same model: attached, it has that of its class
    if plan.model != measured and {plan.model, measured} <= set(MODELS):
        raise StatisticsError(f"{path} was measured on {measured}, the plan is for {plan.model}; calibrate that model")
    try:
        with progress("pricing the budget"):
            return worth_of(plan, statistics), ""
    except (PlanError, PolicyError) as error:
        return None, str(error)


def _summary(plan: CachePlan) -> Any:
    target, layer = plan.peak_checkpoint
    slack = plan.budget_token_heads - plan.peak_token_heads
    full = plan.geometry.full_token_heads
    facts = {
        "model": f"{plan.model or 'not told'}, {plan.geometry.layers} layers x {plan.geometry.heads} heads",
        "schedule": str(plan.schedule),
        "settings": ", ".join(f"{name}={value}" for name, value in plan.settings.items()) or "none",
        **({"sink scales": str(plan.sink_scales)} if isinstance(plan, Plan) else {}),
        "budget": f"{plan.budget_token_heads} of {full} token-heads ({plan.budget:.4%})",
        "peak": f"{plan.peak_token_heads} token-heads after layer {layer} of scale {target}",
        "slack": f"{slack} token-heads ({slack / max(plan.budget_token_heads, 1):.2%} of the budget)",
        **chosen_by_kl(plan),
        **(certificate(plan) if isinstance(plan, Plan) else {}),
    }
    if plan.had_no_effect():
        facts["note"] = "the plan has no effect: nothing is dropped"
    return pairs(f"plan of {plan.policy}", ("what", "value"), facts)


def _worth_facts(worth: Worth) -> dict[str, Any]:
    return {
        "measure": worth.measure,
        "instead": worth.instead or None,
        "value": worth.value,
        "value_bound": worth.best,
        "gap": worth.gap,
        "full_value": worth.full,
        "value_per_token_head": worth.price,
        "change_of_bound_by_one_percent_of_budget": worth.change(0.01),
        "binding_checkpoints": [
            {"scale": int(t), "layer": int(l), "price": float(worth.price_TL[t, l])}
            for t, l in np.argwhere(worth.price_TL)
        ],
        "binding_layer_caps": [
            {"layer": int(l), "scale": int(t), "price": float(worth.cap_price_LT[l, t])}
            for l, t in np.argwhere(worth.cap_price_LT)
        ],
    }
