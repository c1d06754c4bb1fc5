"""Calibrations, batch by batch, in memory or into a file.

Finished batches are kept beside a file until all are done, so that a calibration can be stopped, go on, and be shared
over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

from heatkv.calibration.fisher import measure_fisher
from heatkv.calibration.level_costs import level_choices, measure_biases, measure_errors
from heatkv.calibration.measure import measure_samples, measured_settings, ranking_agreement, sample_names
from heatkv.core.io import check_place, clear_temporaries, in_file, read_tensors, versions, write_tensors
from heatkv.core.level_statistics import COSTS, LevelStatistics
from heatkv.core.levels import SINK_SCALES
from heatkv.core.schema import FloatArray, seed_of, suggest, whole
from heatkv.core.statistics import Statistics
from heatkv.errors import FormatError, HeatKVError, RanksError, StatisticsError
from heatkv.generation.micro_batches import images_that_fit
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.parallel.parts import Parts
from heatkv.parallel.ranks import current
from heatkv.parallel.reporter import SILENT, Reporter, shared_progress

MOST_AT_ONCE = 16
"""Images in a batch at most, where nothing else is asked for."""
LEVEL_SAMPLES = 32
"""Images that level costs are measured on."""
BIAS_SAMPLES = 16
"""Images that the biases of level costs are measured on."""

_LEVEL_COSTS = {"error": measure_errors, "fisher": measure_fisher}

Part = TypeVar("Part")
"""What is measured of a batch."""


@dataclass(frozen=True)
class Calibrated:
    """Statistics, and those of the batches measured for them as far as they are known, to compare halves of."""

    statistics: Statistics
    batches: tuple[Statistics, ...] = ()

    def agreement_of_halves(self) -> list[float] | None:
        """Spearman correlation of the head rankings of two disjoint halves, per source scale; None for one batch."""
        if len(self.batches) < 2:
            return None
        first, second = (reduce(Statistics.merge, self.batches[start::2]) for start in (0, 1))
        return ranking_agreement(first, second).tolist()  # type: ignore[no-any-return]


def calibrate(
    model: ImageModel[Any],
    samples: int = 64,
    *,
    out: str | Path | None = None,
    seed: int = 0,
    first_sample: int = 0,
    batch: int | None = None,
    settings: Settings | None = None,
    levels: str | None = None,
    level_samples: int = LEVEL_SAMPLES,
    sink_scales: int | None = None,
    append: bool = False,
    resume: bool = False,
    reporter: Reporter = SILENT,
) -> Statistics:
    """Statistics over `samples` images of all classes (or example prompts) in turn, drawn with the full cache.

    At most `batch` of them are drawn at once, by default MOST_AT_ONCE or what fits; `first_sample` numbers the first,
    so that disjoint sets can be merged. `levels` ("error" or "fisher") also measures what coarser levels cost, on
    `level_samples` images, for plans of `sink_scales` sinks or more. With `out` statistics are written to that file:
    `append` adds to a file that is there, `resume` goes on with a run that was stopped, and several ranks share the
    batches. Raises StatisticsError and
    FormatError before anything is measured for what cannot be, and NumericsError for numbers that are not finite, with
    their place.
    """
    settings = model.sampling if settings is None else settings
    return calibrate_into(
        None if out is None else Path(out), model, samples, seed=seed, first_sample=first_sample, settings=settings,
        levels=levels, level_samples=level_samples, sink_scales=sink_scales, append=append, resume=resume,
        batch_sizes=None if batch is None else batches_of(samples, batch), reporter=reporter,
    ).statistics  # fmt: skip


def most_at_once(model: ImageModel[Any], settings: Settings) -> int:
    """Images in a batch at most, the same on all ranks: MOST_AT_ONCE, or fewer where memory has no room for them."""
    fitting: list[int] = current().gather(images_that_fit(model, settings.rows_per_image, MOST_AT_ONCE))
    return min(fitting)


def calibrate_into(
    out: Path | None,
    model: ImageModel[Any],
    samples: int,
    *,
    seed: int,
    settings: Settings,
    first_sample: int = 0,
    levels: str | None = None,
    level_samples: int = LEVEL_SAMPLES,
    sink_scales: int | None = None,
    append: bool = False,
    resume: bool = False,
    batch_sizes: Sequence[int] | None = None,
    reporter: Reporter = SILENT,
) -> Calibrated:
    """As `calibrate`, with the statistics of the batches; `batch_sizes` are theirs, if not the usual ones."""
    sizes = batches_of(samples, most_at_once(model, settings)) if batch_sizes is None else batch_sizes
    seed = seed_of(seed, StatisticsError)
    first_sample = whole(first_sample, "first_sample", StatisticsError, 0)
    level_samples = whole(level_samples, "level_samples", StatisticsError, 1)
    if levels is not None and levels not in COSTS:
        raise StatisticsError(f"unknown level costs {levels!r}{suggest(levels, COSTS)}")
    found = None if out is None else _found(out, model, settings, append, resume)
    if out is None and (append or resume):
        raise FormatError("append and resume need a file; name it as out")
    before, costs = found if append else None, None
    if levels is not None:
        with in_file(out or "statistics"):
            costs = LevelCosts(levels, _level_sinks(before, model, levels, sink_scales), level_samples)
    run = CalibrationRun(out, model, settings, seed, sizes, before, costs, reporter, first_sample)
    stopped = run.check_stopped(resume)
    if found is not None and _is_of(found, stopped or run.description):
        reporter.say(f"{out} was finished before: nothing is measured")
        calibrated = Calibrated(found, run.kept_batches(stopped or {}))
    elif found is not before:
        raise FormatError(f"{out} exists, and no run that writes it was stopped; append samples to it")
    else:
        calibrated = run.measure()
        run.write(calibrated.statistics)
    run.close()
    return calibrated


def _found(out: Path, model: ImageModel[Any], settings: Settings, append: bool, resume: bool) -> Statistics | None:
    """The statistics that are in the file already."""
    there = out.exists()
    if there and not (append or resume):
        raise FormatError(f"{out} exists; append samples to it, or name another file")
    if append and not there:
        raise FormatError(f"{out} does not exist, so nothing can be appended to it")
    check_place(out)
    return continued(out, model, settings) if there else None


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

    `levels` is the kind of level costs that is needed too, `sink_scales` the fewest sinks of plans from them. Raises
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
            missing -= before.levels.count
    if levels is not None and missing > 0:
        costs = LevelCosts(levels, min(sink_scales, SINK_SCALES), missing)
    sizes = batches_of(samples - done, most_at_once(model, settings)) if done < samples else []
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
    this, that = _differing({"cfg": found.provenance.cfg, **found.provenance.settings}, {"cfg": cfg, **others})
    if this:
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
    """The entries in which two mappings differ, as either has them."""
    names = [name for name in {**other, **one} if one.get(name) != other.get(name)]
    this, that = (", ".join(f"{name}={values.get(name)}" for name in names) for values in (one, other))
    return this, that


def _level_sinks(
    before: Statistics | None, model: ImageModel[Any], cost: str, wanted: int | None, most: int | None = None
) -> int:
    """The sinks that level costs are measured with: those of the file where it has such costs, which must be of this
    kind and with `wanted` sinks, or at most `most`."""
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
    """The level costs that a run measures, on so many images, with biases of its own where the file has none."""

    cost: str
    sink_scales: int
    samples: int


class CalibrationRun:
    """What a run adds to the statistics `before`. With a file, finished batches are parts in a folder beside it until
    all are done, and the file is written once."""

    def __init__(
        self,
        path: Path | None,
        model: ImageModel[Any],
        settings: Settings,
        seed: int,
        sizes: Sequence[int],
        before: Statistics | None,
        costs: LevelCosts | None,
        reporter: Reporter,
        first_sample: int = 0,
    ) -> None:
        self.path, self.model, self.settings, self.seed, self.reporter = path, model, settings, seed, reporter
        self.before, self.costs = before, costs
        levels = None if before is None else before.levels
        held, level_held = (() if sums is None else sums.samples for sums in (before, levels))
        self.batches = _ranges(max(first_sample, _next_sample(held, seed)), sizes)
        level_sizes = [] if costs is None else _sizes(costs.samples, _LEVEL_COSTS[costs.cost].batch)
        self.level_batches = _ranges(max(first_sample, _next_sample(level_held, seed)), level_sizes)
        cfg, others = measured_settings(settings, model)
        self.description = {
            "model": model.name, "fingerprint": model.fingerprint, "settings": {"cfg": cfg, **others},
            "versions": versions(), "batches": [[images.start, images.stop] for images in self.batches],
            "samples": [*held, *self._names(self.batches)],
            "level_cost": costs.cost if costs is not None else None if levels is None else levels.cost,
            "level_samples": [*level_held, *self._names(self.level_batches)],
        }  # fmt: skip
        self.parts = None if path is None else Parts(path.with_name(f"{path.name}.parts"), self.description)

    def _names(self, batches: Sequence[range]) -> list[str]:
        model, names = self.model, []
        for images in batches:
            names += sample_names(model, self.seed, model.labels(len(images), images.start), images.start)
        return names

    def check_stopped(self, resume: bool) -> dict[str, Any] | None:
        """The description of the run that was stopped here, if there is one. Raises FormatError when it is not to be
        finished or is another than this one, RanksError when ranks have different tasks."""
        if self.parts is None:
            return None
        if any(description != self.description for description in current().gather(self.description)):
            raise RanksError(
                f"ranks have different tasks; all need the same releases, and to see the same {self.path}, if it exists"
            )
        stopped = self.parts.description()
        if stopped is None:
            return None
        if not resume:
            raise FormatError(
                f"{self.parts.folder} holds {self.parts.count()} finished parts of a run that was stopped; resume it, "
                "or delete that folder to discard them"
            )
        # a run that ended between writing its file and removing its parts is described with other samples
        if stopped != self.description and not _is_of(self.before, stopped):
            this, that = _differing(stopped, self.description)
            raise FormatError(
                f"{self.parts.folder} holds parts of a run with {this[:300]}, this one has {that[:300]}; give the same "
                "options, or delete that folder to discard them"
            )
        return stopped

    def measure(self) -> Calibrated:
        """What is asked for, together with what was measured before."""
        options: dict[str, Any] = {"seed": self.seed, "settings": self.settings}
        try:
            batches = self._measured(
                f"calibrating {self.model.name}", "samples", self.batches,
                partial(measure_samples, self.model, **options), Statistics.save, self._load_batch,
            )  # fmt: skip
            total = reduce(Statistics.merge, batches if self.before is None else [self.before, *batches])
            if self.costs is not None:
                total = replace(total, levels=self._levels(total.levels, self.costs, options))
        except BaseException:
            if self.parts is not None:
                if kept := self.parts.count():
                    self.reporter.say(f"{self.parts.folder}: {kept} finished parts are kept, and the same run goes on")
                elif current().size == 1:  # others may be writing their first ones
                    self.parts.remove()
            raise
        return Calibrated(total, tuple(batches))

    def _levels(self, levels: LevelStatistics | None, costs: LevelCosts, options: dict[str, Any]) -> LevelStatistics:
        """The level costs with those of the images that this run adds."""
        name, schedule = self.model.name, self.model.geometry.schedule
        choices, parts = level_choices(schedule, costs.sink_scales), [] if levels is None else [levels]
        if levels is None:
            images = range(BIAS_SAMPLES)
            (log_bias,) = self._measured(
                f"level biases of {name}", "biases", [images], partial(measure_biases, self.model, choices, **options),
                _save_bias, _load_bias,
            )  # fmt: skip
            bias_samples = tuple(self._names([images]))
        else:
            log_bias, bias_samples = levels.log_bias, levels.bias_samples
        parts += self._measured(
            f"level costs of {name}", costs.cost, self.level_batches,
            partial(_LEVEL_COSTS[costs.cost], self.model, choices, log_bias, **options),
            lambda part, path: write_tensors(path, part.header(), part.arrays()),
            lambda path: LevelStatistics.from_file(schedule, *read_tensors(path, "part"), path),
        )  # fmt: skip
        return replace(reduce(LevelStatistics.merge, parts), bias_samples=bias_samples)

    def _measured(
        self,
        what: str,
        kind: str,
        batches: Sequence[range],
        measure: Callable[[range], Part],
        save: Callable[[Part, Path], object],
        load: Callable[[Path], Part],
    ) -> list[Part]:
        """What is measured of every batch: in memory, or as parts that all ranks make together, now or earlier."""
        if (parts := self.parts) is None:
            measured = []
            with self.reporter.progress(what, sum(map(len, batches))) as advance:
                for images in batches:
                    measured.append(measure(images))
                    advance(len(images))
            return measured
        ranks, images_of = current(), {self._part_name(kind, images): images for images in batches}
        missing = parts.missing(list(images_of), ranks)
        if len(missing) < len(images_of):
            done = len(images_of) - len(missing)
            self.reporter.say(f"{done} of {len(images_of)} batches were measured before: {parts.folder}")
        with shared_progress(self.reporter, what, sum(len(images_of[name]) for name in missing)) as advance:

            def make(name: str, path: Path) -> None:
                save(measure(images_of[name]), path)
                advance(len(images_of[name]))

            parts.fill(list(images_of), ranks.deal(missing), make, ranks)
        return [load(parts.path(name)) for name in images_of]

    def _part_name(self, kind: str, images: range) -> str:
        return f"{kind}.seed{self.seed}.{images.start:06}-{images.stop - 1:06}"

    def _load_batch(self, path: Path) -> Statistics:
        try:
            part = Statistics.load(path)
        except HeatKVError as error:
            raise FormatError(f"{error}; delete that file, and the run measures it again") from error
        part.check_fingerprint(self.model.fingerprint)
        return part

    def kept_batches(self, stopped: dict[str, Any]) -> tuple[Statistics, ...]:
        """The batches of a run that wrote its file and was stopped before it removed them; none where some are gone."""
        assert self.parts is not None
        names = [self._part_name("samples", range(*bounds)) for bounds in stopped.get("batches", ())]
        if len(self.parts.among(names)) < len(names):
            return ()
        return tuple(self._load_batch(self.parts.path(name)) for name in names)

    def write(self, statistics: Statistics) -> None:
        """Write the file, where there is one."""
        if self.path is not None and current().first:
            statistics.save(self.path)
            more = "" if statistics.levels is None else f", level costs of {statistics.levels.count}"
            self.reporter.say(f"{self.path}: {statistics.count} samples{more}")

    def close(self) -> None:
        """Remove the parts, all ranks together, when the file is written."""
        if self.path is None or self.parts is None:
            return
        if current().first:
            self.parts.remove()
            clear_temporaries(self.path.parent, self.path.name)
        current().wait()
        self.parts.remove()


def _save_bias(log_bias: FloatArray, path: Path) -> None:
    write_tensors(path, {}, {"log_bias": log_bias})


def _load_bias(path: Path) -> FloatArray:
    return read_tensors(path, "part")[1]["log_bias"]


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
    """The first sample of the seed that comes after all of these names, seed:index:label."""
    parts = (name.split(":", 2) for name in names)
    return max((int(index) + 1 for own, index, _ in parts if int(own) == seed), default=0)


def _ranges(first: int, sizes: Sequence[int]) -> list[range]:
    """The samples of batches of these sizes, one after another."""
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=first))]


def _sizes(samples: int, batch: int) -> list[int]:
    return [min(batch, samples - start) for start in range(0, samples, batch)]


def batches_of(samples: int, most: int = MOST_AT_ONCE) -> list[int]:
    """Sizes of equal batches, the last may be smaller: two at least, so that halves can be compared, of at most `most`
    images. Raises StatisticsError for less than one sample or image."""
    samples, most = whole(samples, "samples", StatisticsError, 1), whole(most, "batch", StatisticsError, 1)
    return _sizes(samples, min(most, -(-samples // 2)))
