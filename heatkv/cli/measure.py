"""Policies side by side on one model: `heatkv profile` for memory and time, `heatkv compare` also for what is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heatkv.cli.calibrate import statistics_of_folder
from heatkv.cli.opening import (
    open_model,
    open_plan,
    open_rankings,
    open_statistics,
    parse_names,
    positive,
    say_bytes,
    storage_of,
)
from heatkv.cli.options import AsJson, Budgets, OutFolder, PlanFiles, Policies, Ranking, Repeats, Running, Source
from heatkv.cli.output import make_folder, progress, say, show
from heatkv.cli.report import draw_report
from heatkv.cli.settings import policy_options
from heatkv.errors import HeatKVError
from heatkv.files import read_json
from heatkv.geometry import Budget
from heatkv.levels import SINK_SCALES
from heatkv.policies.base import PlanningProblem, StaticPolicy, make_policy
from heatkv.registry import registered_policies
from heatkv.statistics import Statistics

if TYPE_CHECKING:
    from heatkv.profiling.results import ResultsFolder
    from heatkv.profiling.runner import Subject

DEFAULT_POLICIES = "heatkv,sliding-window,streaming,random"
PROFILED_POLICIES = "sliding-window,streaming"
DEFAULT_BUDGETS = "50%,30%,20%,10%"

_Rows = list[dict[str, Any]]


class _Measurement:
    """Policies at budgets and finished plans, on a model; names and numbers are read before the model is."""

    def __init__(
        self,
        source: Source,
        policies: str | None,
        default: str,
        budgets: str,
        plans: Sequence[Path] | None,
        ranking: Ranking,
        running: Running,
    ) -> None:
        from heatkv.profiling.runner import images_of_rows

        if policies is None:
            self.policies = ["full"] if plans else parse_names(default, "policy")
        elif policies.strip() == "all":
            self.policies = list(registered_policies())
        else:
            self.policies = parse_names(policies, "policy")
        self.policy_options = policy_options(self.policies, ranking)
        self.budgets = [Budget.parse(text) for text in parse_names(budgets, "budget")]
        unranked = ranking.statistics is None and ranking.orders is None
        made = [make_policy(name, **self.policy_options[name]) for name in self.policies]
        self.lacks_statistics = unranked and any("statistics" in policy.plans_from() for policy in made)
        kinds = sorted({policy.level_cost for policy in made if policy.level_cost is not None})
        if len(kinds) > 1:
            raise HeatKVError(f"these policies need level costs of the kinds {' and '.join(kinds)}; compare them apart")
        self.levels = kinds[0] if kinds else None
        sinks = [p.sink_scales for p in made if isinstance(p, StaticPolicy) and p.level_cost is not None]
        self.level_sinks = min(sinks, default=SINK_SCALES)
        self.model, self.settings = open_model(source, running)
        self.storage, self.seed = storage_of(self.model, running.storage), running.seed
        self.running = running
        self.rows = running.rows if running.rows is not None else self.settings.rows_per_image
        self.batch = images_of_rows(self.rows, self.settings)
        self.statistics = open_statistics(ranking.statistics, self.model, self.settings)
        self.plans = [(path, open_plan(path, self.model.geometry, source.model)) for path in plans or []]
        self.rankings = open_rankings(ranking.orders, self.model.geometry, source.model)

    def check(self) -> None:
        """Refuse bad policies and budgets before anything is measured."""
        if any(budget.kind == "auto" for budget in self.budgets):
            unable = [name for name in self.policies if not self.policy_options[name].get("max_kl")]
            if unable:
                raise HeatKVError(
                    f"policy {unable[0]!r} cannot choose its budget; --budgets auto is for heatkv-mr alone, with --set "
                    "cost=fisher and --set max_kl: solve its plan, and give it with --plan beside other policies"
                )
        texts = [str(budget) for budget in self.budgets]
        for text in texts:
            if texts.count(text) > 1:
                raise HeatKVError(f"budget {text} is named twice")
        geometry, name_of_model = self.model.geometry, self.model.name
        problems = [
            PlanningProblem(
                geometry,
                budget,
                self.statistics,
                self.rankings,
                rows=self.rows,
                storage=self.storage,
                model=name_of_model,
            )
            for budget in self.budgets
        ]
        for name in self.policies:
            policy = make_policy(name, **self.policy_options[name])
            for problem in problems if name != "full" else ():
                policy.check(problem)
                policy.check_room(problem)

    def subjects(self, statistics: Statistics | None, draws: int = 1) -> list[Subject]:
        """Every policy at every budget, and every finished plan."""
        from heatkv.profiling.runner import Subject, plan_subjects

        subjects = plan_subjects(
            self.model, self.policies, self.budgets, statistics=statistics, rankings=self.rankings, rows=self.rows,
            storage=self.storage, seed=self.seed, draws=draws, options=self.policy_options, settings=self.settings,
            attention=self.running.attention,
        )  # fmt: skip
        for path, plan in self.plans:
            say_bytes(plan, str(path), self.rows, self.storage)
            title, budget = f"{plan.policy} ({path.name})", f"{plan.budget:.4%}".replace(".0000", "")
            subjects.append(
                Subject.of(
                    title, budget, [plan], self.model, self.seed, self.settings, self.storage, self.running.attention
                )
            )
        taken: set[str] = set()
        for subject in subjects:
            if subject.name in taken:
                raise HeatKVError(f"{subject.name} is named twice")
            taken.add(subject.name)
        return subjects

    def _foretold_elsewhere(self, subject: Subject) -> dict[str, None]:
        """No KL is foretold for a guidance that it was not foretold for."""
        own, told = self.settings.to_json()["cfg"], subject.plans[0].settings
        if told.get("predicted_kl") is None or told.get("predicted_cfg", own) in (None, own):
            return {}
        say(f"{subject.name}: its KL was foretold for cfg {told['predicted_cfg']}, this run has {own}")
        return {"predicted_kl": None}

    def digests(self, subjects: Sequence[Subject], images: int, pictures: int) -> list[str]:
        """What every subject's fidelity follows from; its images are other samples than the calibration's."""
        from heatkv.profiling.results import comparison_digest

        return [
            comparison_digest(self.model, self.settings, s, seed=self.seed + 1, images=images, pictures=pictures)
            for s in subjects
        ]

    def bytes_and_times(
        self, subjects: Sequence[Subject], digests: Sequence[str], repeats: int, results: ResultsFolder
    ) -> _Rows:
        """A result row for every subject; bytes are saved before times are taken, so that an interrupt keeps them."""
        from heatkv.profiling.busy import load_of
        from heatkv.profiling.runner import bytes_row, latency_row, measure_latency

        rows = [
            {"comparison": digest, "plans": files}
            | bytes_row(self.model, subject, self.rows)
            | self._foretold_elsewhere(subject)
            for subject, digest, files in zip(subjects, digests, results.save_plans(subjects), strict=True)
        ]
        results.save(rows)
        if reasons := load_of(self.model.device).reasons:
            say(f"warning: the machine is busy ({', '.join(reasons)}); times will be too long and spread")
        runs = len(subjects) * repeats * (2 if self.model.device.type == "cuda" else 1)
        with progress("timing", runs) as advance:
            measured = measure_latency(
                self.model, subjects, rows=self.rows, settings=self.settings, repeats=repeats, seed=self.seed,
                progress=lambda: advance(1),
            )  # fmt: skip
        for name, timing in measured.items():
            if timing.no_graphs is not None:
                say(f"{name} has no time with graphs: {timing.no_graphs}")
        return [row | latency_row(measured[s.name]) for s, row in zip(subjects, rows, strict=True)]


@contextmanager
def _told_when_stopped(results: ResultsFolder) -> Iterator[None]:
    """An interrupt says where what was measured is, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if results.partial.exists():
            say(f"what was measured so far is in {results.partial}; the same command goes on from there")
        raise


def _finish(results: ResultsFolder, rows: _Rows, title: str, as_json: bool, report: bool = False) -> None:
    """Write and show the results, and the report if wanted."""
    from heatkv.profiling.report import results_table

    moved = results.finish(rows)
    if moved is not None:
        say(f"{results.path} held other results; they are in {moved} now")
    if report:
        draw_report([results.path.parent], results.path.parent)
    show(results_table(rows, title), as_json, read_json(results.path) if as_json else None)
    say(f"written: {results.path.parent}")


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
    running: Running,
    as_json: AsJson = False,
) -> None:
    """Memory and latency of every policy at every budget.

    Example: heatkv profile --model emoji --policies streaming --budgets 20%,10% --out results/profile
    """
    from heatkv.profiling.latency_table import latency_table
    from heatkv.profiling.results import ResultsFolder
    from heatkv.profiling.trace import save_trace

    positive(repeats=repeats)
    measurement = _Measurement(source, policies, PROFILED_POLICIES, budgets, plan, ranking, running)
    model = measurement.model
    subjects = measurement.subjects(measurement.statistics)
    folder = make_folder(out)
    traces = None if trace is None else make_folder(trace)
    results = ResultsFolder(folder, model, measurement.settings, {"seed": running.seed, "repeats": repeats})
    with _told_when_stopped(results):
        rows = measurement.bytes_and_times(subjects, measurement.digests(subjects, 0, 0), repeats, results)
        if traces is not None:
            for subject in subjects:
                save_trace(traces, model, subject, measurement.batch, measurement.settings)
            say(f"traces: {traces} (tensorboard --logdir {traces}, or ui.perfetto.dev)")
    title = f"{model.name}, {measurement.rows} rows, {measurement.storage}, {model.device}"
    if not as_json:
        show(latency_table(rows, f"{title}: time"), False, None)
    _finish(results, rows, title, as_json)


def compare(
    *,
    out: OutFolder,
    source: Source,
    policies: Policies = None,
    budgets: Budgets = DEFAULT_BUDGETS,
    plan: PlanFiles = None,
    ranking: Ranking,
    samples: Annotated[
        int, typer.Option("--samples", help="images to calibrate on, when no statistics are given")
    ] = 64,
    images: Annotated[int, typer.Option("--images", help="images whose logits are compared (KL, top-1)")] = 32,
    pictures: Annotated[int, typer.Option("--pictures", help="images drawn freely and compared (PSNR, SSIM)")] = 16,
    draws: Annotated[int, typer.Option("--draws", help="plans of every policy that draws at random")] = 3,
    repeats: Repeats = 5,
    running: Running,
    as_json: AsJson = False,
) -> None:
    """The main job: calibrate if needed, plan, draw, measure; a table, results.json, pictures and report.html.

    Example: heatkv compare --model emoji --policies heatkv,streaming --budgets 20%,10% --out results/compare
    """
    from heatkv.profiling.html_report import check_report_replaceable
    from heatkv.profiling.report import save_image_sheet, save_scas_heat_map
    from heatkv.profiling.results import ResultsFolder, check_replaceable, samples_digest, save_scas
    from heatkv.profiling.runner import versus

    positive(samples=samples, images=images, pictures=pictures, draws=draws, repeats=repeats)
    pictures = min(pictures, images)
    check_replaceable(out)
    check_report_replaceable(out)
    measurement = _Measurement(source, policies, DEFAULT_POLICIES, budgets, plan, ranking, running)
    measurement.check()
    model, settings, seed = measurement.model, measurement.settings, running.seed
    statistics = measurement.statistics
    if measurement.lacks_statistics:
        folder = make_folder(out)
        statistics = statistics_of_folder(
            folder, model, samples, seed, settings, measurement.levels, measurement.level_sinks
        )
    subjects = measurement.subjects(statistics, draws)
    folder = make_folder(out)
    request: dict[str, Any] = {
        "seed": seed, "images": images, "pictures": pictures, "draws": draws, "repeats": repeats,
        "samples_digest": samples_digest(model, seed + 1, images),
        "statistics": None if statistics is None else statistics.provenance.to_json(),
    }  # fmt: skip
    results = ResultsFolder(folder, model, settings, request, pictures)
    with _told_when_stopped(results):
        digests = measurement.digests(subjects, images, pictures)
        rows = measurement.bytes_and_times(subjects, digests, repeats, results)
        drawn = _compare_all(measurement, subjects, rows, results, images, pictures)
        rows = [row | {"versus": difference} for row, difference in zip(rows, versus(rows), strict=True)]
    for name, reason in rows[0]["not_measured"].items():
        say(f"no {name.upper()}: {reason}")
    sheets: dict[str, list[tuple[str, Any]]] = {}
    for subject, of_subject in zip(subjects, drawn, strict=True):
        if subject.policy != "full":
            sheets.setdefault(subject.budget, []).append((subject.policy, of_subject))
    for budget, lines in sheets.items():
        path = folder / f"images_{budget.replace('%', 'percent')}.png"
        title = f"{model.name}, cache of {budget}"
        save_image_sheet(path, [("full", drawn[0]), *lines], min(pictures, 12), title)
    if statistics is not None:
        save_scas_heat_map(folder / "scas.png", statistics)
        save_scas(folder / "scas.json", statistics)
    title = (
        f"{model.name}: cache of {measurement.rows} rows in {measurement.storage}, KL and top-1 over {images} images, "
        f"PSNR and SSIM over {pictures}"
    )
    _finish(results, rows, title, as_json, report=True)


def _compare_all(
    measurement: _Measurement,
    subjects: Sequence[Subject],
    rows: _Rows,
    results: ResultsFolder,
    images: int,
    pictures: int,
) -> list[Any]:
    """Add to every row how far its subject is from the full cache, saving each; the pictures of every subject."""
    import torch

    from heatkv.profiling.fidelity import FidelityBench
    from heatkv.profiling.runner import fidelity_row

    found = [results.earlier(subject, row["comparison"]) for subject, row in zip(subjects, rows, strict=True)]
    kept = sum(earlier is not None for earlier in found)
    if kept:
        say(f"{kept} of {len(subjects)} comparisons were made before: taken from {results.path.parent}")
    drawn: list[Any] = []
    bench = None
    missing = [subject for subject, earlier in zip(subjects, found, strict=True) if earlier is None]
    of_plan = images + min(images, -(-pictures // 16) * 16)
    with progress("comparing", (images if missing else 0) + of_plan * sum(len(s.plans) for s in missing)) as advance:
        for index, (subject, earlier) in enumerate(zip(subjects, found, strict=True)):
            if earlier is not None:
                figures, of_subject = earlier
            else:
                bench = bench or FidelityBench(
                    measurement.model, images=images, pictures=pictures, seed=measurement.seed + 1,
                    settings=measurement.settings, progress=advance,
                )  # fmt: skip
                figures, details = fidelity_row(bench, subject)
                of_subject = torch.cat(details.pictures)
                results.save_pictures(subject, rows[index]["comparison"], of_subject)
            rows[index] |= figures
            drawn.append(of_subject)
            results.save(rows)
    return drawn
