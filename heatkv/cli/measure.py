"""`heatkv profile`, memory and time of policies side by side on one model, and `heatkv compare`, the main job, which
also measures what is lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Group

from heatkv.cli.opening import Opened, make_policies, open_model, open_plan, open_rankings, open_statistics
from heatkv.cli.options import (
    AsJson,
    MeasuredSource,
    OutFolder,
    Ranking,
    Repeats,
    Running,
    Sweep,
    count_of,
    names_of,
)
from heatkv.cli.output import SCREEN, say, show
from heatkv.core.budget import Budget
from heatkv.parallel.ranks import current
from heatkv.policies.base import EvictionPolicy
from heatkv.registry import registered_policies

if TYPE_CHECKING:
    from heatkv.profiling.results.row import Results

Arguments = tuple[Any, list[EvictionPolicy], list[Budget]]


def profile(
    context: typer.Context,
    *,
    out: OutFolder,
    source: MeasuredSource,
    sweep: Sweep,
    ranking: Ranking,
    repeats: Repeats = 10,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", help="folder for traces of torch's profiler, for TensorBoard and Perfetto; on CUDA the "
            "allocator's history (pickle) goes to --out",
        ),
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option("--in-process", help="a quick look: memory in this process, not a fresh one for every figure"),
    ] = False,
    running: Running,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Memory and latency of every policy at every budget, with every --rows and --seed; goes on where it was stopped.

    Example: heatkv profile --model emoji --policies streaming --budgets 20%,10% --rows 2,8 --out results/profile
    """
    from heatkv.profiling.comparison import PROFILED
    from heatkv.profiling.comparison import profile as run
    from heatkv.profiling.report.tables import DEVICE, LATENCY, PLANNED, RESULTS, terminal_table

    arguments, options = _arguments(source, sweep, ranking, running, PROFILED)
    results = run(
        *arguments, out=out, in_process=in_process, trace=trace, repeats=repeats, attention=context.obj.attention,
        snapshot=trace is not None and arguments[0].device.type == "cuda", **options,
    )  # fmt: skip
    title = _title(results)
    tables = (
        terminal_table(results.rows, (*PLANNED, *DEVICE), f"{title}: memory"),
        terminal_table(results.rows, LATENCY, f"{title}: time"),
        terminal_table(results.rows, RESULTS, title),
    )  # fmt: skip
    show(Group(*tables), as_json, msgspec.to_builtins(results))
    say(f"written: {out}" + ("" if trace is None else f", and traces: {trace} (tensorboard --logdir {trace})"))


def compare(
    context: typer.Context,
    *,
    out: OutFolder,
    source: MeasuredSource,
    sweep: Sweep,
    ranking: Ranking,
    samples: Annotated[
        int, typer.Option("--samples", help="images to calibrate on, when no statistics are given")
    ] = 64,
    images: Annotated[int, typer.Option("--images", help="images whose logits are compared (KL, top-1)")] = 32,
    pictures: Annotated[
        int | None,
        typer.Option("--pictures", help="of them, images drawn freely (PSNR, SSIM); default 16 at most"),
    ] = None,
    repeats: Repeats = 5,
    running: Running,
    as_json: AsJson = False,
) -> None:
    """The main job: calibrate if needed, plan, draw, measure; a table, results.json, pictures and report.html. It
    goes on where it was stopped, and shares comparisons over the ranks that torchrun starts.

    Example: heatkv compare --model emoji --policies heatkv,streaming --budgets 20%,10% --out results/compare
    """
    from heatkv.profiling.comparison import COMPARED
    from heatkv.profiling.comparison import compare as run
    from heatkv.profiling.report.tables import RESULTS, terminal_table

    arguments, options = _arguments(source, sweep, ranking, running, COMPARED)
    results = run(
        *arguments, out=out, samples=samples, images=images, pictures=pictures, repeats=repeats,
        attention=context.obj.attention, **options,
    )  # fmt: skip
    if not current().first:
        return
    asked = results.request
    title = f"{_title(results)}, KL and top-1 over {asked.images} images, PSNR and SSIM over {asked.pictures}"
    show(terminal_table(results.rows, RESULTS, title), as_json, msgspec.to_builtins(results))
    say(f"written: {out}")


def _arguments(
    source: MeasuredSource, sweep: Sweep, ranking: Ranking, running: Running, default: tuple[str, ...]
) -> tuple[Arguments, dict[str, Any]]:
    """What `heatkv.profile` and `heatkv.compare` are called with; names and numbers are read before the model is."""
    from heatkv.profiling.measure.subjects import images_of_rows

    if sweep.policies is None:
        names = ["full"] if sweep.plan else list(default)
    else:
        names = list(registered_policies()) if sweep.policies.strip() == "all" else names_of(sweep.policies, "policy")
    policies = make_policies(names, ranking)
    budgets = [Budget.parse(text) for text in names_of(sweep.budgets, "budget")]
    seeds = [count_of(text, "--seed") for text in names_of(sweep.seed, "seed")]
    rows = [count_of(text, "--rows") for text in names_of(sweep.rows, "rows")] if sweep.rows is not None else []
    opened = open_model(source, running)
    model, settings = opened.model, opened.settings
    rows = rows or [settings.rows_per_image]
    return (model, policies, budgets), {
        "batches": [images_of_rows(count, settings) for count in rows], "seeds": seeds, "settings": settings,
        "plans": _plans(sweep.plan or [], opened, source.model, rows), "code": opened.storage.code,
        "statistics": None if ranking.statistics is None else open_statistics(ranking.statistics, opened),
        "rankings": open_rankings(ranking.orders, model.geometry, source.model, policies),
        "loading": opened.loading, "reporter": SCREEN,
    }  # fmt: skip


def _plans(paths: list[Path], opened: Opened, model: str, rows: list[int]) -> dict[str, Any]:
    """The plans by the names of their files, or their paths where two files have one name."""
    names = [path.name for path in paths]
    return {
        path.name if names.count(path.name) == 1 else str(path): open_plan(
            path, opened.model.geometry, model, rows, opened.storage
        )
        for path in paths
    }


def _title(results: Results) -> str:
    """The model, and how it runs."""
    first = results.rows[0]
    rows = " and ".join(str(rows) for rows in dict.fromkeys(row.rows for row in results.rows))
    return f"{first.model}: cache of {rows} rows in {first.storage} on {results.environment.device}"
