"""A calibration into a file: batches are kept beside it until all are done, so that it can be stopped, go on, and be
shared over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from heatkv.calibration.fisher import calibrate_fisher
from heatkv.calibration.level_costs import calibrate_biases, calibrate_levels, level_choices
from heatkv.calibration.measure import calibrate as measure
from heatkv.calibration.measure import measured_settings, ranking_agreement, sample_names
from heatkv.core.io import check_place, clear_temporaries, in_file, versions
from heatkv.core.levels import SINK_SCALES
from heatkv.core.schema import seed_of, suggest, whole
from heatkv.core.statistics import COSTS, LevelStatistics, Statistics
from heatkv.errors import FormatError, HeatKVError, RanksError, StatisticsError
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.parallel.parts import Parts, load_arrays, save_arrays
from heatkv.parallel.ranks import current
from heatkv.parallel.reporter import SILENT, Reporter, shared_progress

MOST_AT_ONCE = 16
"""Images in a batch at most."""
LEVEL_SAMPLES = 32
"""Images that level costs are measured on."""
BIAS_SAMPLES = 16
"""Images that the biases of level costs are measured on."""

_BIAS_PART = "biases"
_MEASURE = {"error": calibrate_levels, "fisher": calibrate_fisher}
Make = Callable[[range, Path, Callable[[int], object]], object]
"""Measures these images into a part, with progress."""


@dataclass(frozen=True)
class Calibrated:
    """Statistics, and of the batches measured for them those that are known, to compare halves of."""

    statistics: Statistics
    batches: tuple[Statistics, ...] = ()

    def agreement_of_halves(self) -> list[float] | None:
        """Spearman correlation of the head rankings of two disjoint halves, per source scale; None of one batch."""
        if len(self.batches) < 2:
            return None
        return [float(x) for x in ranking_agreement(_merged(self.batches[::2]), _merged(self.batches[1::2]))]


def calibrate(
    model: ImageModel[Any],
    samples: int = 64,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    levels: str | None = None,
    level_samples: int = LEVEL_SAMPLES,
    sink_scales: int | None = None,
    append: bool = False,
    resume: bool = False,
    reporter: Reporter = SILENT,
) -> Statistics:
    """Statistics over `samples` images of all classes (or example prompts) in turn, drawn with the full cache.

    With `out` they are written to that file, batch by batch: `append` adds to a file that is there, `resume` goes on
    with a run that was stopped. `levels` ("error" or "fisher") also measures what coarser levels cost, on
    `level_samples` images, for plans of `sink_scales` sinks or more. Several ranks share the batches. Raises
    StatisticsError and FormatError before anything is measured for what cannot be, and NumericsError for numbers that
    are not finite, with their place.
    """
    settings = model.sampling if settings is None else settings
    if out is None and levels is None:
        return measure(model, samples, seed=seed, settings=settings)
    if out is None:
        raise StatisticsError("level costs are measured batch by batch into a file; name it as out")
    return calibrate_into(
        Path(out), model, samples, seed=seed, settings=settings, levels=levels, level_samples=level_samples,
        sink_scales=sink_scales, append=append, resume=resume, reporter=reporter,
    ).statistics  # fmt: skip


def calibrate_into(
    out: Path,
    model: ImageModel[Any],
    samples: int,
    *,
    seed: int,
    settings: Settings,
    levels: str | None = None,
    level_samples: int = LEVEL_SAMPLES,
    sink_scales: int | None = None,
    append: bool = False,
    resume: bool = False,
    batch_sizes: Sequence[int] | None = None,
    reporter: Reporter = SILENT,
) -> Calibrated:
    """As `calibrate`, with the batches measured; `batch_sizes` are theirs."""
    samples, seed = whole(samples, "samples", StatisticsError, 1), seed_of(seed, StatisticsError)
    level_samples = whole(level_samples, "level_samples", StatisticsError, 1)
    if levels is not None and levels not in COSTS:
        raise StatisticsError(f"unknown level costs {levels!r}{suggest(levels, COSTS)}")
    there = out.exists()
    if there and not (append or resume):
        raise FormatError(f"{out} exists; append samples to it, or name another file")
    if append and not there:
        raise FormatError(f"{out} does not exist, so nothing can be appended to it")
    check_place(out)
    found = continued(out, model, settings) if there else None
    before = found if append else None
    costs = None
    if levels is not None:
        with in_file(out):
            costs = LevelCosts(levels, _level_sinks(before, model, levels, sink_scales), level_samples)
    sizes = batches_of(samples) if batch_sizes is None else batch_sizes
    run = CalibrationRun(out, model, settings, seed, sizes, before, costs, reporter)
    stopped = run.check_stopped(resume)
    if run.is_in(found) or (stopped is not None and _is_of(found, stopped)):
        assert found is not None
        reporter.say(f"{out} was finished before: nothing is measured")
        calibrated = Calibrated(found, run.kept_batches())
    elif found is not before:
        raise FormatError(f"{out} exists, and no run that writes it was stopped; append samples to it")
    else:
        calibrated = run.measure()
        run.write(calibrated.statistics)
    run.close()
    return calibrated


def statistics_of_folder(
    folder: Path,
    model: ImageModel[Any],
    samples: int,
    *,
    seed: int,
    settings: Settings,
    levels: str | None = None,
    sink_scales: int = SINK_SCALES,
    reporter: Reporter = SILENT,
) -> Statistics:
    """The statistics of a folder of results: those of an earlier run as far as they fit, the rest measured now.

    `levels` is the kind of level costs that is wanted too, `sink_scales` the fewest sinks of plans from them. Raises
    StatisticsError for statistics of other samples or level costs of another kind, which are not replaced.
    """
    path = folder / "statistics.safetensors"
    before = continued(path, model, settings) if path.exists() else None
    done, costs, missing = 0, None, LEVEL_SAMPLES
    if before is not None:
        done, names = before.count, sample_names(model, seed, model.labels(samples), 0)
        if list(before.samples) != names[:done]:
            raise StatisticsError(
                f"{path} holds {done} other samples than the {samples} of this run; plan from it as statistics, or "
                "write to another folder"
            )
        if levels is not None and before.levels is not None:
            with in_file(path):
                sink_scales = _level_sinks(before, model, levels, None, most=sink_scales)
            missing -= len(before.levels.samples)
    if levels is not None and missing > 0:
        costs = LevelCosts(levels, min(sink_scales, SINK_SCALES), missing)
    sizes = batches_of(samples - done) if done < samples else []
    run = CalibrationRun(path, model, settings, seed, sizes, before, costs, reporter)
    run.check_stopped(resume=True)
    if before is not None and not sizes and costs is None:
        reporter.say(f"using {path} ({done} samples)")
        run.close()
        return before
    calibrated = run.measure()
    kept = () if before is None else (before,)
    agreement = replace(calibrated, batches=(*kept, *calibrated.batches)).agreement_of_halves()
    if agreement is not None:
        reporter.say(
            f"calibrated on {samples} samples; head rankings of two halves agree by "
            f"{sum(agreement) / len(agreement):.2f} (Spearman, mean over scales; worst {min(agreement):.2f})"
        )
    run.write(calibrated.statistics)
    run.close()
    return calibrated.statistics


def continued(path: Path, model: ImageModel[Any], settings: Settings) -> Statistics:
    """Statistics in a file that this model, drawing with these settings, can add to. Raises StatisticsError."""
    found = Statistics.load(path)
    found.check_geometry(model.geometry)
    found.check_fingerprint(model.fingerprint)
    cfg, others = measured_settings(settings, model)
    measured, wanted = {"cfg": found.provenance.cfg, **found.provenance.settings}, {"cfg": cfg, **others}
    if measured != wanted:
        this, that = _differing(measured, wanted)
        raise StatisticsError(f"{path} was measured with {this}, this run has {that}; write to another file")
    return found


def check_statistics(statistics: Statistics, model: ImageModel[Any], settings: Settings) -> None:
    """Raise StatisticsError for statistics of another geometry, of other weights, or of another guidance."""
    statistics.check_geometry(model.geometry)
    statistics.check_fingerprint(model.fingerprint)
    measured, wanted = statistics.provenance.cfg, settings.to_json()["cfg"]
    if measured is not None and wanted is not None and measured != wanted:
        raise StatisticsError(f"measured at cfg {measured:g}, this run has {wanted}; calibrate at that")


def _differing(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, str]:
    names = [name for name in {**other, **one} if one.get(name) != other.get(name)]
    return tuple(", ".join(f"{name}={values.get(name)}" for name in names) for values in (one, other))  # type: ignore[return-value]


def _level_sinks(
    before: Statistics | None, model: ImageModel[Any], cost: str, wanted: int | None, most: int | None = None
) -> int:
    """The sinks that level costs are measured with: the file's own where it has such costs, which must be of this kind
    and with `wanted` sinks, or at most `most`."""
    costs = None if before is None else before.levels
    if costs is None:
        return level_choices(model.geometry.schedule, SINK_SCALES if wanted is None else wanted).sink_scales
    sinks = costs.choices.sink_scales
    if costs.cost != cost or wanted not in (None, sinks) or (most is not None and sinks > most):
        raise StatisticsError(
            f"has level costs of the kind {costs.cost!r} with sink_scales={sinks}, not {cost!r} with "
            f"{most if wanted is None else wanted}; measure these into another file"
        )
    return sinks


@dataclass(frozen=True)
class LevelCosts:
    """Level costs that a run measures: of so many images, with biases of its own where the file has none."""

    cost: str
    sink_scales: int
    samples: int


class CalibrationRun:
    """What a run adds to the statistics `before`; every finished batch is a part in a folder beside the file until all
    are done, and the file is written once."""

    def __init__(
        self,
        path: Path,
        model: ImageModel[Any],
        settings: Settings,
        seed: int,
        sizes: Sequence[int],
        before: Statistics | None,
        costs: LevelCosts | None,
        reporter: Reporter,
    ) -> None:
        self.path, self.model, self.settings, self.seed, self.reporter = path, model, settings, seed, reporter
        self.before, self.costs = before, costs
        levels = None if before is None else before.levels
        self.batches = _ranges(_next_sample(() if before is None else before.samples, seed), sizes)
        self.level_batches: list[range] = []
        if costs is not None:
            whole_batch = _MEASURE[costs.cost].batch
            sizes = [min(whole_batch, costs.samples - done) for done in range(0, costs.samples, whole_batch)]
            self.level_batches = _ranges(_next_sample(() if levels is None else levels.samples, seed), sizes)
        cfg, others = measured_settings(settings, model)
        self.description = {
            "model": model.name, "fingerprint": model.fingerprint, "settings": {"cfg": cfg, **others},
            "versions": versions(), "batches": [[images.start, images.stop] for images in self.batches],
            "samples": [*(() if before is None else before.samples), *self._names(self.batches)],
            "level_cost": costs.cost if costs is not None else None if levels is None else levels.cost,
            "level_samples": [*(() if levels is None else levels.samples), *self._names(self.level_batches)],
        }  # fmt: skip
        self.parts = Parts(path.with_name(f"{path.name}.parts"), self.description)

    def _names(self, batches: Sequence[range]) -> list[str]:
        return [
            name
            for images in batches
            for name in sample_names(self.model, self.seed, self.model.labels(len(images), images.start), images.start)
        ]

    def check_stopped(self, resume: bool) -> dict[str, Any] | None:
        """The description of the run that was stopped here, if there is one. Raises FormatError when it is not to be
        finished or is another than this one, RanksError when ranks have different tasks."""
        for rank, description in enumerate(current().gather(self.description)):
            if description != self.description:
                raise RanksError(
                    f"rank {rank} has another task than rank {current().rank}; all need the same releases, and to see "
                    f"the same {self.path}, if it is there"
                )
        stopped = self.parts.description()
        if stopped is None:
            return None
        if not resume:
            raise FormatError(
                f"{self.parts.folder} holds {self.parts.count()} finished parts of a run that was stopped; resume it, "
                "or delete that folder to discard them"
            )
        # when the file was written and the parts not yet removed, the next run is described otherwise
        if stopped != self.description and not _is_of(self.before, stopped):
            this, that = _differing(stopped, self.description)
            raise FormatError(
                f"{self.parts.folder} holds parts of a run with {this[:300]}, this one has {that[:300]}; give the same "
                "options, or delete that folder to discard them"
            )
        return stopped

    def is_in(self, found: Statistics | None) -> bool:
        """Whether a file of these statistics holds all that is asked for."""
        return self.before is None and _is_of(found, self.description)

    def measure(self) -> Calibrated:
        """All that is asked for, with what was measured before."""
        try:
            self._fill(f"calibrating {self.model.name}", "samples", self.batches, self._measure_masses)
            batches = tuple(self._batch(images) for images in self.batches)
            total = _merged(batches if self.before is None else (self.before, *batches))
            if self.costs is not None:
                total = self._with_levels(total, self.costs)
        except BaseException:
            kept = self.parts.count()
            if kept:
                self.reporter.say(f"{self.parts.folder}: {kept} finished parts are kept, and the same run goes on")
            elif current().size == 1:  # others may be writing their first ones
                self.parts.remove()
            raise
        return Calibrated(total, batches)

    def _part_name(self, kind: str, images: range) -> str:
        return f"{kind}.seed{self.seed}.{images.start:06}-{images.stop - 1:06}"

    def _fill(self, what: str, kind: str, batches: Sequence[range], make: Make) -> None:
        """Have the parts of these batches at every rank."""
        ranks, images_of = current(), {self._part_name(kind, images): images for images in batches}
        missing = self.parts.missing(list(images_of), ranks)
        if len(missing) < len(images_of):
            self.reporter.say(
                f"{len(images_of) - len(missing)} of {len(images_of)} batches were measured before: {self.parts.folder}"
            )
        with shared_progress(self.reporter, what, sum(len(images_of[name]) for name in missing)) as advance:
            self.parts.fill(
                list(images_of), ranks.deal(missing), lambda name, path: make(images_of[name], path, advance), ranks
            )

    def _measure_masses(self, images: range, path: Path, advance: Callable[[int], object]) -> None:
        part = measure(
            self.model, len(images), seed=self.seed, first_sample=images.start, batch=len(images),
            settings=self.settings,
        )  # fmt: skip
        part.save(path)
        advance(len(images))

    def _batch(self, images: range) -> Statistics:
        path = self.parts.path(self._part_name("samples", images))
        try:
            part = Statistics.load(path)
        except HeatKVError as error:
            raise FormatError(f"{error}; delete that file, and the run measures it again") from error
        part.check_fingerprint(self.model.fingerprint)
        return part

    def kept_batches(self) -> tuple[Statistics, ...]:
        """The batches of a run that wrote its file and was stopped before it removed them; none where some are gone."""
        stopped = self.parts.description() or {}
        batches = [range(first, stop) for first, stop in stopped.get("batches", ())]
        if len(self.parts.among(self._part_name("samples", images) for images in batches)) < len(batches):
            return ()
        return tuple(self._batch(images) for images in batches)

    def _with_levels(self, statistics: Statistics, costs: LevelCosts) -> Statistics:
        """The statistics with the level costs of the images that this run adds."""
        levels = statistics.levels
        log_bias = None if levels is None else levels.log_bias
        if log_bias is None:
            choices = level_choices(self.model.geometry.schedule, costs.sink_scales)

            def measure_biases(images: range, path: Path, advance: Callable[[int], object]) -> None:
                bias = calibrate_biases(
                    self.model, choices, len(images), seed=self.seed, settings=self.settings, progress=advance
                )
                save_arrays(path, {"log_bias": bias})

            images = range(BIAS_SAMPLES)
            self._fill(f"level biases of {self.model.name}", _BIAS_PART, [images], measure_biases)
            log_bias = load_arrays(self.parts.path(self._part_name(_BIAS_PART, images)))[1]["log_bias"]

        def measure_costs(images: range, path: Path, advance: Callable[[int], object]) -> None:
            part = _MEASURE[costs.cost](
                self.model, len(images), seed=self.seed, first_sample=images.start, log_bias=log_bias,
                sink_scales=costs.sink_scales, settings=self.settings, progress=advance,
            )  # fmt: skip
            save_arrays(path, part.arrays(), part.header())

        self._fill(f"level costs of {self.model.name}", costs.cost, self.level_batches, measure_costs)
        for images in self.level_batches:
            header, arrays = load_arrays(self.parts.path(self._part_name(costs.cost, images)))
            part = LevelStatistics.from_file(self.model.geometry.schedule, header, arrays)
            bias_samples = tuple(self._names([range(BIAS_SAMPLES)]))
            levels = replace(part, bias_samples=bias_samples) if levels is None else levels.merge(part)
        return replace(statistics, levels=levels)

    def write(self, statistics: Statistics) -> None:
        """Write the file, once."""
        if current().first:
            statistics.save(self.path)
            levels = statistics.levels
            more = "" if levels is None else f", level costs of {len(levels.samples)}"
            self.reporter.say(f"{self.path}: {statistics.count} samples{more}")

    def close(self) -> None:
        """Remove the parts, all ranks together, when the file is written."""
        if current().first:
            self.parts.remove()
            clear_temporaries(self.path.parent, self.path.name)
        current().wait()
        self.parts.remove()


def _is_of(statistics: Statistics | None, description: dict[str, Any]) -> bool:
    """Whether the statistics are what a run of this description gives."""
    if statistics is None:
        return False
    levels = statistics.levels
    held = {
        "samples": list(statistics.samples),
        "level_cost": None if levels is None else levels.cost,
        "level_samples": [] if levels is None else list(levels.samples),
    }
    return held.items() <= description.items()


def _next_sample(names: Sequence[str], seed: int) -> int:
    """The first sample of the seed that is not among these names, seed:index:label, nor before any of them."""
    parts = (name.split(":", 2) for name in names)
    return max((int(index) + 1 for own, index, _ in parts if int(own) == seed), default=0)


def _ranges(first: int, sizes: Sequence[int]) -> list[range]:
    """The samples of batches of these sizes, one after another."""
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=first))]


def batches_of(samples: int) -> list[int]:
    """Sizes of batches alike, two at least, so that halves can be compared."""
    batch = min(MOST_AT_ONCE, -(-samples // 2))
    return [min(batch, samples - start) for start in range(0, samples, batch)]


def _merged(parts: Sequence[Statistics]) -> Statistics:
    return reduce(Statistics.merge, parts)
