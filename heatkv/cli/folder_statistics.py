"""The statistics of a folder of results: those of an earlier run as far as they fit, the rest measured when needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heatkv.cli.calibration_run import (
    LEVEL_SAMPLES,
    CalibrationRun,
    LevelCosts,
    agreement_of_halves,
    batches_of,
    check_left,
    to_be_continued,
)
from heatkv.cli.output import say
from heatkv.core.levels import SINK_SCALES
from heatkv.core.statistics import LevelStatistics, Statistics
from heatkv.errors import FormatError, HeatKVError, StatisticsError
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings


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
    from heatkv.calibration.measure import sample_names

    path = folder / "statistics.safetensors"
    names = sample_names(model, seed, model.labels(samples), 0)
    before = _found_in_folder(path, model, settings, names, levels, sink_scales)
    costs = None if before is None else before.levels
    done, of_levels = 0 if before is None else before.count, None
    if levels is not None and (missing := LEVEL_SAMPLES - (0 if costs is None else len(costs.samples))) > 0:
        sinks = min(sink_scales, SINK_SCALES) if costs is None else costs.choices.sink_scales
        of_levels = LevelCosts(levels, sinks, missing)
    asked = {"samples": samples, "seed": seed, "levels": levels, "sink-scales": sink_scales}
    run = CalibrationRun(
        path, model, settings, asked, seed, batches_of(samples - done) if done < samples else [], before, of_levels
    )
    try:
        stopped = check_left(run.parts, resume=True)
        finished = run.is_finished(stopped, before)
    except FormatError as error:
        raise FormatError(f"{error}, or write to another folder (--out)") from error
    if finished or (before is not None and done == samples and of_levels is None):
        assert before is not None
        say(f"using {path} ({done} samples)")
        run.close()
        return before
    total, parts = run.measure()
    agreement = agreement_of_halves(parts if before is None else [before, *parts])
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
        found = to_be_continued(path, model, settings)
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
