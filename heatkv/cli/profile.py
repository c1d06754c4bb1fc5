"""`heatkv profile`: memory and time of policies side by side on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from heatkv.cli.measurement import DEFAULT_BUDGETS, Measurement, finish_results, told_when_stopped
from heatkv.cli.opening import positive
from heatkv.cli.options import (
    AsJson,
    Budgets,
    OutFolder,
    PlanFiles,
    Policies,
    Ranking,
    Repeats,
    Resume,
    Running,
    Source,
    Sweep,
)
from heatkv.cli.output import make_folder, say
from heatkv.core.io import clear_temporaries

DEFAULT_POLICIES = "sliding-window,streaming"


def profile(
    *,
    out: OutFolder,
    source: Source,
    policies: Policies = None,
    budgets: Budgets = DEFAULT_BUDGETS,
    plan: PlanFiles = None,
    ranking: Ranking,
    repeats: Repeats = 10,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="folder for profiler traces, for TensorBoard and Perfetto")
    ] = None,
    snapshot: Annotated[
        bool, typer.Option("--snapshot", help="also write the CUDA allocator's history per policy (pickle)")
    ] = False,
    sweep: Sweep,
    running: Running,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Memory and latency of every policy at every budget, batch size and seed; goes on where it was stopped.

    Example: heatkv profile --model emoji --policies streaming --budgets 20%,10% --batches 1,4 --out results/profile
    """
    from heatkv.profiling.measure.memory import check_snapshots
    from heatkv.profiling.measure.trace import has_trace, save_trace
    from heatkv.profiling.report.tables import DEVICE, LATENCY, PLANNED, terminal_table
    from heatkv.profiling.results.folder import ResultsFolder, check_replaceable

    positive(repeats=repeats)
    check_replaceable(out)
    measurement = Measurement(source, policies, DEFAULT_POLICIES, budgets, plan, ranking, running, sweep)
    model = measurement.model
    if snapshot:
        check_snapshots(model.device)
    subjects = measurement.subjects(measurement.statistics)
    folder = make_folder(out)
    traces = None if trace is None else make_folder(trace, "--trace")
    results = ResultsFolder(folder, model, measurement.settings, measurement.request(repeats))
    with told_when_stopped(results):
        lines = measurement.lines(subjects, results, 0, 0, repeats, resume)
        measurement.measure(lines, repeats, results, snapshot)
        if traces is not None:
            for point, subject in subjects:
                of_point = measurement.point_name(point, batch=False)
                if not (resume and has_trace(traces, subject, point.batch, of_point)):
                    save_trace(traces, model, subject, point.batch, measurement.settings, of_point)
            clear_temporaries(traces)
            say(f"traces: {traces} (tensorboard --logdir {traces}, or ui.perfetto.dev)")
    rows = [line.row for line in lines]

    def tables() -> list[Table]:
        return [
            terminal_table(rows, (*PLANNED, *DEVICE), f"{model.name}: memory on {model.device}"),
            terminal_table(rows, LATENCY, f"{measurement.title}, {model.device}: time"),
        ]

    finish_results(results, rows, f"{measurement.title}, {model.device}", as_json, before=tables)
