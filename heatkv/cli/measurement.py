"""What `heatkv profile` and `heatkv compare` have in common: policies at budgets, batches and seeds on one model, and
the rows of results that are filled for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from heatkv.cli.opening import (
    load_arguments,
    open_model,
    open_plan,
    open_rankings,
    open_statistics,
    parse_names,
    positive,
    say_bytes,
    storage_of,
)
from heatkv.cli.options import Ranking, Running, Source, Sweep
from heatkv.cli.output import progress, say, show
from heatkv.cli.report import draw_report
from heatkv.cli.settings import policy_options
from heatkv.core.budget import Budget
from heatkv.core.io import file_name, read_json
from heatkv.core.levels import SINK_SCALES
from heatkv.core.schema import seed_after, seed_of, shown
from heatkv.core.statistics import Statistics
from heatkv.errors import HeatKVError, RanksError, out_of_memory
from heatkv.parallel.ranks import current
from heatkv.policies.base import PlanningProblem, StaticPolicy, make_policy
from heatkv.registry import registered_policies

if TYPE_CHECKING:
    from heatkv.profiling.measure.subjects import Subject
    from heatkv.profiling.results.folder import ResultsFolder
    from heatkv.profiling.results.row import Memory, Request, ResultRow


DEFAULT_BUDGETS = "50%,30%,20%,10%"


@dataclass(frozen=True)
class Point:
    """Where in a sweep: images at once, the cache rows that they take, and the seed."""

    batch: int
    rows: int
    seed: int


@dataclass
class Line:
    """A subject at a point, with the row of results that is being filled."""

    point: Point
    subject: Subject
    row: ResultRow


class Measurement:
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
        sweep: Sweep,
    ) -> None:
        batches, seeds = _axes(sweep, running)
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
        self.lacks_statistics = unranked and any(policy.needs for policy in made)
        kinds = sorted({policy.level_cost for policy in made if policy.level_cost is not None})
        if len(kinds) > 1:
            raise HeatKVError(f"these policies need level costs of the kinds {' and '.join(kinds)}; compare them apart")
        self.levels = kinds[0] if kinds else None
        sinks = [p.sink_scales for p in made if isinstance(p, StaticPolicy) and p.level_cost is not None]
        self.level_sinks = min(sinks, default=SINK_SCALES)
        self.model, self.settings = open_model(source, running)
        self.storage = storage_of(self.model, running.storage)
        self.source, self.running, self.in_process = source, running, sweep.in_process
        self.points = self._points(batches, seeds)
        self.statistics = open_statistics(ranking.statistics, self.model, self.settings)
        self.plans = [(path, open_plan(path, self.model.geometry, source.model)) for path in plans or []]
        self.rankings = open_rankings(ranking.orders, self.model.geometry, source.model)

    def _points(self, batches: Sequence[int] | None, seeds: Sequence[int]) -> list[Point]:
        """Every batch with every seed."""
        from heatkv.profiling.measure.subjects import images_of_rows

        each = self.settings.rows_per_image
        if batches is None:
            rows = self.running.rows if self.running.rows is not None else each
            positive(rows=rows)
            batches = [images_of_rows(rows, self.settings)]
        return [Point(batch, batch * each, seed) for seed in seeds for batch in batches]

    def point_name(self, point: Point, batch: bool = True) -> str:
        """What to add to a name so that it is of this point alone; nothing where there is one point only."""
        told = [("seed", {p.seed for p in self.points}, point.seed)]
        if batch:
            told.append(("batch", {p.batch for p in self.points}, point.batch))
        return "".join(f"_{axis}{value}" for axis, values, value in told if len(values) > 1)

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
                rows=rows,
                storage=self.storage,
                model=name_of_model,
            )
            for budget in self.budgets
            for rows in dict.fromkeys(point.rows for point in self.points)
        ]
        for name in self.policies:
            policy = make_policy(name, **self.policy_options[name])
            for problem in problems if name != "full" else ():
                policy.check(problem)

    def subjects(self, statistics: Statistics | None, draws: int = 1) -> list[tuple[Point, Subject]]:
        """Every policy at every budget, and every finished plan, at every point."""
        found: dict[Point, list[Subject]] = {}
        for point in self.points:
            # only a budget in bytes makes other plans for other rows
            same = [p for p in found if p.seed == point.seed and not any(b.kind == "bytes" for b in self.budgets)]
            found[point] = found[same[0]] if same else self._subjects_at(point, statistics, draws)
            for path, plan in self.plans if point.seed == self.points[0].seed else ():
                say_bytes(plan, str(path), point.rows, self.storage)
        return [(point, subject) for point, subjects in found.items() for subject in subjects]

    def _subjects_at(self, point: Point, statistics: Statistics | None, draws: int) -> list[Subject]:
        from heatkv.profiling.measure.subjects import Subject, plan_subjects

        subjects = plan_subjects(
            self.model, self.policies, self.budgets, statistics=statistics, rankings=self.rankings, rows=point.rows,
            storage=self.storage, seed=point.seed, draws=draws, options=self.policy_options,
            attention=self.running.attention,
        )  # fmt: skip
        for path, plan in self.plans:
            title, budget = f"{plan.policy} ({path.name})", f"{plan.budget:.4%}".replace(".0000", "")
            subjects.append(Subject(title, budget, (plan,), self.storage, self.running.attention))
        taken: set[str] = set()
        for subject in subjects:
            if subject.name in taken:
                raise HeatKVError(f"{subject.name} is named twice")
            taken.add(subject.name)
        return subjects

    def _predicted_kl(self, subject: Subject) -> float | None:
        """None for a guidance that it was not foretold for."""
        own, settings = self.settings.to_json()["cfg"], subject.plans[0].settings
        if settings.get("predicted_kl") is None or settings.get("predicted_cfg", own) in (None, own):
            return subject.plans[0].predicted_kl
        say(f"{subject.name}: its KL was foretold for cfg {settings['predicted_cfg']}, this run has {own}")
        return None

    def _comparison(self, point: Point, subject: Subject, images: int, pictures: int) -> str:
        from heatkv.profiling.results.folder import comparison_digest

        # the images that are compared are other samples than the calibration's
        return comparison_digest(
            self.model, self.settings, subject, seed=seed_after(point.seed), images=images, pictures=pictures
        )

    def by_comparison(
        self, subjects: Sequence[tuple[Point, Subject]], images: int, pictures: int
    ) -> dict[str, tuple[Point, Subject]]:
        """The first subject of every comparison by its digest. Raises RanksError where ranks differ."""
        found: dict[str, tuple[Point, Subject]] = {}
        for point, subject in subjects:
            found.setdefault(self._comparison(point, subject, images, pictures), (point, subject))
        for rank, digests in enumerate(current().gather(list(found))):
            if digests != list(found):
                raise RanksError(
                    f"rank {rank} makes other comparisons than rank {current().rank}; all need the same releases, "
                    "files and devices"
                )
        return found

    def lines(
        self,
        subjects: Sequence[tuple[Point, Subject]],
        results: ResultsFolder,
        images: int,
        pictures: int,
        repeats: int,
        resume: bool,
    ) -> list[Line]:
        """A line for every subject, with its bytes, and its memory and times where they were measured before; all plans
        are saved. With `resume` a run over other rows that was stopped is refused."""
        from heatkv.profiling.measure.runner import first_row, why_failed
        from heatkv.profiling.results.folder import measurement_digest

        lines, kept = [], [0, 0]
        for point, subject in subjects:
            make = partial(
                first_row, self.model, subject, batch=point.batch, rows=point.rows, seed=point.seed,
                comparison=self._comparison(point, subject, images, pictures),
                measurement=measurement_digest(
                    self.model, self.settings, subject, seed=point.seed, batch=point.batch
                ),
            )  # fmt: skip
            try:
                row = make()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                row = make(allocate=False).updated(self._unmeasured(point, subject, why_failed(error)))
            row = replace(row, predicted_kl=self._predicted_kl(subject))
            memory = times = None
            if row.error is None:
                memory = results.memory(row.measurement, own=not self.in_process)
                times = results.times(row.measurement, repeats)
            kept = [count + (found is not None) for count, found in zip(kept, (memory, times), strict=True)]
            lines.append(Line(point, subject, row.updated(*(part for part in (memory, times) if part is not None))))
        if resume:
            results.check_stopped([line.row for line in lines])
        files = results.save_plans([subject for _, subject in subjects], [self.files_name(o, lines) for o in lines])
        for line, of_line in zip(lines, files, strict=True):
            line.row = replace(line.row, plans=of_line)
        for count, what in zip(kept, ("memory", "time"), strict=True):
            if count:
                say(
                    f"the {what} of {count} of {len(lines)} was measured before: taken from {results.path.parent}; "
                    "another folder (--out) measures anew"
                )
        return lines

    def files_name(self, line: Line, lines: Sequence[Line]) -> str:
        """Of the subject and its point; batches share files where they share plans."""
        first = next(other for other in lines if other.row.comparison == line.row.comparison)
        alike = [o for o in lines if (o.subject.name, o.point.seed) == (line.subject.name, line.point.seed)]
        several = len({other.row.comparison for other in alike}) > 1
        return f"{line.subject.name}{self.point_name(first.point, batch=several)}"

    def measure(self, lines: Sequence[Line], repeats: int, results: ResultsFolder, snapshot: bool = False) -> None:
        """Add memory and times to the rows that lack them, saving each."""
        results.save([line.row for line in lines])
        paths = {id(line): self._snapshot_path(line, results.folder) if snapshot else None for line in lines}
        missing = [
            line for line in lines
            if (line.row.memory is None and line.row.error is None)
            or ((path := paths[id(line)]) is not None and not path.exists())
        ]  # fmt: skip
        with progress("measuring memory", len(missing)) as advance:
            for line in missing:
                line.row = line.row.updated(self._memory(line, paths[id(line)]))
                results.save([line.row for line in lines])
                advance(1)
        self._time(lines, repeats, results)

    def _snapshot_path(self, line: Line, folder: Path) -> Path:
        return folder / f"snapshot_{file_name(line.subject.name)}{self.point_name(line.point)}.pickle"

    def _memory(self, line: Line, snapshot: Path | None) -> Memory:
        """In a process of its own, or quickly in this one; the allocator's history goes to `snapshot`."""
        import torch

        from heatkv.profiling.measure.memory import record_snapshots, save_snapshot
        from heatkv.profiling.measure.runner import subject_memory, why_failed
        from heatkv.profiling.measure.worker import Job, measure_in_new_process

        point, subject = line.point, line.subject
        if not self.in_process:
            job = Job(
                load_arguments(self.source, self.running), self.model.fingerprint, self.settings,
                subject.plans[0].to_json(), subject.storage, subject.attention, point.batch, point.seed,
                torch.get_num_threads(), snapshot, self.running.deterministic,
            )  # fmt: skip
            memory = measure_in_new_process(job)
            return memory if memory.error is None else self._unmeasured(point, subject, memory.error)
        if snapshot is not None:
            record_snapshots()
        try:
            memory = subject_memory(self.model, subject, point.batch, self.settings, seed=point.seed)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return self._unmeasured(point, subject, why_failed(error))
        if snapshot is not None:
            save_snapshot(snapshot)
        return memory

    def _unmeasured(self, point: Point, subject: Subject, error: str) -> Memory:
        from heatkv.profiling.results.row import Memory

        say(f"{subject.name}{self.point_name(point).replace('_', ' ')} was not measured: {error}")
        return Memory(error=error)

    def _time(self, lines: Sequence[Line], repeats: int, results: ResultsFolder) -> None:
        """Times of what could be drawn and has none, in turns with all others of its point."""
        from heatkv.profiling.measure.environment import timing_machine
        from heatkv.profiling.measure.runner import measure_latency, why_failed

        missing = [line for line in lines if line.row.latency_ms is None and line.row.error is None]
        runs = len(missing) * repeats * (2 if self.model.device.type == "cuda" else 1)
        with progress("timing", runs) as advance:
            for point in self.points:
                untimed = [line for line in missing if line.point == point]
                if not untimed:
                    continue
                machine = timing_machine(self.model.device)
                if machine.load is not None and machine.load.reasons:
                    busy = ", ".join(machine.load.reasons)
                    say(f"warning: the machine is busy ({busy}); times will be too long and spread")
                try:
                    times, no_graphs = measure_latency(
                        self.model, [line.subject for line in untimed], batch=point.batch, settings=self.settings,
                        repeats=repeats, machine=machine, seed=point.seed, progress=lambda: advance(1),
                    )  # fmt: skip
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    say(f"{point.batch} images of {len(untimed)} policies were not timed: {why_failed(error)}")
                    continue
                for line in untimed:
                    line.row = line.row.updated(times[line.subject.name])
                for name, reason in no_graphs.items():
                    say(f"{name} has no time with graphs: {reason}")
                results.save([line.row for line in lines])

    @property
    def title(self) -> str:
        """The model, and how it runs."""
        rows = " and ".join(str(rows) for rows in dict.fromkeys(point.rows for point in self.points))
        return f"{self.model.name}: cache of {rows} rows in {self.storage}"

    @property
    def seeds(self) -> list[int]:
        """Every one once, in the order asked for."""
        return list(dict.fromkeys(point.seed for point in self.points))

    def samples(self, images: int) -> str | dict[str, str]:
        """A digest of the samples that are compared, or one for every seed where there are several."""
        from heatkv.profiling.results.folder import samples_digest

        of_seeds = {str(seed): samples_digest(self.model, seed_after(seed), images) for seed in self.seeds}
        return of_seeds if len(of_seeds) > 1 else next(iter(of_seeds.values()))

    def request(self, repeats: int) -> Request:
        """What was asked for, as results tell it."""
        from heatkv.profiling.results.row import Request

        return Request(
            seed=self.seeds[0] if len(self.seeds) == 1 else None,
            seeds=tuple(self.seeds),
            batches=tuple(dict.fromkeys(point.batch for point in self.points)),
            repeats=repeats,
        )


def _axes(sweep: Sweep, running: Running) -> tuple[list[int] | None, list[int]]:
    """Batches, None for the one of --rows, and seeds. Raises HeatKVError."""
    batches, seeds = None, [running.seed]
    if sweep.batches is not None:
        if running.rows is not None:
            raise HeatKVError("--batches and --rows both say how much is drawn at once; give one of them")
        batches = whole_numbers(sweep.batches, "batch")
        for batch in batches:
            positive(batches=batch)
    if sweep.seeds is not None:
        if running.seed != 0:
            raise HeatKVError("--seeds and --seed both name seeds; give one of them")
        seeds = whole_numbers(sweep.seeds, "seed")
        for seed in seeds:
            seed_of(seed, HeatKVError)
    return batches, seeds


def whole_numbers(text: str, what: str) -> list[int]:
    """Numbers separated by commas, each once. Raises HeatKVError."""
    try:
        numbers = [int(name) for name in parse_names(text, what)]
    except ValueError as error:
        raise HeatKVError(f"cannot read the {what} list {shown(text)}; write whole numbers as 1,4") from error
    twice = [number for number, count in Counter(numbers).items() if count > 1]
    if twice:
        raise HeatKVError(f"{what} {twice[0]} is named twice")
    return numbers


@contextmanager
def told_when_stopped(results: ResultsFolder) -> Iterator[None]:
    """An interrupt says where what was measured is, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if results.partial.exists():
            say(f"what was measured so far is in {results.partial}; the same command goes on from there")
        raise


def finish_results(
    results: ResultsFolder,
    rows: Sequence[ResultRow],
    title: str,
    as_json: bool,
    report: bool = False,
    before: Callable[[], Iterable[Table]] = tuple,
) -> None:
    """Write the results, and the report if wanted, then show them, with the tables `before` them."""
    from heatkv.profiling.report.tables import RESULTS, terminal_table

    moved = results.finish(rows)
    if moved is not None:
        say(f"{results.path} held other results; they are in {moved} now")
    if report:
        draw_report([results.path.parent], results.path.parent)
    for table in before() if not as_json else ():
        show(table, False, None)
    show(
        terminal_table(rows, RESULTS, title),
        as_json,
        read_json(results.path) if as_json else None,
    )
    say(f"written: {results.path.parent}")
