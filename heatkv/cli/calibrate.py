"""`heatkv calibrate`: statistics of a model into a file; and the same for a folder that has none yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from heatkv.cli.opening import Loaded, open_model, open_statistics, parse_names, positive, storage_of
from heatkv.cli.options import AsJson, Resume, Running, Source, Without
from heatkv.cli.output import progress, say, shared_progress, show
from heatkv.errors import FormatError, HeatKVError, RanksError, StatisticsError
from heatkv.files import check_writable, clear_temporaries
from heatkv.geometry import Budget
from heatkv.level_statistics import COSTS, LevelStatistics
from heatkv.levels import SINK_SCALES
from heatkv.models.base import ImageModel
from heatkv.parts import RUN, Parts, load_arrays, save_arrays
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import HeatKV
from heatkv.policies.lp import HeatKVLP
from heatkv.ranks import current
from heatkv.sampling import Settings
from heatkv.statistics import Statistics
from heatkv.versions import versions

if TYPE_CHECKING:
    from heatkv.level_calibration import LevelCalibration
    from heatkv.profiling.stability import Agreement

MOST_AT_ONCE = 16
"""Images in a batch at most."""

LEVEL_SAMPLES = 32
"""Images that level costs are measured on."""

BIAS_SAMPLES = 16
"""Images that the biases of level costs are measured on."""

BIAS_PART = "biases"
_DISCARD = "give the same options, or delete that folder to discard them"

REPORTED_POLICIES = (HeatKV(), HeatKVLP(value="error"))
REPORTED_BUDGET = "20%"


@dataclass(frozen=True)
class _Levels:
    """Level costs that a run is to measure: of so many images, with biases of its own where the file has none."""

    cost: str
    sink_scales: int
    samples: int


class _Run:
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
        levels: _Levels | None,
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
        from heatkv.calibration import sample_names

        labels = self.model.labels(len(images), images.start)
        return sample_names(self.model, self.seed, labels, images.start)

    def _described(self, asked: dict[str, Any]) -> dict[str, Any]:
        """All that the parts follow from, and the samples that the file will hold in the end."""
        from heatkv.calibration import told_settings

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
            total = _merged(found if self.before is None else [self.before, *found])
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
        from heatkv.calibration import calibrate as measure

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

    def _with_levels(self, statistics: Statistics, levels: _Levels) -> Statistics:
        """The statistics with the level costs of so many more images."""
        from heatkv.level_calibration import calibrate_biases, level_choices

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
    from heatkv.fisher_calibration import calibrate_fisher
    from heatkv.level_calibration import calibrate_levels

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


def _check_left(parts: Parts, resume: bool) -> dict[str, Any] | None:
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


def _batches(samples: int) -> list[int]:
    """Batches alike, two at least, so that halves can be compared."""
    batch = min(MOST_AT_ONCE, -(-samples // 2))
    return [min(batch, samples - start) for start in range(0, samples, batch)]


def _level_sinks(before: Statistics | None, out: Path, model: ImageModel[Any], cost: str, wanted: int | None) -> int:
    """The sinks that level costs are to be measured with: the file's own where it has such costs, and no others."""
    from heatkv.level_calibration import level_choices

    found = None if before is None else before.levels
    if found is None:
        return level_choices(model.geometry.schedule, SINK_SCALES if wanted is None else wanted).sink_scales
    if found.cost != cost:
        raise StatisticsError(f"{out} has level costs of the kind {found.cost!r}; measure {cost!r} into another file")
    sinks = found.choices.sink_scales
    if wanted not in (None, sinks):
        raise StatisticsError(
            f"{out} has level costs with sink_scales={sinks}, not {wanted}; leave --sink-scales out, or measure into "
            "another file"
        )
    return sinks


def _merged(parts: Sequence[Statistics]) -> Statistics:
    return reduce(Statistics.merge, parts)


def _agreement(parts: Sequence[Statistics]) -> list[float] | None:
    """Spearman correlation of the head rankings of two disjoint halves, per source scale."""
    from heatkv.calibration import ranking_agreement

    if len(parts) < 2:
        return None
    return [float(x) for x in ranking_agreement(_merged(parts[::2]), _merged(parts[1::2]))]


def _calibration_table(statistics: Statistics, agreement: Sequence[float] | None) -> Table:
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


def calibrate(
    *,
    out: Annotated[Path, typer.Option("--out", help="statistics file to write")],
    source: Source,
    samples: Annotated[int, typer.Option("--samples", help="images to measure, all classes in turn")] = 64,
    levels: Annotated[
        str | None, typer.Option("--levels", help="also measure what coarser levels cost (heatkv-mr): error or fisher")
    ] = None,
    level_samples: Annotated[
        int | None, typer.Option("--level-samples", help=f"images to measure levels on (default {LEVEL_SAMPLES})")
    ] = None,
    sink_scales: Annotated[
        int | None,
        typer.Option(
            "--sink-scales",
            help="first scales that level costs take as whole, the fewest that plans from them can have; default: "
            f"{SINK_SCALES}, or the file's with --append",
        ),
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="add samples to an existing file")] = False,
    resume: Resume = False,
    report: Annotated[
        bool, typer.Option("--report", help="tell how many samples are enough, from halves of the new ones")
    ] = False,
    budgets: Annotated[
        str | None, typer.Option("--budgets", help="of the plans that --report compares, separated by commas (20%)")
    ] = None,
    running: Annotated[Running, Without("rows"), Without("storage"), Without("attention")],
    as_json: AsJson = False,
) -> None:
    """Measure how much every head looks back at every scale; writes a statistics file. Shares its batches over the
    ranks that torchrun starts.

    Example: heatkv calibrate --model emoji --samples 64 --out statistics.safetensors
    """
    from heatkv.profiling.stability import batch_sizes

    level_images = LEVEL_SAMPLES if level_samples is None else level_samples
    positive(samples=samples, level_samples=level_images)
    if levels is not None and levels not in COSTS:
        raise HeatKVError(f"--levels is {levels!r}; level costs are of the kinds {' and '.join(COSTS)}")
    for name, value in (("level-samples", level_samples), ("sink-scales", sink_scales)):
        if levels is None and value is not None:
            raise HeatKVError(
                f"--{name} are those of level costs; say which to measure with --levels error or fisher, or leave it "
                "out"
            )
    if budgets is not None and not report:
        raise HeatKVError("--budgets are those of the plans that --report compares; give both or neither")
    if report and samples < 2:
        raise HeatKVError("--report compares two halves of the new samples; take at least 2 (--samples)")
    wanted = [Budget.parse(text) for text in parse_names(budgets or REPORTED_BUDGET, "budget")]
    if out.exists() and not append and not resume:
        raise FormatError(f"{out} exists; add samples to it with --append or name another file")
    if append and not out.exists():
        raise FormatError(f"{out} does not exist; leave --append out to create it")
    if not out.parent.is_dir():
        raise FormatError(f"the folder {out.parent} does not exist")
    check_writable(out.parent)
    loaded, settings = open_model(source, running)
    compared = _Compared(loaded, settings, wanted) if report else None
    before = _to_be_continued(out, loaded, settings) if out.exists() else None
    asked = {
        "samples": samples, "seed": running.seed, "levels": levels, "level-samples": level_samples,
        "sink-scales": sink_scales, "append": append, "report": report,
    }  # fmt: skip
    base = before if append else None
    sinks = 0 if levels is None else _level_sinks(base, out, loaded, levels, sink_scales)
    batches = _batches(samples) if compared is None else batch_sizes(samples, MOST_AT_ONCE)
    of_levels = None if levels is None else _Levels(levels, sinks, level_images)
    run = _Run(out, loaded, settings, asked, running.seed, batches, base, of_levels)
    total: Statistics | None
    parts: list[Statistics] | None
    if run.is_finished(_check_left(run.parts, resume), before):
        total, parts = before, run.left_masses()
        say(f"{out} was finished before: nothing is measured")
    else:
        if before is not base:
            raise FormatError(f"{out} exists, and no run that writes it was stopped; add samples to it with --append")
        total, parts = run.measure()
        run.write(total)
    try:
        if current().first:
            assert total is not None
            _tell(out, total, parts, compared, as_json)
    finally:
        run.close()


def _tell(
    out: Path, total: Statistics, parts: Sequence[Statistics] | None, compared: _Compared | None, as_json: bool
) -> None:
    """The result, on screen; without the parts nothing is known of halves."""
    from heatkv.profiling.report import stability_tables
    from heatkv.profiling.stability import ENOUGH_LOSS, enough, verdict

    agreement = None if parts is None else _agreement(parts)
    gini = total.gini().tolist()
    data = {
        "out": str(out), "samples": total.count, "gini": gini, "rank_agreement_of_halves": agreement,
        "levels": None if total.levels is None else total.levels.header(),
    }  # fmt: skip
    table = _calibration_table(total, agreement)
    if compared is None or parts is None:
        show(table, as_json, data)
        return
    found = compared.agreements(parts)
    data["report"] = {
        "halves": [agreement.to_json() for agreement in found],
        "largest_loss": ENOUGH_LOSS, "enough_samples": enough(found), "verdict": verdict(found),
    }  # fmt: skip
    show(Group(table, *stability_tables(found), verdict(found)), as_json, data)


def _to_be_continued(path: Path, model: ImageModel[Any], settings: Settings) -> Statistics:
    """Statistics that this run can add to. Raises StatisticsError when it cannot, before anything is measured."""
    from heatkv.calibration import told_settings

    found = open_statistics(path, model, settings)
    assert found is not None
    cfg, told = told_settings(settings, model)
    measured, wanted = {"cfg": found.provenance.cfg, **found.provenance.settings}, {"cfg": cfg, **told}
    if measured != wanted:
        differing = [name for name in {**wanted, **measured} if measured.get(name) != wanted.get(name)]
        this, that = (", ".join(f"{name}={told.get(name)}" for name in differing) for told in (measured, wanted))
        raise StatisticsError(f"{path} was measured with {this}, this run has {that}")
    return found


class _Compared:
    """What --report compares: plans of the policies that rank by statistics, at these budgets."""

    def __init__(self, model: Loaded, settings: Settings, budgets: Sequence[Budget]) -> None:
        rows, storage = settings.rows_per_image, storage_of(model)
        self.problems = [PlanningProblem(model.geometry, b, rows=rows, storage=storage) for b in budgets]
        for policy in REPORTED_POLICIES:
            for problem in self.problems:
                policy.check(problem)  # before hours are spent
                policy.check_room(problem)

    def agreements(self, parts: Sequence[Statistics]) -> list[Agreement]:
        from heatkv.profiling.stability import compare_halves, growing_halves

        halves = growing_halves(parts)
        found = []
        with progress("comparing halves", len(halves)) as advance:
            for one, other in halves:
                found.append(compare_halves(one, other, REPORTED_POLICIES, self.problems))
                advance(1)
        return found


def statistics_of_folder(
    folder: Path,
    model: ImageModel[Any],
    samples: int,
    seed: int,
    settings: Settings,
    levels: str | None = None,
    sink_scales: int = SINK_SCALES,
) -> Statistics:
    """The folder's own statistics: those of an earlier run as far as they fit, the rest measured now.

    `levels` is the kind of level costs that are wanted, too, `sink_scales` the fewest sinks of plans from them.
    """
    from heatkv.calibration import sample_names

    path = folder / "statistics.safetensors"
    names = sample_names(model, seed, model.labels(samples), 0)
    before = _found_in_folder(path, model, settings, names, levels, sink_scales)
    costs = None if before is None else before.levels
    done, of_levels = 0 if before is None else before.count, None
    if levels is not None and (missing := LEVEL_SAMPLES - (0 if costs is None else len(costs.samples))) > 0:
        sinks = min(sink_scales, SINK_SCALES) if costs is None else costs.choices.sink_scales
        of_levels = _Levels(levels, sinks, missing)
    asked = {"samples": samples, "seed": seed, "levels": levels, "sink-scales": sink_scales}
    run = _Run(
        path, model, settings, asked, seed, _batches(samples - done) if done < samples else [], before, of_levels
    )
    try:
        stopped = _check_left(run.parts, resume=True)
        finished = run.is_finished(stopped, before)
    except FormatError as error:
        raise FormatError(f"{error}, or write to another folder (--out)") from error
    if finished or (before is not None and done == samples and of_levels is None):
        assert before is not None
        say(f"using {path} ({done} samples)")
        run.close()
        return before
    total, parts = run.measure()
    agreement = _agreement(parts if before is None else [before, *parts])
    if parts and agreement is not None:
        worst, mean = min(agreement), sum(agreement) / len(agreement)
        say(
            f"calibrated on {samples} samples; head rankings of two halves agree by {mean:.2f} "
            f"(Spearman, mean over scales; worst {worst:.2f})"
        )
    run.write(total)
    run.close()
    return total


def _found_in_folder(
    path: Path,
    model: ImageModel[Any],
    settings: Settings,
    samples: list[str],
    levels: str | None,
    sink_scales: int,
) -> Statistics | None:
    """An earlier run's statistics when these samples begin with theirs, or continue them; None when there are none.

    Raises StatisticsError for others, and for level costs that are not wanted: they are not replaced.
    """
    if not path.exists():
        return None
    try:
        found = _to_be_continued(path, model, settings)
        if levels is not None and found.levels is not None:
            _check_level_costs(found.levels, path, levels, sink_scales)
    except HeatKVError as error:
        raise type(error)(f"{error}; write to another folder (--out)") from error
    if list(found.provenance.samples) != samples[: found.count]:
        raise StatisticsError(
            f"{path} holds {found.count} other samples than the {len(samples)} of this run; plan from it with "
            f"--statistics {path}, or write to another folder (--out)"
        )
    return found


def _check_level_costs(found: LevelStatistics, path: Path, cost: str, sink_scales: int) -> None:
    """Raise StatisticsError unless they are of this kind and hold for plans with so many sinks."""
    if found.cost != cost:
        raise StatisticsError(f"{path} has level costs of the kind {found.cost!r}, not {cost!r}")
    sinks = found.choices.sink_scales
    if sinks > sink_scales:
        raise StatisticsError(
            f"{path} has level costs for plans with sink_scales={sinks} or more, this run has {sink_scales}"
        )
