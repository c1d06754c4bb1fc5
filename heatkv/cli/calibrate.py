"""`heatkv calibrate`: statistics of a model into a file; and the same for a folder that has none yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from heatkv.cli.opening import Loaded, open_model, open_statistics, parse_names, positive, storage_of
from heatkv.cli.options import AsJson, Running, Source, Without
from heatkv.cli.output import progress, say, show
from heatkv.errors import FormatError, HeatKVError, StatisticsError
from heatkv.files import check_writable
from heatkv.geometry import Budget
from heatkv.level_statistics import COSTS, LevelStatistics
from heatkv.levels import SINK_SCALES
from heatkv.models.base import ImageModel
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import HeatKV
from heatkv.policies.lp import HeatKVLP
from heatkv.sampling import Settings
from heatkv.statistics import Statistics

if TYPE_CHECKING:
    from heatkv.profiling.stability import Agreement

MOST_AT_ONCE = 16
"""Images in a batch at most."""

LEVEL_SAMPLES = 32
"""Images that level costs are measured on."""

BIAS_SAMPLES = 16
"""Images that the biases of level costs are measured on."""

REPORTED_POLICIES = (HeatKV(), HeatKVLP(value="error"))
REPORTED_BUDGET = "20%"


def _calibrate(
    model: ImageModel[Any],
    batches: Sequence[int],
    seed: int,
    settings: Settings,
    first: int,
    before: Statistics | None,
    path: Path,
) -> list[Statistics]:
    """Statistics of every batch. With those of `before` they are saved after each, so that an interrupt loses one."""
    from heatkv.calibration import calibrate as measure

    parts: list[Statistics] = []
    total = before
    try:
        with progress(f"calibrating {model.name}", sum(batches)) as advance:
            for count in batches:
                part = measure(model, count, seed=seed, first_sample=first, batch=count, settings=settings)
                total = part if total is None else total.merge(part)
                total.save(path)
                parts.append(part)
                first += count
                advance(count)
    finally:
        kept = f"{total.count} samples" if total is not None else f"nothing yet, the first {batches[0]} were not done"
        say(f"{path}: {kept}")
    return parts


def _batches(samples: int) -> list[int]:
    """Batches alike, two at least, so that halves can be compared."""
    batch = min(MOST_AT_ONCE, -(-samples // 2))
    return [min(batch, samples - start) for start in range(0, samples, batch)]


def _level_sinks(before: Statistics | None, out: Path, model: ImageModel[Any], cost: str, wanted: int | None) -> int:
    """The sinks that level costs are to be measured with: the file's own where it has such costs, and no others."""
    from heatkv.level_calibration import level_choices

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


def _with_levels(
    statistics: Statistics,
    out: Path,
    model: ImageModel[Any],
    cost: str,
    sink_scales: int,
    samples: int,
    seed: int,
    settings: Settings,
) -> Statistics:
    """The statistics with the costs of so many more images; saved batch by batch, so that an interrupt loses one."""
    from heatkv.fisher_calibration import calibrate_fisher
    from heatkv.level_calibration import calibrate_levels

    measure = calibrate_fisher if cost == "fisher" else calibrate_levels
    found = statistics.levels
    taken = [] if found is None else [name.split(":", 2) for name in found.samples]
    first = max((int(index) + 1 for given, index, _ in taken if int(given) == seed), default=0)
    of_bias = BIAS_SAMPLES if found is None else 0
    try:
        with progress(f"level costs of {model.name}", of_bias + samples) as advance:
            for start in range(first, first + samples, measure.batch):
                part = measure(
                    model, min(measure.batch, first + samples - start), seed=seed, first_sample=start,
                    log_bias=None if found is None else found.log_bias, bias_samples=BIAS_SAMPLES,
                    sink_scales=sink_scales, settings=settings, progress=advance,
                )  # fmt: skip
                found = part if found is None else found.merge(part)
                statistics = replace(statistics, levels=found)
                statistics.save(out)
    finally:
        done = 0 if statistics.levels is None else len(statistics.levels.samples)
        say(f"{out}: level costs of {done} samples")
    return statistics


def _merged(parts: Sequence[Statistics]) -> Statistics:
    return reduce(Statistics.merge, parts)


def _agreement(parts: Sequence[Statistics]) -> list[float] | None:
    """Spearman correlation of the head rankings of two disjoint halves, per source scale."""
    from heatkv.calibration import ranking_agreement

    if len(parts) < 2:
        return None
    return [float(x) for x in ranking_agreement(_merged(parts[::2]), _merged(parts[1::2]))]


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
    report: Annotated[
        bool, typer.Option("--report", help="tell how many samples are enough, from halves of the new ones")
    ] = False,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="of the plans that --report compares, separated by commas (20%)")
    ] = None,
    running: Annotated[Running, Without("rows"), Without("storage"), Without("attention")],
    as_json: AsJson = False,
) -> None:
    """Measure how much every head looks back at every scale; writes a statistics file.

    Example: heatkv calibrate --model emoji --samples 64 --out statistics.safetensors
    """
    from heatkv.profiling.report import stability_tables
    from heatkv.profiling.stability import ENOUGH_LOSS, batch_sizes, enough, verdict

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
    if out.exists() and not append:
        raise FormatError(f"{out} exists; add samples to it with --append or name another file")
    if append and not out.exists():
        raise FormatError(f"{out} does not exist; leave --append out to create it")
    if not out.parent.is_dir():
        raise FormatError(f"the folder {out.parent} does not exist")
    check_writable(out.parent)
    loaded, settings = open_model(source, running)
    compared = _Compared(loaded, settings, wanted) if report else None
    before = _to_be_continued(out, loaded, settings) if append else None
    sinks = 0 if levels is None else _level_sinks(before, out, loaded, levels, sink_scales)
    taken = [] if before is None else [s.split(":", 2) for s in before.provenance.samples]
    first = max((int(index) + 1 for given, index, _ in taken if int(given) == running.seed), default=0)
    batches = _batches(samples) if compared is None else batch_sizes(samples, MOST_AT_ONCE)
    parts = _calibrate(loaded, batches, running.seed, settings, first, before, out)
    total = _merged(parts if before is None else [before, *parts])
    if levels is not None:
        total = _with_levels(total, out, loaded, levels, sinks, level_images, running.seed, settings)
    agreement = _agreement(parts)
    gini = total.gini().tolist()
    data = {
        "out": str(out), "samples": total.count, "gini": gini, "rank_agreement_of_halves": agreement,
        "levels": None if total.levels is None else total.levels.header(),
    }  # fmt: skip
    table = _calibration_table(total, agreement)
    if compared is None:
        show(table, as_json, data)
        return
    found = compared.agreements(parts)
    data["report"] = {
        "halves": [agreement.to_json() for agreement in found],
        "largest_loss": ENOUGH_LOSS, "enough_samples": enough(found), "verdict": verdict(found),
    }  # fmt: skip
    show(Group(table, *stability_tables(found), verdict(found)), as_json, data)


def _to_be_continued(path: Path, model: ImageModel[Any], settings: Settings) -> Statistics:
    """Statistics that this run can add to. Raises StatisticsError when it cannot, before anything is measured."""
    from heatkv.calibration import told_settings

    found = open_statistics(path, model, settings)
    assert found is not None
    cfg, told = told_settings(settings, model)
    measured, wanted = {"cfg": found.provenance.cfg, **found.provenance.settings}, {"cfg": cfg, **told}
    if measured != wanted:
        differing = [name for name in wanted if measured.get(name) != wanted[name]]
        this, that = (", ".join(f"{name}={told.get(name)}" for name in differing) for told in (measured, wanted))
        raise StatisticsError(f"{path} was measured with {this}, this run has {that}")
    return found


class _Compared:
    """What --report compares: plans of the policies that rank by statistics, at these budgets."""

    def __init__(self, model: Loaded, settings: Settings, budgets: Sequence[Budget]) -> None:
        rows, storage = settings.rows_per_image, storage_of(model)
        self.problems = [PlanningProblem(model.geometry, b, rows=rows, storage=storage) for b in budgets]
        for policy in REPORTED_POLICIES:
            for problem in self.problems:
                policy.check(problem)  # before hours are spent
                policy.check_room(problem)

    def agreements(self, parts: Sequence[Statistics]) -> list[Agreement]:
        from heatkv.profiling.stability import compare_halves, growing_halves

        halves = growing_halves(parts)
        found = []
        with progress("comparing halves", len(halves)) as advance:
            for one, other in halves:
                found.append(compare_halves(one, other, REPORTED_POLICIES, self.problems))
                advance(1)
        return found


def statistics_of_folder(
    folder: Path,
    model: ImageModel[Any],
    samples: int,
    seed: int,
    settings: Settings,
    levels: str | None = None,
    sink_scales: int = SINK_SCALES,
) -> Statistics:
    """The folder's own statistics: those of an earlier run as far as they fit, the rest measured now.

    `levels` is the kind of level costs that are wanted, too, `sink_scales` the fewest sinks of plans from them.
    """
    from heatkv.calibration import sample_names

    path = folder / "statistics.safetensors"
    names = sample_names(model, seed, model.labels(samples), 0)
    before = _found_in_folder(path, model, settings, names, levels, sink_scales)
    done = 0 if before is None else before.count
    if before is not None and done == samples:
        say(f"using {path} ({done} samples)")
        return _levels_of_folder(before, path, model, levels, sink_scales, seed, settings)
    parts = _calibrate(model, _batches(samples - done), seed, settings, done, before, path)
    if before is not None:
        parts.insert(0, before)
    agreement = _agreement(parts)
    if agreement is not None:
        worst, mean = min(agreement), sum(agreement) / len(agreement)
        say(
            f"calibrated on {samples} samples; head rankings of two halves agree by {mean:.2f} "
            f"(Spearman, mean over scales; worst {worst:.2f})"
        )
    return _levels_of_folder(_merged(parts), path, model, levels, sink_scales, seed, settings)


def _found_in_folder(
    path: Path,
    model: ImageModel[Any],
    settings: Settings,
    samples: list[str],
    levels: str | None,
    sink_scales: int,
) -> Statistics | None:
    """An earlier run's statistics when these samples begin with theirs, or continue them; None when there are none.

    Raises StatisticsError for others, and for level costs that are not wanted: they are not replaced.
    """
    if not path.exists():
        return None
    try:
        found = _to_be_continued(path, model, settings)
        if levels is not None and found.levels is not None:
            _check_level_costs(found.levels, path, levels, sink_scales)
    except HeatKVError as error:
        raise type(error)(f"{error}; write to another folder (--out)") from error
    if list(found.provenance.samples) != samples[: found.count]:
        raise StatisticsError(
            f"{path} holds {found.count} other samples than the {len(samples)} of this run; plan from it with "
            f"--statistics {path}, or write to another folder (--out)"
        )
    return found


def _check_level_costs(found: LevelStatistics, path: Path, cost: str, sink_scales: int) -> None:
    """Raise StatisticsError unless they are of this kind and hold for plans with so many sinks."""
    if found.cost != cost:
        raise StatisticsError(f"{path} has level costs of the kind {found.cost!r}, not {cost!r}")
    sinks = found.choices.sink_scales
    if sinks > sink_scales:
        raise StatisticsError(
            f"{path} has level costs for plans with sink_scales={sinks} or more, this run has {sink_scales}"
        )


def _levels_of_folder(
    statistics: Statistics,
    path: Path,
    model: ImageModel[Any],
    cost: str | None,
    sink_scales: int,
    seed: int,
    settings: Settings,
) -> Statistics:
    """With level costs of 32 images of that kind, those that the folder has as far as they fit."""
    if cost is None:
        return statistics
    found = statistics.levels
    missing = LEVEL_SAMPLES - (0 if found is None else len(found.samples))
    if missing <= 0:
        return statistics
    sinks = min(sink_scales, SINK_SCALES) if found is None else found.choices.sink_scales
    return _with_levels(statistics, path, model, cost, sinks, missing, seed, settings)
