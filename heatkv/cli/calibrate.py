"""`heatkv calibrate`: statistics of a model into a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from heatkv.calibration.run import LEVEL_SAMPLES, calibrate_into, most_at_once
from heatkv.cli.opening import Opened, open_model
from heatkv.cli.options import AsJson, MeasuredSource, Running, Seed, count_of, names_of, settings_of
from heatkv.cli.output import SCREEN, progress, show
from heatkv.core.budget import Budget
from heatkv.core.statistics import Statistics
from heatkv.errors import HeatKVError
from heatkv.parallel.ranks import current
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import HeatKV
from heatkv.policies.lp import HeatKVLP

if TYPE_CHECKING:
    from heatkv.profiling.analysis.stability import Agreement

REPORTED_POLICIES = (HeatKV(), HeatKVLP(value="error"))


def calibrate(
    *,
    out: Annotated[Path, typer.Option("--out", help="statistics file to write")],
    source: MeasuredSource,
    samples: Annotated[int, typer.Option("--samples", help="images to measure, all classes in turn")] = 64,
    levels: Annotated[
        str | None,
        typer.Option(
            "--levels", metavar="KIND[,samples=32][,sink-scales=N]",
            help="also measure what coarser levels cost (heatkv-mr): error or fisher; on so many images, for plans of "
            "so many sink scales or more",
        ),
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="add samples to an existing file")] = False,
    report: Annotated[
        str | None,
        typer.Option(
            "--report", metavar="BUDGETS", help="say how many samples are enough, from plans of halves at these "
            "budgets, as 20%,10%",
        ),
    ] = None,
    seed: Seed = 0,
    running: Running,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure how much every head looks back at every scale; writes a statistics file. Goes on where it was stopped,
    and shares its batches over the ranks that torchrun starts.

    Example: heatkv calibrate --model emoji --samples 64 --out statistics.safetensors
    """
    from heatkv.profiling.analysis.stability import batch_sizes

    costs: dict[str, Any] = {}
    if levels is not None:
        kind, *more = levels.split(",")
        known = {"samples": count_of, "sink_scales": count_of}
        more_costs = settings_of(more, "--levels", known)
        costs = {
            "levels": kind.strip(), "level_samples": more_costs.get("samples", LEVEL_SAMPLES),
            "sink_scales": more_costs.get("sink_scales"),
        }  # fmt: skip
    budgets = None if report is None else [Budget.parse(text) for text in names_of(report, "budget")]
    if budgets is not None and samples < 2:
        raise HeatKVError(f"--report compares two halves of the new samples; --samples is {samples}, take at least 2")
    opened = open_model(source, running)
    compared = None if budgets is None else _Compared(opened, budgets)
    calibrated = calibrate_into(
        out, opened.model, samples, seed=seed, settings=opened.settings, append=append, resume=True,
        batch_sizes=None if compared is None else batch_sizes(samples, most_at_once(opened.model, opened.settings)),
        reporter=SCREEN, **costs,
    )  # fmt: skip
    if current().first:
        agreement = calibrated.agreement_of_halves()
        halves = None if compared is None or agreement is None else compared.agreements(calibrated.batches)
        _show(out, calibrated.statistics, agreement, halves, as_json)


def _show(
    out: Path,
    total: Statistics,
    agreement: Sequence[float] | None,
    halves: Sequence[Agreement] | None,
    as_json: bool,
) -> None:
    """The result, with what growing halves agree on, where that is known."""
    from heatkv.profiling.analysis.stability import ENOUGH_LOSS, enough, verdict
    from heatkv.profiling.report.tables import stability_tables

    data = {
        "out": str(out), "samples": total.count, "gini": total.gini().tolist(), "rank_agreement_of_halves": agreement,
        "levels": None if total.levels is None else total.levels.header(),
    }  # fmt: skip
    table = _table(total, agreement)
    if halves is None:
        show(table, as_json, data)
        return
    data["report"] = {
        "halves": [half.to_json() for half in halves],
        "largest_loss": ENOUGH_LOSS, "enough_samples": enough(halves), "verdict": verdict(halves),
    }  # fmt: skip
    show(Group(table, *stability_tables(halves), verdict(halves)), as_json, data)


def _table(statistics: Statistics, agreement: Sequence[float] | None) -> Table:
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


class _Compared:
    """What a report compares: plans of the policies that rank by statistics, at these budgets."""

    def __init__(self, opened: Opened, budgets: Sequence[Budget]) -> None:
        rows, storage = opened.settings.rows_per_image, str(opened.storage)
        self.problems = [PlanningProblem(opened.model.geometry, b, rows=rows, storage=storage) for b in budgets]
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
