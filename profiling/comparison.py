"""The main jobs as functions: policies side by side on one model, by memory, time and what is lost.

`compare` and `profile` write a folder as the commands of these names do, and go on where an earlier run was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor

from heatkv.calibration.run import statistics_of_folder
from heatkv.core.budget import Budget
from heatkv.core.io import clear_temporaries, make_folder
from heatkv.core.schema import seed_after, whole
from heatkv.errors import HeatKVError, RanksError
from heatkv.generation.batches import AT_ONCE
from heatkv.generation.micro_batches import images_that_fit
from heatkv.models.base import ImageModel
from heatkv.parallel.ranks import current
from heatkv.parallel.reporter import Reporter, shared_progress
from heatkv.policies.base import EvictionPolicy
from heatkv.profiling.analysis.plan_view import save_scas_maps
from heatkv.profiling.measure.fidelity import (
    Compared,
    FidelityBench,
    drawings,
    image_batches,
    load_compared,
    save_compared,
)
from heatkv.profiling.measure.memory import check_snapshots
from heatkv.profiling.measure.runner import with_versus
from heatkv.profiling.measure.subjects import Subject
from heatkv.profiling.measure.trace import save_trace
from heatkv.profiling.report.charts import save_image_sheet
from heatkv.profiling.report.page import check_report_replaceable, write_report
from heatkv.profiling.results.artefacts import save_scas
from heatkv.profiling.results.folder import ResultsFolder, check_replaceable, part_name
from heatkv.profiling.results.row import Results, read_results
from heatkv.profiling.sweep import BUDGETS, Entry, Point, Sweep, SweepOptions

COMPARED = ("heatkv", "sliding-window", "streaming", "random")
PROFILED = ("sliding-window", "streaming")
PICTURES = 16
"""Images that are drawn freely, where as many are compared."""
SHEET_COLUMNS = 12

Subjects = Mapping[str, tuple[Point, Subject]]
"""Where and what is compared, by the digest of the comparison."""


def profile(
    model: str | ImageModel[Any],
    policies: Sequence[str | EvictionPolicy] = PROFILED,
    budgets: Sequence[str | Budget] = BUDGETS,
    *,
    out: str | Path,
    in_process: bool = False,
    trace: str | Path | None = None,
    snapshot: bool = False,
    **options: Unpack[SweepOptions],
) -> Results:
    """The records of memory and latency of every policy at every budget, batch and seed; written to the folder `out`.

    Memory is measured in a fresh process for every record, unless `in_process`. `trace` is a folder for traces of
    torch's profiler; `snapshot` writes the CUDA allocator's history of every record. For `options` see SweepOptions.
    Raises HeatKVError before anything is measured for what cannot be.
    """
    check_replaceable(Path(out))
    sweep = Sweep(model, policies, budgets, **options)
    if snapshot:
        check_snapshots(sweep.model.device)
    subjects = sweep.subjects()
    results = ResultsFolder(make_folder(out), sweep.model, sweep.settings, sweep.request())
    with _kept_when_stopped(results, sweep.reporter):
        entries = sweep.entries(subjects, results, in_process=in_process)
        sweep.measure(entries, results, in_process=in_process, snapshot=snapshot)
        if trace is not None:
            folder = make_folder(trace)
            for point, subject in subjects:
                name = sweep.point_name(point, batch=False)
                save_trace(folder, sweep.model, subject, point.batch, sweep.settings, name)
            clear_temporaries(folder)
    return _finish(results, entries, sweep.reporter)


def compare(
    model: str | ImageModel[Any],
    policies: Sequence[str | EvictionPolicy] = COMPARED,
    budgets: Sequence[str | Budget] = BUDGETS,
    *,
    out: str | Path,
    samples: int = 64,
    images: int = 32,
    pictures: int | None = None,
    draws: int = 3,
    **options: Unpack[SweepOptions],
) -> Results:
    """The records of memory, latency and fidelity of every policy at every budget, batch and seed; written to the
    folder `out` with pictures, plans and report.html.

    Where a policy needs statistics and none are given, `samples` images are calibrated on. Fidelity is against the full
    cache: KL and agreement over `images` images, PSNR and SSIM over the first `pictures` of them (default: 16 at
    most). A policy that draws at random has `draws` plans. Several ranks share the comparisons. For `options` see
    SweepOptions. Raises HeatKVError before anything is measured for what cannot be.
    """
    out = Path(out)
    images, draws = whole(images, "images", HeatKVError, 1), whole(draws, "draws", HeatKVError, 1)
    pictures = whole(min(PICTURES, images) if pictures is None else pictures, "pictures", HeatKVError, 1, images)
    check_replaceable(out)
    check_report_replaceable(out)
    sweep = Sweep(model, policies, budgets, **options)
    if sweep.lacks_statistics:
        # of the least seed: images are compared at seeds above it
        sweep.statistics = statistics_of_folder(
            make_folder(out), sweep.model, whole(samples, "samples", HeatKVError, 1), seed=min(sweep.seeds),
            settings=sweep.settings, levels=sweep.level_cost, sink_scales=sweep.level_sinks, reporter=sweep.reporter,
        )  # fmt: skip
    subjects = sweep.subjects(draws)
    provenance = None if sweep.statistics is None else sweep.statistics.provenance.to_json()
    request = sweep.request(
        images=images, pictures=pictures, draws=draws, samples_digest=sweep.samples(images), statistics=provenance
    )
    results = ResultsFolder(make_folder(out), sweep.model, sweep.settings, request, pictures)
    comparison = _Comparison(sweep, results, images, pictures, _by_comparison(sweep, subjects, images, pictures))
    ranks = current()
    if not ranks.first:
        comparison.run(ranks.gather([])[0])
        ranks.wait()
        comparison.discard_parts()  # where this rank does not see the folder of the first
        return results.with_rows(())
    with _kept_when_stopped(results, sweep.reporter):
        comparison.entries = sweep.entries(subjects, results, images=images, pictures=pictures)
        comparison.take_earlier()
        sweep.measure(comparison.entries, results)  # alone, as others at work would colour times
        missing = [digest for digest in comparison.subjects if digest not in comparison.pictures_of]
        ranks.gather(missing)
        comparison.run(missing)
    for entry, row in zip(comparison.entries, with_versus([e.row for e in comparison.entries]), strict=True):
        entry.row = row
    comparison.save_sheets()
    written = _finish(results, comparison.entries, sweep.reporter)
    with sweep.reporter.progress("drawing the report", 1):
        write_report([out], out)
    ranks.wait()
    return written


@contextmanager
def _kept_when_stopped(results: ResultsFolder, reporter: Reporter) -> Iterator[None]:
    """Say, when interrupted within, where what was measured is, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if results.partial.exists():
            reporter.say(f"what was measured so far is in {results.partial}; the same command goes on from there")
        raise


def _finish(results: ResultsFolder, entries: Sequence[Entry], reporter: Reporter) -> Results:
    moved = results.finish([entry.row for entry in entries])
    if moved is not None:
        reporter.say(f"{results.path} held other results; they are in {moved} now")
    for figure, reason in (entries[0].row.not_measured or {}).items():
        reporter.say(f"no {figure.upper()}: {reason}")
    return read_results(results.path)


def _by_comparison(
    sweep: Sweep, subjects: Sequence[tuple[Point, Subject]], images: int, pictures: int
) -> dict[str, tuple[Point, Subject]]:
    """The first subject of every comparison by its digest. Raises RanksError where ranks differ."""
    found: dict[str, tuple[Point, Subject]] = {}
    for point, subject in subjects:
        found.setdefault(sweep.comparison(point, subject, images, pictures), (point, subject))
    for rank, digests in enumerate(current().gather(list(found))):
        if digests != list(found):
            raise RanksError(
                f"rank {rank} makes other comparisons than rank {current().rank}; all need the same releases, files "
                "and devices"
            )
    return found


@dataclass
class _Comparison:
    """Fidelity of subjects against the full cache, batch by batch of images, each kept when it is done.

    `entries` are the records that figures go to, on the first rank; `pictures_of` has the pictures of every comparison.
    """

    sweep: Sweep
    results: ResultsFolder
    images: int
    pictures: int
    subjects: Subjects
    entries: Sequence[Entry] = ()
    pictures_of: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def batch(self) -> int:
        """Images compared at once, the same on all ranks: no more than memory, and every budget in bytes, has room
        for."""
        most = [plan.most_rows(self.sweep.storage) for _, subject in self.subjects.values() for plan in subject.plans]
        each = self.sweep.settings.rows_per_image
        fitting: list[int] = current().gather(images_that_fit(self.sweep.model, each, AT_ONCE))
        return max(1, min([*fitting, *(rows // each for rows in most if rows is not None)]))

    def take_earlier(self) -> None:
        """Fill in the comparisons that an earlier run made."""
        count = 0
        for entry in self.entries:
            earlier = self.results.fidelity(entry.row.comparison)
            if earlier is not None:
                figures, self.pictures_of[entry.row.comparison] = earlier
                entry.row = entry.row.updated(figures)
                count += 1
        if count:
            self.sweep.reporter.say(
                f"{count} of {len(self.entries)} comparisons were made before: taken from {self.results.folder}"
            )

    def run(self, missing: Sequence[str]) -> None:
        """Compare these; several ranks share batches of images."""
        ranks, batches = current(), image_batches(self.images, self.batch)
        # one after another, so that a stopped run has whole records; or all of a seed batch by batch, so that a rank
        # draws few references
        groups = [[digest] for digest in missing]
        if ranks.size > 1:
            seeds = dict.fromkeys(self.subjects[digest][0].seed for digest in missing)
            groups = [[d for d in missing if self.subjects[d][0].seed == seed] for seed in seeds]
        parts = [
            {part_name(digest, images): (digest, index) for index, images in enumerate(batches) for digest in group}
            for group in groups
        ]
        lacking = [self.results.parts.missing(list(names), ranks) for names in parts]
        with shared_progress(self.sweep.reporter, "comparing", self._work(parts, lacking, batches)) as advance:
            bench: FidelityBench | None = None
            for group, places, names in zip(groups, parts, lacking, strict=True):
                seed = seed_after(self.subjects[group[0]][0].seed)
                if bench is None or bench.seed != seed:
                    bench = None  # frees its references first
                    bench = FidelityBench(
                        self.sweep.model, images=self.images, pictures=self.pictures, seed=seed,
                        settings=self.sweep.settings, batch=self.batch, hold=ranks.size == 1, progress=advance,
                    )  # fmt: skip
                self._compare(bench, places, ranks.share_of(names, ranks.rank))
                for digest in group if ranks.first else ():
                    self._finish(bench, digest, batches)

    def _compare(self, bench: FidelityBench, places: Mapping[str, tuple[str, int]], names: Sequence[str]) -> None:
        """Have all parts of these places at every rank; this one makes those of the names."""

        def make(name: str, path: Path) -> None:
            digest, index = places[name]
            save_compared(path, bench.compare_plans(self.subjects[digest][1], index), self.pictures)

        self.results.parts.fill(list(places), names, make, current())

    def _work(
        self,
        parts: Sequence[Mapping[str, tuple[str, int]]],
        lacking: Sequence[Sequence[str]],
        batches: Sequence[range],
    ) -> int:
        """Drawings that all ranks will make, references included."""
        ranks, work = current(), 0
        seeds = {self.subjects[digest][0].seed for places in parts for digest, _ in places.values()}
        references = self.images * len(seeds) if ranks.size == 1 else 0
        for places, names in zip(parts, lacking, strict=True):
            for name in names:
                digest, index = places[name]
                work += len(self.subjects[digest][1].plans) * drawings(batches[index], self.pictures)
            if ranks.size > 1:
                for rank in range(ranks.size):
                    touched = {places[name][1] for name in ranks.share_of(names, rank)}
                    references += sum(len(batches[index]) for index in touched)
        return work + references

    def _finish(self, bench: FidelityBench, digest: str, batches: Sequence[range]) -> None:
        """Put the figures of a comparison into its records, and save its pictures."""
        compared = [load_compared(self.results.parts.path(part_name(digest, images))) for images in batches]
        plans = [Compared.join(of_plan) for of_plan in zip(*compared, strict=True)]
        figures, drawn = bench.figures(plans), plans[0].pictures_P3HW
        assert drawn is not None  # at least one is drawn
        self.pictures_of[digest] = drawn
        own = [entry for entry in self.entries if entry.row.comparison == digest]
        self.results.save_pictures(self.sweep.files_name(own[0], self.entries), digest, drawn)
        for entry in own:
            entry.row = entry.row.updated(figures)
        self.results.save([entry.row for entry in self.entries])
        if current().size == 1:  # others may be writing parts
            self.results.parts.remove(f"{digest}.")

    def discard_parts(self) -> None:
        """Remove what is kept of all comparisons."""
        for digest in self.subjects:
            self.results.parts.remove(f"{digest}.")

    def save_sheets(self) -> None:
        """A sheet of pictures for every budget and seed, the full cache's first; batches share a sheet. And the
        statistics that plans were made from."""
        if self.sweep.statistics is not None:
            save_scas_maps(self.results.folder / "scas.png", self.sweep.statistics)
            save_scas(self.results.folder / "scas.json", self.sweep.statistics)
        entries = [entry for entry in self.entries if entry.point.batch == self.sweep.points[0].batch]
        drawn = {id(entry): self.pictures_of[entry.row.comparison] for entry in entries}
        full = {entry.point.seed: drawn[id(entry)] for entry in entries if entry.subject.policy == "full"}
        sheets: dict[tuple[str, int], list[Entry]] = {}
        for entry in entries:
            if entry.subject.policy != "full":
                sheets.setdefault((entry.subject.budget, entry.point.seed), []).append(entry)
        for (budget, seed), shown in sheets.items():
            name = f"{budget}{self.sweep.point_name(shown[0].point, batch=False)}".replace("%", "percent")
            lines = [("full", full[seed]), *((entry.subject.policy, drawn[id(entry)]) for entry in shown)]
            save_image_sheet(
                self.results.folder / f"images_{name}.png", lines, min(self.pictures, SHEET_COLUMNS),
                f"{self.sweep.model.name}, cache of {budget}",
            )  # fmt: skip
