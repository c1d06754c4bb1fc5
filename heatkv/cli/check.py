"""`heatkv check`: whether bytes grew or fidelity fell since a baseline; for continuous integration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from heatkv.checks import shown
from heatkv.cli.options import AsJson
from heatkv.cli.output import say, show
from heatkv.errors import HeatKVError


def _share(text: str, name: str) -> float:
    """ "5%" or "0.05"."""
    number = text.strip()
    try:
        return float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        raise HeatKVError(f"--{name} {shown(text)} is no number; write 5% or 0.05") from None


def check(
    *,
    results: Annotated[Path, typer.Argument(help="results.json of `heatkv compare` or `profile`")],
    against: Annotated[Path, typer.Option("--against", help="results.json to compare it with")],
    bytes_: Annotated[str, typer.Option("--bytes", help="growth of bytes that is allowed, of the baseline's")] = "0%",
    kl: Annotated[str, typer.Option("--kl", help="growth of the KL that is allowed, of the baseline's")] = "10%",
    top1: Annotated[str, typer.Option("--top1", help="fall of the top-1 agreement that is allowed")] = "1%",
    psnr: Annotated[float, typer.Option("--psnr", help="fall of the PSNR that is allowed, in dB")] = 0.5,
    ssim: Annotated[float, typer.Option("--ssim", help="fall of the SSIM that is allowed")] = 0.01,
    everything: Annotated[bool, typer.Option("--all", help="also show what did not change")] = False,
    as_json: AsJson = False,
) -> None:
    """Exit code 1 when bytes grew or fidelity fell beyond the tolerances, or a row is missing; times are not looked at.

    Example: heatkv check results/compare/results.json --against benchmarks/baseline/results.json
    """
    from heatkv.profiling.guard import Tolerances, change_lines, check_results

    shares = {"bytes": _share(bytes_, "bytes"), "kl": _share(kl, "kl"), "top1": _share(top1, "top1")}
    verdict = check_results(results, against, Tolerances(**shares, psnr=psnr, ssim=ssim))
    for note in verdict.notes:
        say(f"note: {note}")
    failed = sum(row.failed for row in verdict.rows)
    told = (
        f"{failed} of {len(verdict.rows)} rows are worse than {against}"
        if failed
        else f"nothing is worse than {against}"
    )
    table = Table(title=told)
    for name in ("row", "figure", "baseline", "now", "change", "worst allowed", ""):
        table.add_column(name, justify="left" if name in ("row", "figure", "") else "right", no_wrap=True)
    lines = change_lines(verdict, everything)
    for line in lines:
        table.add_row(*line)
    if not lines:
        table.caption = "no figure changed"
    show(table, as_json, verdict.to_json())
    if verdict.failed:
        raise typer.Exit(1)
