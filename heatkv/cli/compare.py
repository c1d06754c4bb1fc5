"""`heatkv compare`, the main job: memory, time and what is lost, of policies side by side on one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from heatkv.cli.folder_statistics import statistics_of_folder
from heatkv.cli.measurement import DEFAULT_BUDGETS, Line, Measurement, Point, finish_results, told_when_stopped
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
    Without,
)
from heatkv.cli.output import make_folder, say, shared_progress
from heatkv.core.schema import seed_after
from heatkv.errors import HeatKVError
from heatkv.parallel.ranks import current

if TYPE_CHECKING:
    from heatkv.profiling.measure.subjects import Subject
    from heatkv.profiling.results.folder import ResultsFolder
    from heatkv.profiling.results.row import Fidelity


DEFAULT_POLICIES = "heatkv,sliding-window,streaming,random"
PICTURES = 16
"""Images that are drawn freely, where as many are compared."""


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
    pictures: Annotated[
        int | None,
        typer.Option(
            "--pictures", help=f"of them, images drawn freely and compared (PSNR, SSIM); default {PICTURES} at most"
        ),
    ] = None,
    draws: Annotated[int, typer.Option("--draws", help="plans of every policy that draws at random")] = 3,
    repeats: Repeats = 5,
    sweep: Annotated[Sweep, Without("in_process")],
    running: Running,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """The main job: calibrate if needed, plan, draw, measure; a table, results.json, pictures and report.html. It
    goes on where it was stopped, and shares comparisons over the ranks that torchrun starts.

    Example: heatkv compare --model emoji --policies heatkv,streaming --budgets 20%,10% --out results/compare
    """
    from heatkv.profiling.analysis.plan_view import save_scas_maps
    from heatkv.profiling.measure.runner import with_versus
    from heatkv.profiling.report.charts import save_image_sheet
    from heatkv.profiling.report.page import check_report_replaceable
    from heatkv.profiling.results.artefacts import save_scas
    from heatkv.profiling.results.folder import ResultsFolder, check_replaceable

    positive(samples=samples, images=images, draws=draws, repeats=repeats)
    if pictures is None:
        pictures = min(PICTURES, images)
    positive(pictures=pictures)
    if pictures > images:
        raise HeatKVError(
            f"--pictures {pictures} is more than the {images} images that are compared, whose first ones are drawn "
            f"freely; write --images {pictures}, or at most {images} pictures"
        )
    check_replaceable(out)
    check_report_replaceable(out)
    # a fresh process for every row would take longer than all the rest; `profile` has them
    quick = replace(sweep, in_process=True)
    measurement = Measurement(source, policies, DEFAULT_POLICIES, budgets, plan, ranking, running, quick)
    measurement.check()
    model, settings = measurement.model, measurement.settings
    statistics = measurement.statistics
    if measurement.lacks_statistics:
        folder = make_folder(out)
        # of the least seed: images are compared at seeds above it
        seed = min(measurement.seeds)
        statistics = statistics_of_folder(
            folder, model, samples, seed, settings, measurement.levels, measurement.level_sinks
        )
    subjects = measurement.subjects(statistics, draws)
    folder = make_folder(out)
    request = msgspec.structs.replace(
        measurement.request(repeats), images=images, pictures=pictures, draws=draws,
        samples_digest=measurement.samples(images),
        statistics=None if statistics is None else statistics.provenance.to_json(),
    )  # fmt: skip
    results = ResultsFolder(folder, model, settings, request, pictures)
    ranks = current()
    by_digest = measurement.by_comparison(subjects, images, pictures)
    if not ranks.first:
        missing = {digest: by_digest[digest] for digest in ranks.gather([])[0]}
        _compare_all(measurement, missing, results, images, pictures, lambda *_: None)
        ranks.wait()
        for digest in missing:  # where this rank does not see the folder of the first
            results.parts.remove(f"{digest}.")
        return
    with told_when_stopped(results):
        lines = measurement.lines(subjects, results, images, pictures, repeats, resume)
        drawn = _take_earlier(lines, results)
        # alone, as others at work would colour times
        measurement.measure(lines, repeats, results)

        def finish(digest: str, figures: Fidelity, pictures_B3HW: Any) -> None:
            first = next(line for line in lines if line.row.comparison == digest)
            drawn[digest] = pictures_B3HW
            results.save_pictures(measurement.files_name(first, lines), digest, drawn[digest])
            for line in lines:
                if line.row.comparison == digest:
                    line.row = line.row.updated(figures)
            results.save([line.row for line in lines])
            if ranks.size == 1:  # others may be writing parts
                results.parts.remove(f"{digest}.")

        missing = {digest: at for digest, at in by_digest.items() if digest not in drawn}
        ranks.gather(list(missing))
        _compare_all(measurement, missing, results, images, pictures, finish)
    rows = with_versus([line.row for line in lines])
    for figure, reason in (rows[0].not_measured or {}).items():
        say(f"no {figure.upper()}: {reason}")
    for name, pictures_of in _sheets(measurement, lines, drawn).items():
        budget = pictures_of[1][2]
        path = folder / f"images_{name.replace('%', 'percent')}.png"
        save_image_sheet(
            path, [(policy, images) for policy, images, _ in pictures_of], min(pictures, 12),
            f"{model.name}, cache of {budget}",
        )  # fmt: skip
    if statistics is not None:
        save_scas_maps(folder / "scas.png", statistics)
        save_scas(folder / "scas.json", statistics)
    title = f"{measurement.title}, KL and top-1 over {images} images, PSNR and SSIM over {pictures}"
    finish_results(results, rows, title, as_json, report=True)
    ranks.wait()


_Drawn = dict[str, Any]
"""Pictures by the digest of the comparison that they are of."""


def _take_earlier(lines: Sequence[Line], results: ResultsFolder) -> _Drawn:
    """Fill in the comparisons that were made before, ahead of the first save; the pictures of these."""
    drawn: _Drawn = {}
    count = 0
    for line in lines:
        digest = line.row.comparison
        earlier = results.fidelity(digest)
        if earlier is not None:
            figures, drawn[digest] = earlier
            line.row = line.row.updated(figures)
            count += 1
    if count:
        say(f"{count} of {len(lines)} comparisons were made before: taken from {results.path.parent}")
    return drawn


def _compare_all(
    measurement: Measurement,
    subjects: Mapping[str, tuple[Point, Subject]],
    results: ResultsFolder,
    images: int,
    pictures: int,
    finish: Callable[[str, Fidelity, Any], None],
) -> None:
    """Compare the subjects, by the digests of their comparisons, with the full cache; `finish` is given figures and
    pictures of each. Several ranks share them batch by batch of images; every batch is kept when it is done."""
    from heatkv.profiling.measure.fidelity import (
        Compared,
        FidelityBench,
        drawings,
        image_batches,
        load_compared,
        save_compared,
    )
    from heatkv.profiling.results.folder import part_name

    ranks, batches = current(), image_batches(images)
    # one after another, so that a stopped run has whole rows; or batch by batch, so that a rank draws few references
    seeds = dict.fromkeys(point.seed for point, _ in subjects.values())
    groups = [[digest] for digest in subjects]
    if ranks.size > 1:
        groups = [[digest for digest, (point, _) in subjects.items() if point.seed == seed] for seed in seeds]
    parts_of = [
        {part_name(digest, samples): (digest, index) for index, samples in enumerate(batches) for digest in group}
        for group in groups
    ]
    missing = [results.parts.missing(list(names), ranks) for names in parts_of]

    def work(names: Sequence[str], of: Mapping[str, tuple[str, int]]) -> int:
        return sum(len(subjects[of[n][0]][1].plans) * drawings(batches[of[n][1]], pictures) for n in names)

    references = images * len(seeds)
    if ranks.size > 1:
        touched = [
            {of[name][1] for name in ranks.share_of(names, rank)}
            for names, of in zip(missing, parts_of, strict=True) for rank in range(ranks.size)
        ]  # fmt: skip
        references = sum(len(batches[index]) for indices in touched for index in indices)
    total = references + sum(work(names, of) for names, of in zip(missing, parts_of, strict=True))
    with shared_progress("comparing", total) as advance:
        bench: FidelityBench | None = None
        seed = None
        for group, of, lacking in zip(groups, parts_of, missing, strict=True):
            if bench is None or subjects[group[0]][0].seed != seed:
                bench = None  # frees its references first
                seed = subjects[group[0]][0].seed
                bench = FidelityBench(
                    measurement.model, images=images, pictures=pictures, seed=seed_after(seed),
                    settings=measurement.settings, hold=ranks.size == 1, progress=advance,
                )  # fmt: skip

            def make(name: str, path: Path, of: Mapping[str, tuple[str, int]] = of, by: FidelityBench = bench) -> None:
                digest, index = of[name]
                save_compared(path, by.compare_plans(subjects[digest][1], index), pictures)

            results.parts.fill(list(of), ranks.share_of(lacking, ranks.rank), make, ranks)
            for digest in group if ranks.first else ():
                compared = [load_compared(results.parts.path(part_name(digest, samples))) for samples in batches]
                of_plans = [Compared.join(of_plan) for of_plan in zip(*compared, strict=True)]
                finish(digest, bench.figures(of_plans), of_plans[0].pictures_P3HW)


def _sheets(measurement: Measurement, lines: Sequence[Line], drawn: _Drawn) -> dict[str, list[tuple[str, Any, str]]]:
    """(policy, pictures, budget) of every sheet by its name; the full cache's first. Batches share a sheet."""
    sheets: dict[str, list[tuple[str, Any, str]]] = {}
    full: dict[int, Any] = {}
    batch = measurement.points[0].batch
    for line in lines:
        pictures, seed, subject = drawn[line.row.comparison], line.point.seed, line.subject
        if line.point.batch != batch:
            continue
        if subject.policy == "full":
            full[seed] = pictures
            continue
        name = subject.budget + measurement.point_name(line.point, batch=False)
        sheet = sheets.setdefault(name, [("full", full[seed], "100%")])
        sheet.append((subject.policy, pictures, subject.budget))
    return sheets
