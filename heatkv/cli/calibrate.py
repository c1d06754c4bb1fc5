"""`heatkv calibrate`: statistics of a model into a file; and the same for a folder that has none yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from heatkv.cli.opening import open_model, open_statistics, positive
from heatkv.cli.options import AsJson, Running, Source, Without
from heatkv.cli.output import progress, say, show
from heatkv.errors import FormatError, HeatKVError
from heatkv.files import check_writable
from heatkv.models.base import ImageModel
from heatkv.sampling import Settings
from heatkv.statistics import Statistics


def _calibrate(
    model: ImageModel[Any], samples: int, seed: int, settings: Settings, first: int = 0
) -> Iterator[Statistics]:
    """Statistics of one batch after another, so that an interrupt loses a batch at most."""
    from heatkv.calibration import calibrate as measure

    batch = min(16, -(-samples // 2))  # two batches at least, so that halves can be compared
    with progress(f"calibrating {model.name}", samples) as advance:
        for start in range(first, first + samples, batch):
            count = min(batch, first + samples - start)
            yield measure(model, count, seed=seed, first_sample=start, batch=batch, settings=settings)
            advance(count)


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
    return table


def calibrate(
    *,
    out: Annotated[Path, typer.Option("--out", help="statistics file to write")],
    source: Source,
    samples: Annotated[int, typer.Option("--samples", help="images to measure, all classes in turn")] = 64,
    levels: Annotated[
        bool, typer.Option("--levels", help="also measure what coarser levels cost, for heatkv-mr")
    ] = False,
    append: Annotated[bool, typer.Option("--append", help="add samples to an existing file")] = False,
    running: Annotated[Running, Without("rows")],
    as_json: AsJson = False,
) -> None:
    """Measure how much every head looks back at every scale; writes a statistics file.

    Example: heatkv calibrate --model emoji --samples 64 --out statistics.safetensors
    """
    positive(samples=samples)
    if out.exists() and not append:
        raise FormatError(f"{out} exists; add samples to it with --append or name another file")
    if append and not out.exists():
        raise FormatError(f"{out} does not exist; leave --append out to create it")
    if not out.parent.is_dir():
        raise FormatError(f"the folder {out.parent} does not exist")
    check_writable(out.parent)
    loaded, settings = open_model(source, running)
    before = open_statistics(out, loaded) if append else None
    taken = [] if before is None else [s.split(":", 2) for s in before.provenance.samples]
    first = max((int(index) + 1 for given, index, _ in taken if int(given) == running.seed), default=0)
    parts: list[Statistics] = []
    total: Statistics | None = None
    try:
        for part in _calibrate(loaded, samples, running.seed, settings, first):
            if before is not None and not parts:
                before.merge(part)  # refuse before hours are spent
            parts.append(part)
    finally:
        if parts:
            total = _merged(parts if before is None else [before, *parts])
            total.save(out)
            say(f"{out}: {total.count} samples")
    assert total is not None
    agreement = _agreement(parts)
    gini = total.gini().tolist()
    data = {"out": str(out), "samples": total.count, "gini": gini, "rank_agreement_of_halves": agreement}
    show(_calibration_table(total, agreement), as_json, data)


def statistics_of_folder(
    folder: Path, model: ImageModel[Any], samples: int, seed: int, settings: Settings
) -> Statistics:
    """The folder's own statistics: those of an earlier run as far as they fit, the rest measured now."""
    from heatkv.calibration import sample_names, told_settings

    path = folder / "statistics.safetensors"
    wanted = sample_names(model, seed, model.labels(samples), 0)
    parts: list[Statistics] = []
    if path.exists():
        try:
            found = open_statistics(path, model)
            assert found is not None
            if (found.provenance.cfg, found.provenance.settings) == told_settings(settings, model) and list(
                found.provenance.samples
            ) == wanted[: found.count]:
                parts.append(found)
            else:
                say(f"measuring again: {path} was measured with other samples or guidance")
        except HeatKVError as error:
            say(f"measuring again: {error}")
    done = sum(part.count for part in parts)
    if done == samples:
        say(f"using {path} ({done} samples)")
        return parts[0]
    try:
        parts.extend(_calibrate(model, samples - done, seed, settings, first=done))
    finally:
        if parts:
            _merged(parts).save(path)
    agreement = _agreement(parts)
    if agreement is not None:
        worst, mean = min(agreement), sum(agreement) / len(agreement)
        say(
            f"calibrated on {samples} samples; head rankings of two halves agree by {mean:.2f} "
            f"(Spearman, mean over scales; worst {worst:.2f})"
        )
    return _merged(parts)
