"""Policies at budgets, batch sizes and seeds on one model: a record for each, with bytes, memory and times.

Every record is saved as it is measured, and what an earlier run in the same folder measured is taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from heatkv.calibration.run import check_statistics
from heatkv.core.budget import Budget
from heatkv.core.io import file_name
from heatkv.core.levels import SINK_SCALES
from heatkv.core.plan import CachePlan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schema import seed_after, seed_of, whole
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import StorageType
from heatkv.errors import HeatKVError, ModelError, out_of_memory
from heatkv.models.base import ImageModel
from heatkv.models.catalogue import load_model
from heatkv.models.sampling import Settings
from heatkv.parallel.reporter import SILENT, Reporter
from heatkv.policies.base import EvictionPolicy, PlanningProblem, StaticPolicy, make_policy
from heatkv.profiling.measure.environment import timing_machine
from heatkv.profiling.measure.memory import record_snapshots, save_snapshot
from heatkv.profiling.measure.runner import first_row, measure_latency, subject_memory, why_failed
from heatkv.profiling.measure.subjects import Subject, plan_subjects
from heatkv.profiling.measure.worker import Job, measure_in_new_process
from heatkv.profiling.results.folder import ResultsFolder, comparison_digest, measurement_digest, samples_digest
from heatkv.profiling.results.row import Memory, Request, ResultRow

BUDGETS = ("50%", "30%", "20%", "10%")


class SweepOptions(TypedDict, total=False):
    """What a sweep takes beside model, policies and budgets.

    `plans` are finished plans by the names that records show; `statistics` and `rankings` are what policies plan from;
    `settings` how images are drawn (default: the model's). `code` is that of an 8-bit cache, `attention` names the
    kernel. `batches` are images at once, `seeds` those of samples and of policies that draw at random; every batch is
    measured with every seed. `repeats` are timed runs. `loading` are arguments of `load_model`, by which a fresh
    process loads a model that was given loaded. `reporter` takes lines and progress.
    """

    plans: Mapping[str, CachePlan]
    statistics: Statistics | None
    rankings: HeadRankings | None
    settings: Settings | None
    code: str | None
    attention: str
    batches: Sequence[int]
    seeds: Sequence[int]
    repeats: int
    loading: dict[str, Any] | None
    reporter: Reporter


@dataclass(frozen=True)
class Point:
    """Where in a sweep: images at once, the cache rows that they take, and the seed."""

    batch: int
    rows: int
    seed: int


@dataclass
class Entry:
    """A subject at a point, with the record that is being filled."""

    point: Point
    subject: Subject
    row: ResultRow


class Sweep:
    """What is measured, checked; SweepOptions tells the options. `model` is a loaded one or a name.

    Raises HeatKVError for policies, budgets, batches and seeds that cannot be measured, before anything is.
    """

    def __init__(
        self,
        model: str | ImageModel[Any],
        policies: Sequence[str | EvictionPolicy],
        budgets: Sequence[str | Budget],
        *,
        plans: Mapping[str, CachePlan] | None = None,
        statistics: Statistics | None = None,
        rankings: HeadRankings | None = None,
        settings: Settings | None = None,
        code: str | None = None,
        attention: str = "auto",
        batches: Sequence[int] = (1,),
        seeds: Sequence[int] = (0,),
        repeats: int = 5,
        loading: dict[str, Any] | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        self.loading = {"name": model, "device": "cpu"} if isinstance(model, str) else loading
        self.model: ImageModel[Any] = load_model(model) if isinstance(model, str) else model
        self.policies = [make_policy(policy) if isinstance(policy, str) else policy for policy in policies]
        self.budgets = [Budget.parse(budget) for budget in budgets]
        self.plans, self.statistics, self.rankings = dict(plans or {}), statistics, rankings
        self.settings = self.model.sampling if settings is None else settings
        self.storage, self.attention = str(StorageType.for_dtype(self.model.compute_dtype, code)), attention
        self.repeats, self.reporter = whole(repeats, "repeats", HeatKVError, 1), reporter
        self.seeds = [seed_of(seed, HeatKVError) for seed in seeds]
        self.batches = [whole(batch, "batch", HeatKVError, 1) for batch in batches]
        each = self.settings.rows_per_image
        self.points = [Point(batch, batch * each, seed) for seed in self.seeds for batch in self.batches]
        self._check()

    def _check(self) -> None:
        named: dict[str, list[Any]] = {
            "policy": [policy.name for policy in self.policies], "budget": [str(budget) for budget in self.budgets],
            "seed": self.seeds, "batch": self.batches,
        }  # fmt: skip
        for what, names in named.items():
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise HeatKVError(f"{what} {twice} is named twice")
        costs = sorted({policy.level_cost for policy in self.policies if policy.level_cost is not None})
        if len(costs) > 1:
            raise HeatKVError(f"these policies need level costs of the kinds {' and '.join(costs)}; compare them apart")
        self.level_cost = costs[0] if costs else None
        sinks = [p.sink_scales for p in self.policies if isinstance(p, StaticPolicy) and p.level_cost is not None]
        self.level_sinks = min(sinks, default=SINK_SCALES)
        if self.statistics is not None:
            check_statistics(self.statistics, self.model, self.settings)
        for policy in self.policies:
            for problem in self._problems() if policy.name != "full" else ():
                policy.check(problem)

    def _problems(self) -> list[PlanningProblem]:
        """Every budget with the rows of every batch."""
        return [
            PlanningProblem(
                self.model.geometry, budget, self.statistics, self.rankings, 0, rows, self.storage, self.model.name
            )
            for budget in self.budgets
            for rows in dict.fromkeys(point.rows for point in self.points)
        ]

    @property
    def lacks_statistics(self) -> bool:
        """Whether a policy plans from what is not given."""
        return self.statistics is None and self.rankings is None and any(policy.needs for policy in self.policies)

    def subjects(self, draws: int = 1) -> list[tuple[Point, Subject]]:
        """Every policy at every budget, and every finished plan, at every point; raises what planning raises."""
        found: dict[Point, list[Subject]] = {}
        for point in self.points:
            # only a budget in bytes makes other plans for other rows
            same = [p for p in found if p.seed == point.seed and not any(b.kind == "bytes" for b in self.budgets)]
            found[point] = found[same[0]] if same else self._subjects_at(point, draws)
        return [(point, subject) for point, subjects in found.items() for subject in subjects]

    def _subjects_at(self, point: Point, draws: int) -> list[Subject]:
        subjects = plan_subjects(
            self.model, self.policies, self.budgets, statistics=self.statistics, rankings=self.rankings,
            rows=point.rows, storage=self.storage, seed=point.seed, draws=draws, attention=self.attention,
        )  # fmt: skip
        for name, plan in self.plans.items():
            plan.check_geometry(self.model.geometry)
            title, budget = f"{plan.policy} ({name})", f"{plan.budget:.4%}".replace(".0000", "")
            subjects.append(Subject(title, budget, (plan,), self.storage, self.attention))
        return subjects

    def point_name(self, point: Point, batch: bool = True) -> str:
        """What to add to a name so that it is of this point alone; nothing where there is one point only."""
        axes = [("seed", self.seeds, point.seed)] + ([("batch", self.batches, point.batch)] if batch else [])
        return "".join(f"_{axis}{value}" for axis, values, value in axes if len(values) > 1)

    @property
    def title(self) -> str:
        """The model, and how it runs."""
        rows = " and ".join(str(rows) for rows in dict.fromkeys(point.rows for point in self.points))
        return f"{self.model.name}: cache of {rows} rows in {self.storage}"

    def request(self, **more: Any) -> Request:
        """What was asked for, as results have it."""
        return Request(
            seed=self.seeds[0] if len(self.seeds) == 1 else None, seeds=tuple(self.seeds),
            batches=tuple(self.batches), repeats=self.repeats, **more,
        )  # fmt: skip

    def samples(self, images: int) -> str | dict[str, str]:
        """A digest of the samples that are compared, or one for every seed where there are several."""
        digests = {str(seed): samples_digest(self.model, seed_after(seed), images) for seed in self.seeds}
        return digests if len(digests) > 1 else next(iter(digests.values()))

    def comparison(self, point: Point, subject: Subject, images: int, pictures: int) -> str:
        """The digest of a comparison. The images that are compared are other samples than the calibration's."""
        return comparison_digest(
            self.model, self.settings, subject, seed=seed_after(point.seed), images=images, pictures=pictures
        )

    # -------------------------------------------------------------------------------------------- measuring

    def entries(
        self,
        subjects: Sequence[tuple[Point, Subject]],
        results: ResultsFolder,
        *,
        images: int = 0,
        pictures: int = 0,
        in_process: bool = True,
    ) -> list[Entry]:
        """An entry for every subject, with its bytes, and its memory and times where they were measured before; all
        plans are saved."""
        entries, kept = [], {"memory": 0, "time": 0}
        for point, subject in subjects:
            row = self._first_row(point, subject, self.comparison(point, subject, images, pictures))
            memory = times = None
            if row.error is None:
                memory = results.memory(row.measurement, own=not in_process)
                times = results.times(row.measurement, self.repeats)
            for what, part in zip(kept, (memory, times), strict=True):
                if part is not None:
                    row = row.updated(part)
                    kept[what] += 1
            entries.append(Entry(point, subject, row))
        files = results.save_plans([e.subject for e in entries], [self.files_name(e, entries) for e in entries])
        for entry, plans in zip(entries, files, strict=True):
            entry.row = replace(entry.row, plans=plans)
        for what, count in kept.items():
            if count:
                self.reporter.say(
                    f"the {what} of {count} of {len(entries)} was measured before: taken from {results.folder}; "
                    "another folder measures anew"
                )
        return entries

    def _first_row(self, point: Point, subject: Subject, comparison: str) -> ResultRow:
        make = partial(
            first_row, self.model, subject, batch=point.batch, rows=point.rows, seed=point.seed, comparison=comparison,
            measurement=measurement_digest(self.model, self.settings, subject, seed=point.seed, batch=point.batch),
        )  # fmt: skip
        try:
            row = make()
        except Exception as error:
            if not out_of_memory(error):
                raise
            row = make(allocate=False).updated(self._unmeasured(point, subject, why_failed(error)))
        cfg, settings = self.settings.to_json()["cfg"], subject.plans[0].settings
        if row.predicted_kl is None or settings.get("predicted_cfg", cfg) in (None, cfg):
            return row
        self.reporter.say(
            f"{subject.name}: its KL was predicted for cfg {settings['predicted_cfg']}, this run has {cfg}"
        )
        return replace(row, predicted_kl=None)

    def files_name(self, entry: Entry, entries: Sequence[Entry]) -> str:
        """Of the subject and its point; batches share files where they share plans."""
        first = next(other for other in entries if other.row.comparison == entry.row.comparison)
        alike = [e for e in entries if (e.subject.name, e.point.seed) == (entry.subject.name, entry.point.seed)]
        several = len({other.row.comparison for other in alike}) > 1
        return f"{entry.subject.name}{self.point_name(first.point, batch=several)}"

    def measure(
        self, entries: Sequence[Entry], results: ResultsFolder, *, in_process: bool = True, snapshot: bool = False
    ) -> None:
        """Add memory and times to the records that lack them, saving each. `in_process` measures memory here, quickly,
        and not in a fresh process for every record; `snapshot` writes the CUDA allocator's history of each."""
        results.save([entry.row for entry in entries])
        measure = self._memory_here if in_process else self._memory_of_fresh_process
        missing: list[tuple[Entry, Path | None]] = []
        for entry in entries:
            stem = f"{file_name(entry.subject.name)}{self.point_name(entry.point)}"
            name = f"snapshot_{stem}_{entry.row.measurement[:8]}.pickle"  # of this very measurement
            path = results.folder / name if snapshot else None
            if (entry.row.memory is None and entry.row.error is None) or (path is not None and not path.exists()):
                missing.append((entry, path))
        with self.reporter.progress("measuring memory", len(missing)) as advance:
            for entry, path in missing:
                memory = measure(entry, path)
                if memory.error is not None:
                    memory = self._unmeasured(entry.point, entry.subject, memory.error)
                entry.row = entry.row.updated(memory)
                results.save([entry.row for entry in entries])
                advance(1)
        self._time(entries, results)

    def _memory_here(self, entry: Entry, snapshot: Path | None) -> Memory:
        if snapshot is not None:
            record_snapshots()
        try:
            memory = subject_memory(self.model, entry.subject, entry.point.batch, self.settings, seed=entry.point.seed)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return Memory(error=why_failed(error))
        if snapshot is not None:
            save_snapshot(snapshot)
        return memory

    def _memory_of_fresh_process(self, entry: Entry, snapshot: Path | None) -> Memory:
        if self.loading is None:
            raise ModelError(
                f"a fresh process cannot load {self.model.name}: give `loading`, the arguments of load_model, or "
                "measure it in this process (in_process)"
            )
        subject = entry.subject
        return measure_in_new_process(
            Job(
                self.loading, self.model.fingerprint, self.settings, subject.plans[0].to_json(),
                subject.storage, subject.attention, entry.point.batch, entry.point.seed, snapshot,
            )
        )  # fmt: skip

    def _unmeasured(self, point: Point, subject: Subject, error: str) -> Memory:
        self.reporter.say(f"{subject.name}{self.point_name(point).replace('_', ' ')} was not measured: {error}")
        return Memory(error=error)

    def _time(self, entries: Sequence[Entry], results: ResultsFolder) -> None:
        """Times of what could be drawn and has none, in turns with all others of its point."""
        missing = [entry for entry in entries if entry.row.latency_ms is None and entry.row.error is None]
        runs = len(missing) * self.repeats * (2 if self.model.device.type == "cuda" else 1)
        with self.reporter.progress("timing", runs) as advance:
            for point in self.points:
                untimed = [entry for entry in missing if entry.point == point]
                if untimed:
                    self._time_in_turns(untimed, point, lambda: advance(1))
                    results.save([entry.row for entry in entries])

    def _time_in_turns(self, entries: Sequence[Entry], point: Point, advance: Callable[[], object]) -> None:
        machine = timing_machine(self.model.device)
        if machine.load is not None and machine.load.reasons:
            busy = ", ".join(machine.load.reasons)
            self.reporter.say(f"warning: the machine is busy ({busy}); times will be too long and spread")
        try:
            times, no_graphs = measure_latency(
                self.model, [entry.subject for entry in entries], batch=point.batch, settings=self.settings,
                repeats=self.repeats, machine=machine, seed=point.seed, progress=advance,
            )  # fmt: skip
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.reporter.say(f"{point.batch} images of {len(entries)} policies were not timed: {why_failed(error)}")
            return
        for entry in entries:
            entry.row = entry.row.updated(times[entry.subject.name])
        for name, reason in no_graphs.items():
            self.reporter.say(f"{name} has no time with graphs: {reason}")
