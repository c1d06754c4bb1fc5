"""`heatkv check`: whether bytes grew or fidelity fell since a baseline; for continuous integration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from heatkv.cli.options import AsJson, decimal_of, settings_of, share_of
from heatkv.cli.output import say, show

if TYPE_CHECKING:
    from heatkv.profiling.analysis.guard import Change, Verdict


READERS = {
    "bytes": share_of, "tensors": share_of, "kl": share_of, "top1": share_of, "psnr": decimal_of, "ssim": decimal_of,
}  # fmt: skip


def check(
    *,
    results: Annotated[Path, typer.Argument(help="results.json of `heatkv compare` or `profile`")],
    against: Annotated[Path, typer.Option("--against", help="results.json to compare it with")],
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance", metavar="FIGURE=AMOUNT", help="how much worse a figure may be; may be repeated. Growth of "
            "the baseline's: bytes (0%), tensors (1%), kl (10%); fall: top1 (1%), psnr (0.5 dB), ssim (0.01)",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Exit code 1 when bytes grew or fidelity fell beyond the tolerances, or a row, a ledger or a figure is missing;
    times are not compared.

    Example: heatkv check results/compare/results.json --against benchmarks/baseline/results.json --tolerance kl=5%
    """
    from heatkv.profiling.analysis.guard import Tolerances, check_results

    tolerances = Tolerances(**settings_of(tolerance or [], "--tolerance", READERS))
    verdict = check_results(results, against, tolerances)
    for note in verdict.notes:
        say(f"note: {note}")
    failed = sum(row.failed for row in verdict.rows)
    count = f"{failed} of {len(verdict.rows)} rows are worse" if failed else "nothing is worse"
    lines = _lines(verdict)
    table = Table(
        title=f"{count} than {against}", caption=f"{'' if lines else 'no figure changed; '}{tolerances}"
    )  # fmt: skip
    for place, name in enumerate(("row", "figure", "baseline", "now", "change", "worst allowed", "")):
        # texts go on in the next line where there is no room, numbers and verdicts are never cut
        text = name in ("row", "figure", "change")
        options: dict[str, Any] = {"justify": "left" if name in ("row", "figure", "") else "right"}
        if not text:
            options |= {"no_wrap": True, "min_width": max(len(cells[place]) for cells in [*lines, (name,) * 7])}
        table.add_column(name, overflow="fold", **options)
    for line in lines:
        table.add_row(*line)
    show(table, as_json, verdict.to_json())
    if verdict.failed:
        raise typer.Exit(1)


def _lines(verdict: Verdict) -> list[tuple[str, ...]]:
    """Lines of a table: row, figure, baseline, now, change, worst allowed, verdict; only of what changed."""
    lines: list[tuple[str, ...]] = []
    for row in verdict.rows:
        if row.missing:
            differs = f"the likeliest has another {', '.join(row.nearest)}" if row.nearest else ""
            lines.append((row.name, differs, "", "", "", "", "MISSING"))
        lines += [(row.name, fault, "", "", "", "", "FAILED") for fault in row.faults]
        lines += [
            (row.name, *_cells(change)) for change in row.changes
            if change.failed or change.now != change.baseline
        ]  # fmt: skip
    return lines + [(name, "", "", "", "", "", "new") for name in verdict.extra]


def _cells(change: Change) -> tuple[str, ...]:
    """Figure, baseline, now, change, worst allowed and verdict."""
    form, before, now, moved = ",.0f" if "_bytes" in change.figure else ".5f", change.baseline, "-", ""
    if change.now is not None:
        share = f" ({(change.now - before) / before:+.1%})" if before else ""
        now, moved = f"{change.now:{form}}", f"{change.now - before:+{form}}{share}"
    return change.figure, f"{before:{form}}", now, moved, f"{change.limit:{form}}", "FAILED" if change.failed else "ok"
