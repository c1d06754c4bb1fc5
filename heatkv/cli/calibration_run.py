"""A run of calibration: batches that are kept beside the file they go to until all are done, so that it can be stopped,
resumed, and shared over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatkv.cli.opening import open_statistics
from heatkv.cli.output import say, shared_progress
from heatkv.core.io import clear_temporaries, versions
from heatkv.core.statistics import LevelStatistics, Statistics
from heatkv.errors import FormatError, HeatKVError, RanksError, StatisticsError
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.parallel.parts import RUN, Parts, load_arrays, save_arrays
from heatkv.parallel.ranks import current

if TYPE_CHECKING:
    from heatkv.calibration.level_costs import LevelCalibration

MOST_AT_ONCE = 16
"""Images in a batch at most."""

LEVEL_SAMPLES = 32
"""Images that level costs are measured on."""

BIAS_SAMPLES = 16
"""Images that the biases of level costs are measured on."""

BIAS_PART = "biases"
_DISCARD = "give the same options, or delete that folder to discard them"


@dataclass(frozen=True)
class LevelCosts:
    """Level costs that a run is to measure: of so many images, with biases of its own where the file has none."""

    cost: str
    sink_scales: int
    samples: int


class CalibrationRun:
    """What a run of calibration adds to the statistics `before`, batch by batch; every finished batch is kept in a
    folder beside the file until all are done, and the file is written once."""

    def __init__(
        self,
        path: Path,
        model: ImageModel[Any],
        settings: Settings,
        asked: dict[str, Any],
        seed: int,
        batches: Sequence[int],
        before: Statistics | None,
        levels: LevelCosts | None,
    ) -> None:
        self.path, self.model, self.settings, self.seed = path, model, settings, seed
        self.before, self.levels = before, levels
        self.batches = _ranges(_next_sample(() if before is None else before.provenance.samples, seed), batches)
        costs = None if before is None else before.levels
        self.level_batches: list[range] = []
        if levels is not None:
            start, whole = _next_sample(() if costs is None else costs.samples, seed), _level_measure(levels.cost).batch
            sizes = [min(whole, levels.samples - done) for done in range(0, levels.samples, whole)]
            self.level_batches = _ranges(start, sizes)
        self.parts = Parts(_parts_folder(path), self._described(asked))

    def _names(self, images: range) -> list[str]:
        from heatkv.calibration.measure import sample_names

        labels = self.model.labels(len(images), images.start)
        return sample_names(self.model, self.seed, labels, images.start)

    def _described(self, asked: dict[str, Any]) -> dict[str, Any]:
        """All that the parts follow from, and the samples that the file will hold in the end."""
        from heatkv.calibration.measure import told_settings

        cfg, told = told_settings(self.settings, self.model)
        old = self.before
        samples = [] if old is None else list(old.provenance.samples)
        of_levels = [] if old is None or old.levels is None else list(old.levels.samples)
        return {
            "asked": asked,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "settings": {"cfg": cfg, **told},
            "versions": versions(),
            "batches": [[images.start, images.stop] for images in self.batches],
            "samples": samples + [name for images in self.batches for name in self._names(images)],
            "level_cost": self.levels.cost if self.levels is not None else _cost_of(old),
            "level_samples": of_levels + [name for images in self.level_batches for name in self._names(images)],
        }

    def measure(self) -> tuple[Statistics, list[Statistics]]:
        """All that is asked for, what was measured before with it; and the new batches apart."""
        try:
            found = self._measure_masses()
            total = merged(found if self.before is None else [self.before, *found])
            if self.levels is not None:
                total = self._with_levels(total, self.levels)
        except BaseException:
            kept = self.parts.count()
            if kept:
                say(f"{self.parts.folder}: {kept} finished parts; the same command with --resume goes on")
            else:
                if current().size == 1:  # others may be writing their first ones
                    self.parts.remove()
                say(f"{self.path}: nothing yet, no batch was finished")
            raise
        return total, found

    def _measure_masses(self) -> list[Statistics]:
        from heatkv.calibration.measure import calibrate as measure

        named = {_part_name("samples", self.seed, images): images for images in self.batches}

        def make(name: str, path: Path, advance: Callable[[int], None]) -> None:
            images = named[name]
            part = measure(
                self.model, len(images), seed=self.seed, first_sample=images.start, batch=len(images),
                settings=self.settings,
            )  # fmt: skip
            part.save(path)
            advance(len(images))

        self._fill(f"calibrating {self.model.name}", {name: len(images) for name, images in named.items()}, make)
        return [self._mass_part(name, images) for name, images in named.items()]

    def _mass_part(self, name: str, images: range) -> Statistics:
        try:
            part = Statistics.load(self.parts.path(name))
        except HeatKVError as error:
            raise FormatError(f"{error}; delete that file, and the run measures it again") from error
        self._check_part(name, part.provenance.samples, images)
        part.check_fingerprint(self.model.fingerprint)
        return part

    def _check_part(self, name: str, samples: Sequence[str], images: range) -> None:
        if list(samples) != self._names(images):
            raise StatisticsError(
                f"{self.parts.path(name)} holds other samples than {images.start} to {images.stop - 1} of seed "
                f"{self.seed}; delete it, and --resume measures them again"
            )

    def _fill(self, what: str, sizes: dict[str, int], make: Callable[[str, Path, Callable[[int], None]], None]) -> None:
        """Have parts of these names, each of so many images."""
        ranks = current()
        missing = self.parts.missing(list(sizes), ranks)
        if len(missing) < len(sizes):
            say(f"{len(sizes) - len(missing)} of {len(sizes)} batches were measured before: {self.parts.folder}")
        if 1 < len(sizes) < ranks.size:
            say(f"there are {len(sizes)} batches for {ranks.size} ranks; some have nothing to do")
        with shared_progress(what, sum(sizes[name] for name in missing)) as advance:
            mine = ranks.deal(missing)
            self.parts.fill(list(sizes), mine, lambda name, path: make(name, path, advance), ranks)

    def _with_levels(self, statistics: Statistics, levels: LevelCosts) -> Statistics:
        """The statistics with the level costs of so many more images."""
        from heatkv.calibration.level_costs import calibrate_biases, level_choices

        measure = _level_measure(levels.cost)
        found = statistics.levels
        named = {_part_name(levels.cost, self.seed, images): images for images in self.level_batches}
        of_bias: tuple[str, ...] = ()
        log_bias = None if found is None else found.log_bias
        if log_bias is None:
            choices = level_choices(self.model.geometry.schedule, levels.sink_scales)

            def make_bias(name: str, path: Path, advance: Callable[[int], None]) -> None:
                bias = calibrate_biases(
                    self.model, choices, BIAS_SAMPLES, seed=self.seed, settings=self.settings, progress=advance
                )
                save_arrays(path, {"log_bias": bias})

            self._fill(f"level biases of {self.model.name}", {BIAS_PART: BIAS_SAMPLES}, make_bias)
            log_bias = load_arrays(self.parts.path(BIAS_PART))[1]["log_bias"]
            of_bias = tuple(self._names(range(BIAS_SAMPLES)))

        def make(name: str, path: Path, advance: Callable[[int], None]) -> None:
            images = named[name]
            part = measure(
                self.model, len(images), seed=self.seed, first_sample=images.start, log_bias=log_bias,
                sink_scales=levels.sink_scales, settings=self.settings, progress=advance,
            )  # fmt: skip
            save_arrays(path, part.arrays(), part.header())

        self._fill(f"level costs of {self.model.name}", {name: len(images) for name, images in named.items()}, make)
        for name, images in named.items():
            part = self._level_part(name)
            self._check_part(name, part.samples, images)
            found = replace(part, bias_samples=of_bias) if found is None else found.merge(part)
        return replace(statistics, levels=found)

    def _level_part(self, name: str) -> LevelStatistics:
        path = self.parts.path(name)
        header, arrays = load_arrays(path)
        try:
            return LevelStatistics.from_file(self.model.geometry.schedule, header, arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{path} is no part of level costs: {error}; delete it, and --resume measures it"
            ) from error

    def is_finished(self, told: dict[str, Any] | None, found: Statistics | None) -> bool:
        """Whether the file `found` holds all that is asked for, or that the run which was stopped, as it is `told`, was
        to give; the same at all ranks. Raises FormatError for a stopped run over other samples."""
        ranks = current()
        for rank, run in enumerate(ranks.gather(self.parts.run)):
            if run != self.parts.run:
                raise RanksError(
                    f"rank {rank} has another task than rank {ranks.rank}; all need the same releases, and to see the "
                    f"same {self.path}, if it is there"
                )
        own = self.parts.run if self.before is None else None  # what is appended is not there yet
        done = False
        if found is not None:
            of_levels = [] if found.levels is None else list(found.levels.samples)
            held = {
                "samples": list(found.provenance.samples),
                "level_cost": _cost_of(found),
                "level_samples": of_levels,
            }
            done = any(run is not None and held.items() <= run.items() for run in (told, own))
        assert self.parts.run is not None
        if not done and told is not None and told.get("samples") != self.parts.run["samples"]:
            raise FormatError(f"{self.parts.folder} holds parts of a run over other samples; {_DISCARD}")
        return bool(ranks.gather(done)[0])

    def left_masses(self) -> list[Statistics] | None:
        """The batches of a run that was stopped when it had written the file; None where some are removed already."""
        told = self.parts.told()
        try:
            batches = [] if told is None else [range(first, stop) for first, stop in told["batches"]]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{self.parts.folder / RUN} does not tell its batches; {_DISCARD}") from error
        named = {_part_name("samples", self.seed, images): images for images in batches}
        if not named or len(self.parts.among(named)) < len(named):
            return None
        return [self._mass_part(name, images) for name, images in named.items()]

    def write(self, total: Statistics) -> None:
        """Write the file, once."""
        if current().first:
            total.save(self.path)
            of_levels = "" if total.levels is None else f", level costs of {len(total.levels.samples)}"
            say(f"{self.path}: {total.count} samples{of_levels}")

    def close(self) -> None:
        """Remove the parts, all ranks together, when the file is written and told."""
        if current().first:
            self.parts.remove()
            clear_temporaries(self.path.parent, self.path.name)
        current().wait()
        self.parts.remove()


def _cost_of(statistics: Statistics | None) -> str | None:
    """The kind of level costs that statistics have, if they have some."""
    return None if statistics is None or statistics.levels is None else statistics.levels.cost


def _level_measure(cost: str) -> LevelCalibration:
    from heatkv.calibration.fisher import calibrate_fisher
    from heatkv.calibration.level_costs import calibrate_levels

    return calibrate_fisher if cost == "fisher" else calibrate_levels


def _parts_folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _part_name(kind: str, seed: int, images: range) -> str:
    return f"{kind}.seed{seed}.{images.start:06}-{images.stop - 1:06}"


def _next_sample(names: Sequence[str], seed: int) -> int:
    """The first sample of the seed that is not among these names, seed:index:label, nor before any of them."""
    return max(
        (int(index) + 1 for given, index, _ in (n.split(":", 2) for n in names) if int(given) == seed), default=0
    )


def _ranges(first: int, sizes: Sequence[int]) -> list[range]:
    """The samples of batches of these sizes, one after another."""
    stops = list(accumulate(sizes, initial=first))
    return [range(start, stop) for start, stop in pairwise(stops)]


def check_left(parts: Parts, resume: bool) -> dict[str, Any] | None:
    """What the run was that was stopped here, if there is one. Raises FormatError when it is not to be finished, or is
    another than this one."""
    told, own = parts.told(), parts.run
    assert own is not None
    if told is None:
        return None
    if not resume:
        raise FormatError(
            f"{parts.folder} holds {parts.count()} finished parts of a run that was stopped; finish it with --resume, "
            "or delete that folder to discard them"
        )
    for name in ("asked", "settings", "versions"):
        of_told = told.get(name)
        if of_told != own[name]:
            before = of_told if isinstance(of_told, dict) else {}
            differing = [key for key in own[name] if before.get(key) != own[name][key]]
            this, that = (", ".join(f"{key}={of.get(key)}" for key in differing) for of in (before, own[name]))
            raise FormatError(f"{parts.folder} holds parts of a run with {this}, this one has {that}; {_DISCARD}")
    if told.get("fingerprint") != own["fingerprint"]:
        raise FormatError(f"{parts.folder} holds parts of other weights than this run's; {_DISCARD}")
    return told


def batches_of(samples: int) -> list[int]:
    """Batches alike, two at least, so that halves can be compared."""
    batch = min(MOST_AT_ONCE, -(-samples // 2))
    return [min(batch, samples - start) for start in range(0, samples, batch)]


def merged(parts: Sequence[Statistics]) -> Statistics:
    """The parts, one at least, as one."""
    return reduce(Statistics.merge, parts)


def agreement_of_halves(parts: Sequence[Statistics]) -> list[float] | None:
    """Spearman correlation of the head rankings of two disjoint halves, per source scale."""
    from heatkv.calibration.measure import ranking_agreement

    if len(parts) < 2:
        return None
    return [float(x) for x in ranking_agreement(merged(parts[::2]), merged(parts[1::2]))]


def to_be_continued(path: Path, model: ImageModel[Any], settings: Settings) -> Statistics:
    """Statistics that this run can add to. Raises StatisticsError when it cannot, before anything is measured."""
    from heatkv.calibration.measure import told_settings

    found = open_statistics(path, model, settings)
    assert found is not None
    cfg, told = told_settings(settings, model)
    measured, wanted = {"cfg": found.provenance.cfg, **found.provenance.settings}, {"cfg": cfg, **told}
    if measured != wanted:
        differing = [name for name in {**wanted, **measured} if measured.get(name) != wanted.get(name)]
        this, that = (", ".join(f"{name}={told.get(name)}" for name in differing) for told in (measured, wanted))
        raise StatisticsError(f"{path} was measured with {this}, this run has {that}")
    return found
