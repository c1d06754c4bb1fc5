"""`heatkv calibrate`: statistics of a model into a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from heatkv.cli.calibration_run import (
    LEVEL_SAMPLES,
    MOST_AT_ONCE,
    CalibrationRun,
    LevelCosts,
    agreement_of_halves,
    batches_of,
    check_left,
    to_be_continued,
)
from heatkv.cli.opening import Loaded, open_model, parse_names, positive, storage_of
from heatkv.cli.options import AsJson, Resume, Running, Source, Without
from heatkv.cli.output import progress, say, show
from heatkv.core.budget import Budget
from heatkv.core.io import check_place
from heatkv.core.levels import SINK_SCALES
from heatkv.core.statistics import COSTS, Statistics
from heatkv.errors import FormatError, HeatKVError, StatisticsError
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.parallel.ranks import current
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import HeatKV
from heatkv.policies.lp import HeatKVLP

if TYPE_CHECKING:
    from heatkv.profiling.analysis.stability import Agreement

REPORTED_POLICIES = (HeatKV(), HeatKVLP(value="error"))
REPORTED_BUDGET = "20%"


def _level_sinks(before: Statistics | None, out: Path, model: ImageModel[Any], cost: str, wanted: int | None) -> int:
    """The sinks that level costs are to be measured with: the file's own where it has such costs, and no others."""
    from heatkv.calibration.level_costs import level_choices

    found = None if before is None else before.levels
    if found is None:
        return level_choices(model.geometry.schedule, SINK_SCALES if wanted is None else wanted).sink_scales
    if found.cost != cost:
        raise StatisticsError(f"{out} has level costs of the kind {found.cost!r}; measure {cost!r} into another file")
    sinks = found.choices.sink_scales
    if wanted not in (None, sinks):
        raise StatisticsError(
            f"{out} has level costs with sink_scales={sinks}, not {wanted}; leave --sink-scales out, or measure into "
            "another file"
        )
    return sinks


def _calibration_table(statistics: Statistics, agreement: Sequence[float] | None) -> Table:
    table = Table(
        "source scale", "tokens", "mean S-CAS", "Gini over heads", "rank agreement of halves", title="calibration"
    )
    gini, mean = statistics.gini(), statistics.scas.mean(axis=(0, 1))
    for scale, (_, height, width) in enumerate(statistics.schedule.scales[:-1]):
        table.add_row(
            str(scale), f"{height}x{width}", f"{mean[scale]:.4f}", f"{gini[scale]:.3f}",
            "-" if agreement is None else f"{agreement[scale]:.3f}",
        )  # fmt: skip
    table.caption = f"{statistics.count} samples of {statistics.provenance.model}"
    if statistics.levels is not None:
        levels = statistics.levels
        table.caption += (
            f"; level costs ({levels.cost}) of {len(levels.samples)}, with {levels.choices.sink_scales} sink scales or "
            "more"
        )
    return table


def calibrate(
    *,
    out: Annotated[Path, typer.Option("--out", help="statistics file to write")],
    source: Source,
    samples: Annotated[int, typer.Option("--samples", help="images to measure, all classes in turn")] = 64,
    levels: Annotated[
        str | None, typer.Option("--levels", help="also measure what coarser levels cost (heatkv-mr): error or fisher")
    ] = None,
    level_samples: Annotated[
        int | None, typer.Option("--level-samples", help=f"images to measure levels on (default {LEVEL_SAMPLES})")
    ] = None,
    sink_scales: Annotated[
        int | None,
        typer.Option(
            "--sink-scales",
            help="first scales that level costs take as whole, the fewest that plans from them can have; default: "
            f"{SINK_SCALES}, or the file's with --append",
        ),
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="add samples to an existing file")] = False,
    resume: Resume = False,
    report: Annotated[
        bool, typer.Option("--report", help="tell how many samples are enough, from halves of the new ones")
    ] = False,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="of the plans that --report compares, separated by commas (20%)")
    ] = None,
    running: Annotated[Running, Without("rows"), Without("storage"), Without("attention")],
    as_json: AsJson = False,
) -> None:
    """Measure how much every head looks back at every scale; writes a statistics file. Shares its batches over the
    ranks that torchrun starts.

    Example: heatkv calibrate --model emoji --samples 64 --out statistics.safetensors
    """
    from heatkv.profiling.analysis.stability import batch_sizes

    level_images = LEVEL_SAMPLES if level_samples is None else level_samples
    positive(samples=samples, level_samples=level_images)
    if levels is not None and levels not in COSTS:
        raise HeatKVError(f"--levels is {levels!r}; level costs are of the kinds {' and '.join(COSTS)}")
    for name, value in (("level-samples", level_samples), ("sink-scales", sink_scales)):
        if levels is None and value is not None:
            raise HeatKVError(
                f"--{name} are those of level costs; say which to measure with --levels error or fisher, or leave it "
                "out"
            )
    if budgets is not None and not report:
        raise HeatKVError("--budgets are those of the plans that --report compares; give both or neither")
    if report and samples < 2:
        raise HeatKVError("--report compares two halves of the new samples; take at least 2 (--samples)")
    wanted = [Budget.parse(text) for text in parse_names(budgets or REPORTED_BUDGET, "budget")]
    if out.is_dir():
        raise FormatError(f"--out {out} is a folder; name a file")
    there = out.exists()
    if there and not append and not resume:
        raise FormatError(f"{out} exists; add samples to it with --append or name another file")
    if append and not there:
        raise FormatError(f"{out} does not exist; leave --append out to create it")
    check_place(out)
    loaded, settings = open_model(source, running)
    compared = _Compared(loaded, settings, wanted) if report else None
    before = to_be_continued(out, loaded, settings) if there else None
    asked = {
        "samples": samples, "seed": running.seed, "levels": levels, "level-samples": level_samples,
        "sink-scales": sink_scales, "append": append, "report": report,
    }  # fmt: skip
    base = before if append else None
    sinks = 0 if levels is None else _level_sinks(base, out, loaded, levels, sink_scales)
    batches = batches_of(samples) if compared is None else batch_sizes(samples, MOST_AT_ONCE)
    of_levels = None if levels is None else LevelCosts(levels, sinks, level_images)
    run = CalibrationRun(out, loaded, settings, asked, running.seed, batches, base, of_levels)
    total: Statistics | None
    parts: list[Statistics] | None
    if run.is_finished(check_left(run.parts, resume), before):
        total, parts = before, run.left_masses()
        say(f"{out} was finished before: nothing is measured")
    else:
        if before is not base:
            raise FormatError(f"{out} exists, and no run that writes it was stopped; add samples to it with --append")
        total, parts = run.measure()
        run.write(total)
    try:
        if current().first:
            assert total is not None
            _tell(out, total, parts, compared, as_json)
    finally:
        run.close()


def _tell(
    out: Path, total: Statistics, parts: Sequence[Statistics] | None, compared: _Compared | None, as_json: bool
) -> None:
    """The result, on screen; without the parts nothing is known of halves."""
    from heatkv.profiling.analysis.stability import ENOUGH_LOSS, enough, verdict
    from heatkv.profiling.report.tables import stability_tables

    agreement = None if parts is None else agreement_of_halves(parts)
    gini = total.gini().tolist()
    data = {
        "out": str(out), "samples": total.count, "gini": gini, "rank_agreement_of_halves": agreement,
        "levels": None if total.levels is None else total.levels.header(),
    }  # fmt: skip
    table = _calibration_table(total, agreement)
    if compared is None or parts is None:
        show(table, as_json, data)
        return
    found = compared.agreements(parts)
    data["report"] = {
        "halves": [agreement.to_json() for agreement in found],
        "largest_loss": ENOUGH_LOSS, "enough_samples": enough(found), "verdict": verdict(found),
    }  # fmt: skip
    show(Group(table, *stability_tables(found), verdict(found)), as_json, data)


class _Compared:
    """What --report compares: plans of the policies that rank by statistics, at these budgets."""

    def __init__(self, model: Loaded, settings: Settings, budgets: Sequence[Budget]) -> None:
        rows, storage = settings.rows_per_image, storage_of(model)
        self.problems = [PlanningProblem(model.geometry, b, rows=rows, storage=storage) for b in budgets]
        for policy in REPORTED_POLICIES:
            for problem in self.problems:
                policy.check(problem)  # before hours are spent

    def agreements(self, parts: Sequence[Statistics]) -> list[Agreement]:
        from heatkv.profiling.analysis.stability import compare_halves, growing_halves

        halves = growing_halves(parts)
        found = []
        with progress("comparing halves", len(halves)) as advance:
            for one, other in halves:
                found.append(compare_halves(one, other, REPORTED_POLICIES, self.problems))
                advance(1)
        return found
