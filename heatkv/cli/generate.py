"""`heatkv generate`: images drawn under a budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heatkv.cli.opening import (
    Loaded,
    check_plan_alone,
    open_model,
    open_plan,
    open_rankings,
    open_statistics,
    positive,
    say_bytes,
    storage_of,
)
from heatkv.cli.options import AsJson, BudgetText, Following, OutFolder, Policy, Ranking, Running, Source, Without
from heatkv.cli.output import make_folder, progress, say
from heatkv.cli.settings import policy_options
from heatkv.core.budget import Budget
from heatkv.core.io import check_place, file_name, replacing
from heatkv.core.plan import CachePlan
from heatkv.core.schema import shown
from heatkv.errors import BudgetError, FormatError, HeatKVError, ModelError
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import Settings
from heatkv.policies.base import PlanningProblem, make_policy

if TYPE_CHECKING:
    from torch import Tensor

    from heatkv.online.following import FollowingGenerator

DEFAULT_POLICY = "full"


def generate(
    *,
    out: OutFolder,
    label: Annotated[list[str] | None, typer.Option("--label", help="class name or number; may be repeated")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="text (Infinity); may be repeated")] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="negative prompt of all prompts")] = None,
    source: Annotated[Source, Without("prompts")],
    policy: Policy = None,
    budget: BudgetText = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="plan.json of `heatkv solve`")] = None,
    ranking: Ranking,
    count: Annotated[int, typer.Option("--count", help="images per label")] = 1,
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="record every scale as a CUDA graph and replay it (CUDA)")
    ] = False,
    following: Following,
    running: Running,
    as_json: AsJson = False,
) -> None:
    """Draw images under a budget.

    Example: heatkv generate --policy streaming --budget 20% --label pizza --label star --out pictures
    """
    from heatkv.engine.open_cache import check_cache
    from heatkv.generation.graphs import check_has_graphs
    from heatkv.generation.loop import draw_batches
    from heatkv.profiling.measure.subjects import images_of_rows

    positive(count=count)
    following_on = following.follow_every is not None
    if following_on and (plan is not None or graphs):
        raise HeatKVError(
            "--follow-every makes plans as it goes: give --policy, --budget and --statistics, no --plan or --graphs"
        )
    if following.save_statistics is not None:
        if following.save_statistics.exists():
            raise FormatError(f"{following.save_statistics} exists; name another file (--save-statistics)")
        check_place(following.save_statistics)
    loaded, settings = open_model(source, running, measuring=False)
    if graphs:
        check_has_graphs(loaded.device)
    if negative is not None and not settings.guided:
        raise ModelError(f"--negative takes no part without guidance, and cfg {running.cfg:g} is none")
    wanted = _what_to_draw(loaded, label or [], prompt or [], negative)
    labels, titles = ([item for item in column for _ in range(count)] for column in zip(*wanted, strict=True))
    batch = min(len(labels), 16 if running.rows is None else images_of_rows(running.rows, settings))
    held_rows, storage = batch * settings.rows_per_image, storage_of(loaded, running.storage)
    follower: FollowingGenerator[Any] | None = None
    if following_on:
        follower = _follower(loaded, settings, policy, budget, batch, ranking, following, running)
        chosen: CachePlan = follower.plan
    elif plan is not None:
        check_plan_alone(policy, budget, ranking)
        chosen = open_plan(plan, loaded.geometry, source.model)
    else:
        named = policy or DEFAULT_POLICY
        made = make_policy(named, **policy_options([named], ranking)[named])
        if budget is None and named != DEFAULT_POLICY:
            raise HeatKVError(f"policy {named!r} needs --budget, written 10%, 0.1, 600MiB, 2GB or 650tokens")
        problem = PlanningProblem(
            loaded.geometry, Budget.parse(budget or "100%"), open_statistics(ranking.statistics, loaded, settings),
            open_rankings(ranking.orders, loaded.geometry, source.model), running.seed, held_rows, storage,
            source.model,
        )  # fmt: skip
        chosen = made.plan(problem)
    if plan is not None:
        say_bytes(chosen, str(plan), held_rows, storage)
    check_cache(chosen, loaded.compute_dtype, loaded.device, running.storage, running.attention)
    folder = make_folder(out)
    if follower is not None:
        drawn: Iterable[Tensor] = follower.draw(labels)
    else:
        batches = draw_batches(
            loaded, labels, chosen, seed=running.seed, batch=batch, settings=settings, code=running.storage,
            attention=running.attention, graphs=graphs,
        )  # fmt: skip
        drawn = (image for images in batches for image in images)
    try:
        replaced = _write(drawn, titles, folder)
    except BaseException:
        if follower is not None and follower.events:
            _save_followed(follower, following)
        raise
    held = chosen.bytes(held_rows, storage) / 2**20
    where = f"{folder} ({replaced} in place of older ones)" if replaced else f"{folder}"
    took = f"{chosen.policy}, the cache took {held:.2f} MiB for {batch} at a time"
    say(f"written: {len(labels)} images in {where}; {took}")
    told = None if follower is None else _told_of(follower, following)
    if as_json:
        facts = {
            "out": str(folder), "images": len(labels), "images_at_once": batch, "policy": chosen.policy,
            "cache_bytes": chosen.bytes(held_rows, storage), "following": told,
        }  # fmt: skip
        print(json.dumps(facts, indent=1))


def _write(drawn: Iterable[Tensor], titles: Sequence[str], folder: Path) -> int:
    """Write the pictures as they are drawn; how many older ones they replaced."""
    from heatkv.generation.images import image_grid

    replaced, written = 0, 0
    try:
        with progress("drawing", len(titles)) as advance:
            for index, image in enumerate(drawn):
                path = folder / f"{index:04d}_{titles[index]}.png"
                replaced += path.exists()
                with replacing(path) as temporary:
                    image_grid(image[None], 1).save(temporary, format="PNG")
                written += 1
                advance(1)
    except BaseException:
        if written:
            say(f"written before it ended: {written} of {len(titles)} images in {folder}")
        raise
    return replaced


def _save_followed(follower: FollowingGenerator[Any], following: Following) -> None:
    """The statistics that the plan followed go where they are to be."""
    if following.save_statistics is not None:
        follower.statistics.save(following.save_statistics)
        more = sum(event.measured for event in follower.events)
        say(f"written: {following.save_statistics}, statistics with {more} images more")


def _told_of(follower: FollowingGenerator[Any], following: Following) -> dict[str, Any]:
    """What following did, said and as JSON; its statistics are saved where they are to be."""
    summary = follower.summary()
    _save_followed(follower, following)
    say(
        "followed: {measured} images measured, {solved} plans solved, {adopted} adopted; that took "
        "{share_of_drawing:.0%} of the time of drawing".format(**summary)
    )
    return summary | {"events": [event.to_json() for event in follower.events]}


def _follower(
    loaded: Loaded,
    settings: Settings,
    policy: str | None,
    budget: str | None,
    batch: int,
    ranking: Ranking,
    following: Following,
    running: Running,
) -> FollowingGenerator[Any]:
    """What draws under a plan that follows."""
    from heatkv.online.adoption import check_can_follow
    from heatkv.online.following import FollowingGenerator

    named = policy or DEFAULT_POLICY
    made = check_can_follow(make_policy(named, **policy_options([named], ranking)[named]))
    statistics = open_statistics(ranking.statistics, loaded, settings)
    if statistics is None:
        raise HeatKVError("a plan that follows begins with --statistics; measure some with heatkv calibrate")
    if budget is None:
        raise HeatKVError("a plan that follows needs --budget, written 10%, 0.1, 600MiB, 2GB or 650tokens")
    assert following.follow_every is not None
    given: dict[str, Any] = {} if following.half_life is None else {"half_life": following.half_life}
    if following.adopt_above is not None:
        try:
            share = Budget.parse(following.adopt_above)
        except BudgetError:
            share = None
        if share is None or share.kind != "share":
            raise HeatKVError(f"--adopt-above {shown(following.adopt_above)} is no share; write 5% or 0.05")
        given["threshold"] = float(share.amount)
    return FollowingGenerator(
        loaded, made, budget, statistics,
        every=following.follow_every, batch=batch, seed=running.seed, settings=settings,
        memory=following.measuring_memory, storage=running.storage, attention=running.attention, **given,
    )  # fmt: skip


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
