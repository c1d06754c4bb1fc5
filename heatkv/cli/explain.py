"""`heatkv explain`: what a plan keeps, where and when, and what its budget is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Group

from heatkv.cli import options
from heatkv.cli.opening import statistics_of_model
from heatkv.cli.output import Fact, facts_json, facts_table, plan_facts, progress, say, show
from heatkv.core.io import in_file, make_folder
from heatkv.core.levels import FULL, level_tokens
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.plan_file import load_plan
from heatkv.errors import PlanError, PolicyError, StatisticsError
from heatkv.models.catalogue import MODELS

if TYPE_CHECKING:
    from heatkv.profiling.analysis.explain import Worth

OMITTED = ("format", "version", "head_dim", "last_read", "coarse", "capacity")
"""What of a plan's file is not repeated."""


def explain(
    *,
    plan: Annotated[Path, typer.Argument(help="plan.json of `heatkv solve`")],
    statistics: options.StatisticsFile = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder to draw charts to, as PNG")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what a plan keeps of every scale and layer and how full the cache gets; with statistics, what room is worth.

    Example: heatkv explain plan.json --statistics statistics.safetensors --out charts
    """
    from heatkv.profiling.analysis import explain as analysis
    from heatkv.profiling.analysis import plan_view

    loaded = load_plan(plan, head_dim=1)  # nothing here is in bytes, so a plan need not have its head size
    static = loaded if isinstance(loaded, Plan) else None
    worth, not_judged = (None, "") if statistics is None else _worth(loaded, statistics)
    names = [f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}" for t, h, w in loaded.schedule.scales]
    tokens = level_tokens(loaded.schedule, static.levels[0][0]) if static else loaded.schedule.tokens
    heads = analysis.kept_of_heads(loaded.held, tokens)
    files = [] if out is None else _draw(loaded, names, make_folder(out))
    shown: list[Any] = [facts_table(f"plan of {loaded.policy}", _summary(loaded))]
    facts = [
        *(Fact(name, value) for name, value in loaded.to_json().items() if name not in OMITTED),
        Fact("slack_token_heads", loaded.budget_token_heads - loaded.peak_token_heads),
        Fact("predicted_kl", loaded.predicted_kl),
        Fact("layers", [{"kept_token_time": float(np.mean(row)), "of_heads": row} for row in heads.tolist()]),
        Fact("live_token_heads", loaded.live.tolist()),
        Fact("worth", None if worth is None else _worth_facts(worth)),
        Fact("not_judged", not_judged or None),
        Fact("files", [str(file) for file in files]),
    ]
    if static is not None:
        scales = _kept_of_scales(static)
        shown.append(plan_view.scales_table(static.levels, scales, names))
        facts += _scale_facts(static, scales)
    shown += [plan_view.layers_table(heads), plan_view.use_table(loaded.live, loaded.budget_token_heads, names)]
    shown += [f"not judged: {not_judged}"] if not_judged else []
    shown += [] if worth is None else [plan_view.worth_table(worth), *plan_view.worth_lines(worth)]
    show(Group(*shown), as_json, facts_json(facts))
    if files:
        say(f"written: {', '.join(str(file) for file in files)}")


def _kept_of_scales(plan: Plan) -> Any:
    from heatkv.profiling.analysis.explain import kept_of_scales

    return kept_of_scales(
        [last_read for _, last_read in plan.levels], [level_tokens(plan.schedule, level) for level, _ in plan.levels]
    )


def _scale_facts(plan: Plan, scales: Any) -> list[Fact]:
    from heatkv.profiling.analysis.explain import ends_of_cells, reads_of_scales

    last_reads = [last_read for _, last_read in plan.levels]
    ends, served = ends_of_cells(last_reads[-1]), reads_of_scales(last_reads)
    return [
        Fact("source_scales", [
            {"kept_token_time": share, "never_cached": never, "dropped_early": early, "to_the_end": whole}
            for share, (never, early, whole) in zip(scales.tolist(), ends.tolist(), strict=True)
        ]),
        Fact("reads_of_source_scales", {
            level: shares for (level, _), shares in zip(plan.levels, served.tolist(), strict=True)
        }),
    ]  # fmt: skip


def _draw(plan: CachePlan, names: list[str], folder: Path) -> list[Path]:
    """The charts of a plan: how full the cache gets, and of a static one what is kept, with a heat map per level."""
    from heatkv.profiling.analysis import plan_view
    from heatkv.profiling.analysis.explain import full_use

    title = f"{plan.policy} at {plan.budget:.4g} of the cache of {plan.model or 'a model'}"
    files = []
    if isinstance(plan, Plan):
        for level, last_read in plan.levels:
            coarse = level != FULL
            files.append(folder / (f"last_read_{level}.png" if coarse else "last_read.png"))
            plan_view.save_last_read(files[-1], last_read, names, f"{title}, {level} or finer" if coarse else title)
    files.append(folder / "cache_use.png")
    plan_view.save_use(files[-1], plan.live, full_use(plan), plan.budget_token_heads, names, title)
    return files


def _worth(plan: CachePlan, path: Path) -> tuple[Worth | None, str]:
    """The plan judged by statistics of the model that it was made for, or why it cannot be."""
    from heatkv.profiling.analysis.explain import worth_of

    if not isinstance(plan, Plan):
        return None, f"policy {plan.policy!r} chooses tokens while images are drawn; compare it with others"
    statistics = statistics_of_model(path, plan.model)
    measured = statistics.provenance.model
    # other names may be of the same model: attached, it has that of its class
    if plan.model != measured and {plan.model, measured} <= set(MODELS):
        with in_file(path):
            raise StatisticsError(f"measured on {measured}, the plan is for {plan.model}; calibrate that model")
    try:
        with progress("pricing the budget"):
            return worth_of(plan, statistics), ""
    except (PlanError, PolicyError) as error:
        return None, str(error)


def _summary(plan: CachePlan) -> list[Fact]:
    target, layer = plan.peak_checkpoint
    slack, full = plan.budget_token_heads - plan.peak_token_heads, plan.geometry.full_token_heads
    model = f"{plan.model or 'unknown'}, {plan.geometry.layers} layers x {plan.geometry.heads} heads"
    return [
        Fact("", model, "model"),
        Fact("", str(plan.schedule), "schedule"),
        Fact("", ", ".join(f"{name}={value}" for name, value in plan.settings.items()) or "none", "settings"),
        Fact("", plan.weights or "none: planned from shapes or published rankings", "measured on weights"),
        Fact("", f"{plan.budget_token_heads} of {full} token-heads ({plan.budget:.4%})", "budget"),
        Fact("", f"{plan.peak_token_heads} token-heads after layer {layer} of scale {target}", "peak"),
        Fact("", f"{slack} token-heads ({slack / max(plan.budget_token_heads, 1):.2%} of the budget)", "slack"),
        *plan_facts(plan),
    ]


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
