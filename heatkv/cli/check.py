"""`heatkv check`: whether bytes grew or fidelity fell since a baseline; for continuous integration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from heatkv.cli.options import AsJson
from heatkv.cli.output import say, show
from heatkv.core.schema import shown
from heatkv.errors import HeatKVError

if TYPE_CHECKING:
    from heatkv.profiling.analysis.guard import Change, Verdict


def _share(text: str, name: str) -> float:
    """ "5%" or "0.05"; a number from 1 on without % may mean either, and is refused."""
    number = text.strip()
    in_percent = number.endswith("%")
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise HeatKVError(f"--{name} {shown(text)} is no number; write 5% or 0.05")
    if not in_percent and value >= 1:
        raise HeatKVError(
            f"--{name} {text!r} without % is a share, {value * 100:g}%; write {value:g}%, or {value * 100:g}% if that "
            "is meant"
        )
    return value / 100 if in_percent else value


def check(
    *,
    results: Annotated[Path, typer.Argument(help="results.json of `heatkv compare` or `profile`")],
    against: Annotated[Path, typer.Option("--against", help="results.json to compare it with")],
    bytes_: Annotated[str, typer.Option("--bytes", help="growth of bytes that is allowed, of the baseline's")] = "0%",
    tensors: Annotated[
        str, typer.Option("--tensors", help="growth of the peaks of tensors that is allowed, of the baseline's")
    ] = "1%",
    kl: Annotated[str, typer.Option("--kl", help="growth of the KL that is allowed, of the baseline's")] = "10%",
    top1: Annotated[str, typer.Option("--top1", help="fall of the top-1 agreement that is allowed")] = "1%",
    psnr: Annotated[float, typer.Option("--psnr", help="fall of the PSNR that is allowed, in dB")] = 0.5,
    ssim: Annotated[float, typer.Option("--ssim", help="fall of the SSIM that is allowed")] = 0.01,
    everything: Annotated[bool, typer.Option("--all", help="also show what did not change")] = False,
    as_json: AsJson = False,
) -> None:
    """Exit code 1 when bytes grew or fidelity fell beyond the tolerances, or a row, a ledger or a figure is missing;
    times are not compared.

    Example: heatkv check results/compare/results.json --against benchmarks/baseline/results.json
    """
    from heatkv.profiling.analysis.guard import Tolerances, check_results

    tolerances = Tolerances(
        bytes=_share(bytes_, "bytes"), tensors=_share(tensors, "tensors"), kl=_share(kl, "kl"),
        top1=_share(top1, "top1"), psnr=psnr, ssim=ssim,
    )  # fmt: skip
    verdict = check_results(results, against, tolerances)
    for note in verdict.notes:
        say(f"note: {note}")
    failed = sum(row.failed for row in verdict.rows)
    told = (
        f"{failed} of {len(verdict.rows)} rows are worse than {against}"
        if failed
        else f"nothing is worse than {against}"
    )
    lines = _lines(verdict, everything)
    table = Table(title=told, caption=f"{'' if lines else 'no figure changed; '}{tolerances}")
    for place, name in enumerate(("row", "figure", "baseline", "now", "change", "worst allowed", "")):
        # texts go on in the next line where there is no room, numbers and verdicts are never cut
        text = name in ("row", "figure", "change")
        table.add_column(
            name, justify="left" if name in ("row", "figure", "") else "right", no_wrap=not text, overflow="fold",
            min_width=None if text else max(len(cells[place]) for cells in [*lines, (name,) * 7]),
        )  # fmt: skip
    for line in lines:
        table.add_row(*line)
    show(table, as_json, verdict.to_json())
    if verdict.failed:
        raise typer.Exit(1)


def _lines(verdict: Verdict, everything: bool) -> list[tuple[str, ...]]:
    """Lines of a table: row, figure, baseline, now, change, worst allowed, verdict; only what changed, or all."""
    lines: list[tuple[str, ...]] = []
    for row in verdict.rows:
        if row.missing:
            differs = f"the likeliest has another {', '.join(row.nearest)}" if row.nearest else ""
            lines.append((row.name, differs, "", "", "", "", "MISSING"))
        lines += [(row.name, fault, "", "", "", "", "FAILED") for fault in row.faults]
        lines += [
            (row.name, *_cells(change)) for change in row.changes
            if everything or change.failed or change.now != change.baseline
        ]  # fmt: skip
    return lines + [(name, "", "", "", "", "", "new") for name in verdict.extra]


def _cells(change: Change) -> tuple[str, ...]:
    """Figure, baseline, now, change, worst allowed and verdict."""
    form, before, now, moved = ",.0f" if "_bytes" in change.figure else ".5f", change.baseline, "-", ""
    if change.now is not None:
        share = f" ({(change.now - before) / before:+.1%})" if before else ""
        now, moved = f"{change.now:{form}}", f"{change.now - before:+{form}}{share}"
    return change.figure, f"{before:{form}}", now, moved, f"{change.limit:{form}}", "FAILED" if change.failed else "ok"
