"""`heatkv generate`: images drawn under a budget; several ranks share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heatkv.cli.opening import Opened, make_plan, make_policies, open_model, open_statistics
from heatkv.cli.options import (
    AsJson,
    OutFolder,
    Planning,
    Rows,
    Running,
    Seed,
    Source,
    count_of,
    decimal_of,
    settings_of,
    share_of,
)
from heatkv.cli.output import SCREEN, say, show
from heatkv.core.io import check_place, file_name, make_folder, replacing
from heatkv.core.plan import CachePlan
from heatkv.core.plan_file import load_plan
from heatkv.core.schema import seed_of, whole
from heatkv.engine.open_cache import check_cache
from heatkv.errors import FormatError, HeatKVError, ModelError, RanksError
from heatkv.generation.batches import AT_ONCE, draw_batches, images_under
from heatkv.generation.graphs import check_has_graphs
from heatkv.generation.images import image_grid
from heatkv.generation.micro_batches import images_that_fit
from heatkv.models.catalogue import model_info
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.parallel.ranks import current
from heatkv.parallel.reporter import shared_progress

if TYPE_CHECKING:
    from torch import Tensor

    from heatkv.online.following import FollowingGenerator

FOLLOW = {
    "every": count_of, "half_life": decimal_of, "adopt_above": share_of, "memory": lambda text, name: text,
    "save": lambda text, name: Path(text),
}  # fmt: skip


def generate(
    context: typer.Context,
    *,
    out: OutFolder,
    label: Annotated[list[str] | None, typer.Option("--label", help="class name or number; may be repeated")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="text (Infinity); may be repeated")] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="negative prompt of all prompts")] = None,
    source: Source,
    planning: Planning,
    count: Annotated[int, typer.Option("--count", help="images per label")] = 1,
    rows: Rows = None,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="record every scale as a CUDA graph and replay it (CUDA)")
    ] = False,
    follow: Annotated[
        str | None,
        typer.Option(
            "--follow", metavar="every=N[,half-life=32][,adopt-above=5%][,memory=64MiB][,save=FILE]",
            help="measure every so many-th image and let the plan follow (docs/online.md): a measured image weighs "
            "half after half-life more, a plan is adopted that gains more than adopt-above, measuring takes memory "
            "beside the cache (default: in its place), and the statistics are saved",
        ),
    ] = None,
    seed: Seed = 0,
    running: Running,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Draw images under a budget. Shares them over the ranks that torchrun starts.

    Example: heatkv generate --policy streaming --budget 20% --label pizza --label star --out pictures
    """
    seed_of(seed, HeatKVError)
    whole(count, "count", HeatKVError, 1)
    following = None if follow is None else _check_following(follow, planning, graphs)
    opened = open_model(source, running, _texts(source.model, prompt or [], negative))
    if graphs:
        check_has_graphs(opened.model.device)
    wanted = _what_to_draw(opened, label or [], prompt or [], negative)
    labels, titles = ([item for item in column for _ in range(count)] for column in zip(*wanted, strict=True))
    attention, batch = context.obj.attention, _images_at_once(len(labels), rows, planning.plan, opened)
    follower = None if following is None else _follower(opened, planning, batch, seed, attention, following)
    held_rows = batch * opened.settings.rows_per_image
    plan = follower.plan if follower is not None else make_plan(
        planning, "full", opened.model.geometry, source.model, lambda path: open_statistics(path, opened),
        seed=seed, rows=held_rows, storage=opened.storage,
    )  # fmt: skip
    check_cache(plan, opened.model.compute_dtype, opened.model.device, opened.storage.code, attention)
    folder, save = make_folder(out), None if following is None else following.get("save")
    if follower is not None:
        replaced = _write_followed(follower, labels, titles, folder, save)
    else:
        options = {"seed": seed, "batch": batch, "attention": attention, "graphs": graphs}
        replaced = _write_shared(opened, labels, titles, folder, plan, options)
    facts = {
        "out": str(folder), "images": len(labels), "images_at_once": batch, "policy": plan.policy,
        "cache_bytes": plan.bytes(held_rows, str(opened.storage)),
        "following": None if follower is None else _followed(follower),
    }  # fmt: skip
    _say_written(facts, replaced, as_json)


def _say_written(facts: dict[str, Any], replaced: int, as_json: bool) -> None:
    where = f"{facts['out']} ({replaced} in place of older ones)" if replaced else facts["out"]
    took = f"the cache took {facts['cache_bytes'] / 2**20:.2f} MiB for {facts['images_at_once']} at a time"
    say(f"written: {facts['images']} images in {where}; {facts['policy']}, {took}")
    if as_json:
        show(None, True, facts)


def _images_at_once(count: int, rows: int | None, plan: Path | None, opened: Opened) -> int:
    """Images in a batch: as many as fit the rows; else AT_ONCE, or what memory has room for under a finished plan or
    with the full cache, so that every rank has some."""
    from heatkv.profiling.measure.subjects import images_of_rows

    if rows is not None:
        return min(count, images_of_rows(rows, opened.settings))
    geometry, each, storage = opened.model.geometry, opened.settings.rows_per_image, str(opened.storage)
    if plan is not None:
        fitting = images_under(opened.model, load_plan(plan, geometry.head_dim), each, storage)
    else:
        fitting = images_that_fit(opened.model, each, AT_ONCE, geometry.full_bytes(each, storage))
    every_rank: list[int] = current().gather(fitting)
    return min(*every_rank, -(-count // current().size))


def _texts(model: str, prompts: list[str], negative: str | None) -> list[str]:
    """What is encoded before the model's weights are read."""
    drawn = prompts if model_info(model).family == "infinity" else []
    return [*drawn, negative] if drawn and negative is not None else drawn


def _what_to_draw(opened: Opened, labels: list[str], prompts: list[str], negative: str | None) -> list[tuple[Any, str]]:
    """(what to draw it from, name for its file) of every label or prompt."""
    model = opened.model
    if isinstance(model, ClassConditionalModel):
        if not labels or prompts or negative is not None:
            raise ModelError(f"{model.name} draws classes, not prompts: name them with --label")
        chosen = [model.label(text) for text in labels]
        return [(index, model.class_names[index] if model.class_names else str(index)) for index in chosen]
    if labels or not prompts or not all(text.strip() for text in prompts):
        raise ModelError(f"{model.name} draws prompts, not classes: write them with --prompt")
    if negative is not None and not opened.settings.guided:
        raise ModelError("a negative prompt takes no part without guidance; leave --negative out, or raise --cfg")
    against = None if negative is None else model.examples[-1].features_ME
    encoded = (replace(prompt, negative_ME=against) for prompt in model.examples[: len(prompts)])
    return list(zip(encoded, (file_name(text)[:40] for text in prompts), strict=True))


def _write_shared(
    opened: Opened,
    labels: Sequence[Any],
    titles: Sequence[str],
    folder: Path,
    plan: CachePlan,
    options: dict[str, Any],
) -> int:
    """Draw and write the images that fall to this rank, in the batches that one process would draw; how many older ones
    all ranks replaced."""
    batch, mine = options["batch"], current().share_of(range(0, len(labels), options["batch"]), current().rank)
    drawn: Iterable[Tensor] = ()
    first = mine[0] if mine else 0
    if mine:
        part = labels[first : mine[-1] + batch]
        batches = draw_batches(
            opened.model, part, plan, first_sample=first, settings=opened.settings, code=opened.storage.code,
            **options,
        )  # fmt: skip
        drawn = (image for images in batches for image in images)
    return _write(drawn, first, titles, folder)


def _write(drawn: Iterable[Tensor], first: int, titles: Sequence[str], folder: Path) -> int:
    """Write the pictures as they are drawn, that of this number and those after it; how many older ones all ranks
    replaced."""
    replaced, written = 0, 0
    try:
        with shared_progress(SCREEN, "drawing", len(titles)) as advance:
            for index, image in enumerate(drawn, first):
                path = folder / f"{index:04d}_{titles[index]}.png"
                replaced += path.exists()
                with replacing(path) as temporary:
                    image_grid(image[None], 1).save(temporary, format="PNG")
                written += 1
                advance(1)
            current().wait()
    except BaseException:
        if written:
            say(f"written before it ended: {written} of {len(titles)} images in {folder}")
        raise
    return sum(current().gather(replaced))


# ---------------------------------------------------------------------------------------------- a plan that follows


def _check_following(text: str, planning: Planning, graphs: bool) -> dict[str, Any]:
    """What --follow says. Raises HeatKVError for what does not go with it."""
    settings = settings_of(text.split(","), "--follow", FOLLOW)
    if "every" not in settings:
        raise HeatKVError(f"--follow {text} does not say how often images are measured; write every=16")
    if current().size > 1:
        raise RanksError("--follow needs all images in one process, one after another; start it without torchrun")
    if planning.plan is not None or graphs or planning.statistics is None or planning.budget is None:
        raise HeatKVError("--follow makes plans as it goes: give --policy, --budget and --statistics, no --plan or "
                          "--graphs")  # fmt: skip
    if "save" in settings:
        if settings["save"].exists():
            raise FormatError(f"{settings['save']} exists; save the statistics to another file")
        check_place(settings["save"])
    return settings


def _follower(
    opened: Opened, planning: Planning, batch: int, seed: int, attention: str, settings: dict[str, Any]
) -> FollowingGenerator[Any]:
    """What draws under a plan that follows."""
    from heatkv.online.adoption import check_can_follow
    from heatkv.online.following import FollowingGenerator

    assert planning.statistics is not None
    assert planning.budget is not None
    (policy,) = make_policies([planning.policy or "heatkv"], planning)
    names = {"every": "every", "half_life": "half_life", "adopt_above": "threshold", "memory": "memory"}
    return FollowingGenerator(
        opened.model, check_can_follow(policy), planning.budget, open_statistics(planning.statistics, opened),
        batch=batch, seed=seed, settings=opened.settings, code=opened.storage.code, attention=attention,
        **{names[name]: value for name, value in settings.items() if name in names},
    )  # fmt: skip


def _write_followed(
    follower: FollowingGenerator[Any], labels: Sequence[Any], titles: Sequence[str], folder: Path, save: Path | None
) -> int:
    """Draw and write all images; what was followed is kept also when that ends early. How many older ones were
    replaced."""
    try:
        replaced = _write(follower.draw(labels), 0, titles, folder)
    finally:
        if save is not None and follower.events:
            follower.statistics.save(save)
            say(f"written: {save}, statistics with {sum(event.measured for event in follower.events)} images more")
    say(
        "followed: {measured} images measured, {solved} plans solved, {adopted} adopted; that took "
        "{share_of_drawing:.0%} of the time of drawing".format(**follower.summary())
    )
    return replaced


def _followed(follower: FollowingGenerator[Any]) -> dict[str, Any]:
    """What following did, in JSON's types."""
    return follower.summary() | {"events": [event.to_json() for event in follower.events]}
