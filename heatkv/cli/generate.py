"""`heatkv generate`: images drawn under a budget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from heatkv.cli.opening import (
    Loaded,
    only_plan,
    open_either,
    open_model,
    open_plan,
    open_rankings,
    open_statistics,
    positive,
    say_bytes,
    storage_of,
)
from heatkv.cli.options import BudgetText, OutFolder, Policy, Ranking, Running, Source, Without
from heatkv.cli.output import make_folder, progress, say
from heatkv.cli.settings import policy_options
from heatkv.errors import HeatKVError, ModelError, PlanError
from heatkv.files import file_name, replacing
from heatkv.geometry import Budget
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.plan import CachePlan
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.ranked_plan import RankedPlan
from heatkv.ranks import current
from heatkv.sampling import Settings


def generate(
    *,
    out: OutFolder,
    label: Annotated[list[str] | None, typer.Option("--label", help="class name or number; may be repeated")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="text (Infinity); may be repeated")] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="negative prompt of all prompts")] = None,
    source: Annotated[Source, Without("prompts")],
    policy: Policy = "full",
    budget: BudgetText = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="plan.json of `heatkv solve`")] = None,
    ranking: Ranking,
    count: Annotated[int, typer.Option("--count", help="images per label")] = 1,
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="record every scale as a CUDA graph and replay it (CUDA)")
    ] = False,
    running: Running,
) -> None:
    """Draw images under a budget.

    Under torchrun, with a plan for as many ranks (heatkv solve --ranks), all processes draw the same images together.

    Example: heatkv generate --policy streaming --budget 20% --label pizza --label star --out pictures
    """
    from heatkv.graphs import check_has_graphs
    from heatkv.profiling.runner import images_of_rows

    positive(count=count)
    ranks = current()
    if ranks.size > 1 and (plan is None or graphs):
        raise HeatKVError(
            f"{ranks.size} processes draw together with --plan and a plan for as many ranks (heatkv solve "
            f"--ranks {ranks.size}), and without --graphs"
        )
    loaded, settings = open_model(source, running, measuring=False)
    if graphs:
        check_has_graphs(loaded.device)
    if negative is not None and not settings.guided:
        raise ModelError(f"--negative takes no part without guidance, and cfg {running.cfg:g} is none")
    wanted = _what_to_draw(loaded, label or [], prompt or [], negative)
    labels, titles = ([item for item in column for _ in range(count)] for column in zip(*wanted, strict=True))
    batch = min(len(labels), 16 if running.rows is None else images_of_rows(running.rows, settings))
    held_rows, storage = batch * settings.rows_per_image, storage_of(loaded, running.storage)
    if plan is not None and ranks.size > 1:
        loaded, chosen = _part(loaded, only_plan(plan, budget, ranking), source.model)
    elif plan is not None:
        chosen = open_plan(only_plan(plan, budget, ranking), loaded.geometry, source.model)
    else:
        if budget is None and policy != "full":
            raise HeatKVError(f"policy {policy!r} needs --budget, written 10%, 0.1, 600MiB, 2GB or 650tokens")
        problem = PlanningProblem(
            loaded.geometry, Budget.parse(budget or "100%"), open_statistics(ranking.statistics, loaded, settings),
            open_rankings(ranking.orders, loaded.geometry, source.model), running.seed, held_rows, storage,
            source.model,
        )  # fmt: skip
        chosen = make_policy(policy, **policy_options([policy], ranking)[policy]).plan(problem)
    if plan is not None:
        say_bytes(chosen, str(plan), held_rows, storage)
    _draw(loaded, settings, labels, titles, chosen, batch, out, graphs, running)


def _part(model: Loaded, path: Path, name: str) -> tuple[Loaded, CachePlan]:
    """This rank's part of the model, and its plan."""
    from heatkv.models.tensor_parallel import shard_model

    ranks = current()
    plan = open_either(path, model.geometry, name)
    size = plan.ranks if isinstance(plan, RankedPlan) else 1
    if not isinstance(plan, RankedPlan) or size != ranks.size:
        raise PlanError(
            f"{path} is for {size} rank{'s' * (size > 1)}, and {ranks.size} processes were started; solve one for "
            f"{ranks.size} (heatkv solve --ranks {ranks.size}) or start as many as it is for"
        )
    return shard_model(model, ranks, plan.heads[ranks.rank]), plan.plans[ranks.rank]


def _draw(
    model: Loaded,
    settings: Settings,
    labels: list[Any],
    titles: list[str],
    plan: CachePlan,
    batch: int,
    out: Path,
    graphs: bool,
    running: Running,
) -> None:
    """Draw and write the pictures; of several ranks, which draw them together, the first one writes and tells."""
    from heatkv.compensation import compensation_of, kind_of
    from heatkv.generation import draw_batches
    from heatkv.images import image_grid
    from heatkv.selecting_cache import check_cache

    ranks = current()
    writes = ranks.first

    def told(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return progress(what, total) if writes else nullcontext(lambda count: None)

    compensation = None
    if kind_of(plan) is not None:
        with told("fitting corrections", len(plan.schedule)) as advance:
            compensation = compensation_of(model, plan, seed=running.seed, settings=settings, progress=advance)
    check_cache(plan, model.compute_dtype, model.device, running.storage, running.attention)
    folder = make_folder(out) if writes else out
    done = replaced = 0
    with told("drawing", len(labels)) as advance:
        for images in draw_batches(
            model, labels, plan, seed=running.seed, batch=batch, settings=settings, compensation=compensation,
            storage=running.storage, attention=running.attention, graphs=graphs,
        ):  # fmt: skip
            for image in images if writes else ():
                path = folder / f"{done:04d}_{titles[done]}.png"
                replaced += path.exists()
                with replacing(path) as temporary:
                    image_grid(image[None], 1).save(temporary, format="PNG")
                done += 1
            advance(len(images))
    if not writes:
        return
    held = plan.bytes(batch * settings.rows_per_image, storage_of(model, running.storage)) / 2**20
    where = f"{folder} ({replaced} in place of older ones)" if replaced else f"{folder}"
    extra = "" if compensation is None else f" and its corrections {compensation.bytes / 2**20:.2f} MiB"
    each = f" on each of {ranks.size} ranks" if ranks.size > 1 else ""
    took = f"{plan.policy}, the cache took {held:.2f} MiB for {batch} at a time{each}{extra}"
    say(f"written: {done} images in {where}; {took}")


def _what_to_draw(model: Loaded, labels: list[str], prompts: list[str], negative: str | None) -> list[tuple[Any, str]]:
    """(what to draw it from, name for its file) of every label or prompt."""
    if isinstance(model, ClassConditionalModel):
        if prompts or negative is not None:
            raise ModelError(f"{model.name} draws classes, not prompts; name them with --label")
        if not labels:
            raise ModelError(f"name what {model.name} is to draw with --label")
        chosen = [model.label(text) for text in labels]
        return [(index, model.class_names[index] if model.class_names else str(index)) for index in chosen]
    if labels:
        raise ModelError(f"{model.name} draws prompts, not classes; write them with --prompt")
    if not prompts or not all(text.strip() for text in prompts):
        raise ModelError(f"write what {model.name} is to draw with --prompt")
    encoded = model.prompts(prompts, None if negative is None else [negative] * len(prompts))
    return list(zip(encoded, (file_name(text)[:40] for text in prompts), strict=True))
